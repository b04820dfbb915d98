"""What could keep a job from running here, looked at one thing after the other."""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from db import jobs
from db.engine import Database, open_database
from farm import artifacts, atc, zoo
from farm.data import manifest
from farm.errors import FarmError
from farm.reports.status import ago, device_lines
from farm.settings import Settings, make_home
from farm.versions import versions
from tasks import local
from workers import broker, npu_smi
from workers.backends.acl import module_file
from workers.devices import cann_version, discover, is_npu_host

#: A clock that is off by more is worth a word.
CLOCK_S = 2.0
#: Where CANN's parts lie unless somebody chose otherwise; older versions, the runtime alone, newer versions.
CANN = tuple(Path("/usr/local/Ascend", name) for name in ("ascend-toolkit", "nnrt", "cann"))
LIBRARY = "libascendcl.so"
#: A broker gets so long to answer.
BROKER_S = 5.0


class _Wrong(FarmError):
    """What a check found to be wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    what: str
    ok: bool
    text: str

    def as_json(self) -> dict[str, Any]:
        return {"what": self.what, "ok": self.ok, "text": self.text}


def examine(settings: Settings) -> list[Finding]:
    """Look at everything; never raises. No secret is shown: URLs come without passwords."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("versions", lambda: ", ".join(f"{name} {version}" for name, version in versions().items())),
        ("home", lambda: _home(settings)),
        ("broker", lambda: _broker(settings)),
        ("farm", lambda: _farm(settings)),
        ("export", _export),
        ("compile", _compile),
    ]
    findings = [_look(what, check) for what, check in checks] + list(_devices(settings))
    return [*findings, *_stored(settings), *_data(settings)]


def _stored(settings: Settings) -> Iterator[Finding]:
    """The database, and what it says of this host and the others."""
    try:
        database = open_database(settings)
    except (FarmError, OSError) as exc:
        yield Finding(what="database", ok=False, text=str(exc))
        return
    yield _look("database", lambda: _database(database, settings))
    yield _look("clock", lambda: _clock(database, settings))
    yield _look("hosts", lambda: _hosts(database, settings))
    yield _look("jobs", lambda: _unfit(database, settings))
    database.close()


def _database(database: Database, settings: Settings) -> str:
    if database.is_sqlite and not settings.is_embedded:
        raise _Wrong(
            f"FARM_BROKER_URL is set, but the database is SQLite ({database}), which other hosts cannot use: "
            "set FARM_DATABASE_URL to a Postgres (postgresql+psycopg://...)"
        )
    return f"{'SQLite' if database.is_sqlite else 'Postgres'} answers, {database}, schema up to date"


def _clock(database: Database, settings: Settings) -> str:
    """The server's clock is what leases are measured with; this host's is what its logs say."""
    if database.is_sqlite:
        return "this host's own"
    with database.read() as conn:
        database.now(conn)  # the first question may have to wait for the connection
        asked = time.time()
        theirs = database.now(conn)
        ours = (asked + time.time()) / 2 + settings.clock_offset_s
    off = ours - theirs
    said = f"{abs(off):.1f} s {'ahead of' if off > 0 else 'behind'} the database's"
    if abs(off) > CLOCK_S:
        raise _Wrong(f"this host's is {said}: no lease suffers, but its logs mislead; set it by NTP")
    return said


def _hosts(database: Database, settings: Settings) -> str:
    lines = device_lines(database, settings)
    others = [line for line in lines if line["host"] != settings.host_name]
    lost = [f"{line['device']} ({ago(line['heard_s_ago'])})" for line in others if line["state"] == "lost"]
    if lost:
        raise _Wrong(
            f"not heard of, though they have not left: {', '.join(lost)}. Look at farm worker there; "
            "farm devices drain HOST says that a host will not come back"
        )
    return f"{len(others)} devices of {len({line['host'] for line in others})} other hosts, none lost"


def _unfit(database: Database, settings: Settings) -> str:
    with database.read() as conn:
        mine = [each for each in jobs.unfit_hosts(conn) if each.host == settings.host_name]
    if mine:
        raise _Wrong("this host is skipped for " + "; ".join(f"job {each.job_id}: {each.reason}" for each in mine))
    return "this host is skipped for none"


def _look(what: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(what=what, ok=True, text=check())
    except (FarmError, OSError) as exc:
        return Finding(what=what, ok=False, text=str(exc))


def _home(settings: Settings) -> str:
    make_home(settings)
    free = shutil.disk_usage(settings.home).free / 1e9
    return f"{settings.home} is writable, {free:.1f} GB free"


def _broker(settings: Settings) -> str:
    if settings.is_embedded:
        return f"embedded, {broker.server_binary()}"
    from kombu.exceptions import OperationalError

    from tasks.app import make_app

    with make_app(settings.broker_url).connection_for_write(connect_timeout=BROKER_S) as connection:
        shown = connection.as_uri()  # without its password
        try:
            connection.ensure_connection(max_retries=1, timeout=BROKER_S)
            connection.default_channel.client.ping()
        except (OperationalError, *connection.connection_errors, *connection.channel_errors) as exc:
            raise _Wrong(f"{shown} in FARM_BROKER_URL does not answer: {exc}") from exc
    return f"{shown} answers"


def _farm(settings: Settings) -> str:
    if not settings.is_embedded:
        return "of many hosts"
    return "up" if local.is_up(settings) else "none is up; farm submit brings one, farm up has one that stays"


def _export() -> str:
    return "torch is installed" if importlib.util.find_spec("torch") else "no torch: farm export needs farm[export]"


def _compile() -> str:
    program = shutil.which("atc")
    return f"{program}, CANN {atc.version() or 'of unknown version'}" if program else "no atc: farm compile needs CANN"


def _devices(settings: Settings) -> Iterator[Finding]:
    if settings.simulate or local.simulates(settings):
        listing = ", ".join(f"{d.name} ({d.soc})" for d in local.devices(settings))
        yield Finding(what="devices", ok=True, text=listing)
        return
    if not npu_smi.is_installed():
        yield Finding(what="devices", ok=True, text=f"no npu-smi: {settings.cpu_slots} CPU slots")
        return
    if not is_npu_host(settings):
        text = f"npu-smi is here, and FARM_CPU_SLOTS is set: {settings.cpu_slots} CPU slots, no NPU"
        yield Finding(what="devices", ok=True, text=text)
        return
    yield _look("NPUs", lambda: _npus(settings))
    with suppress(FarmError):  # said just now
        for each in discover(settings):
            health, celsius = each.info["health"], each.info["temperature_c"]
            memory = f"{each.info['memory_used_mb']} of {each.info['memory_total_mb']} MB in use"
            state = f"{each.soc}, health {health}, {celsius} °C, {memory}"
            text = f"{state}; not used: {each.unusable}" if each.unusable else state
            yield Finding(what=each.name, ok=not each.unusable, text=text)
    yield _look("CANN", _cann)
    yield _look("aclruntime", module_file)


def _npus(settings: Settings) -> str:
    found = [each for each in discover(settings) if each.index >= 0]
    seen = os.environ.get(npu_smi.VISIBLE)
    by = f"{npu_smi.VISIBLE} is not set" if seen is None else f"{npu_smi.VISIBLE}={seen}"
    if not found:
        raise _Wrong(f"npu-smi answers, but this process can open no NPU: {by}")
    return f"npu-smi answers, driver {found[0].info['driver']}; {len(found)} can be opened here, {by}"


def _cann() -> str:
    """Whether its environment was sourced: without it neither aclruntime nor a model is loaded."""
    home, libraries = os.environ.get("ASCEND_HOME_PATH"), os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    found = [path for folder in libraries if folder and (path := Path(folder, LIBRARY)).exists()]
    if home is None or not found:
        there = [path for place in CANN if (path := place / "set_env.sh").exists()]
        hint = f"source {there[0]}" if there else f"install CANN, then source its set_env.sh ({CANN[0]})"
        lacking = "ASCEND_HOME_PATH is not set" if home is None else f"no {LIBRARY} in LD_LIBRARY_PATH"
        raise _Wrong(f"the environment of CANN is not there, {lacking}: {hint}")
    return f"CANN {cann_version() or 'of unknown version'} in {home}, {found[0]}"


def _data(settings: Settings) -> Iterator[Finding]:
    for name in zoo.MODELS:
        spec = zoo.get(name)
        directory = manifest.bins_dir(settings.data_dir, spec.recipe, spec.input.dtype)
        if (directory / manifest.FILE_NAME).exists():
            yield _look(f"{name} bins", lambda d=directory: f"{len(manifest.read(d).samples)} samples in {d}")  # type: ignore[misc]
        else:
            yield Finding(what=f"{name} bins", ok=True, text=f"none yet: farm prepare {name}")
        yield _look(
            f"{name} artifacts",
            lambda n=name: ", ".join(map(str, artifacts.stored(settings.data_dir, n))) or f"none yet: farm export {n}",  # type: ignore[misc]
        )
