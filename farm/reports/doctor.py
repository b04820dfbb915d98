"""What could keep a job from running here, looked at one thing after the other."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from db.engine import open_database
from farm import artifacts, zoo
from farm.data import manifest
from farm.errors import FarmError
from farm.settings import Settings, make_home
from farm.versions import versions
from tasks import local
from workers import broker
from workers.devices import discover


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
        ("database", lambda: f"{open_database(settings)}, schema up to date"),
        ("broker", lambda: _broker(settings)),
        ("farm", lambda: _farm(settings)),
        ("devices", lambda: ", ".join(f"{d.name} ({d.soc})" for d in discover(settings))),
        ("export", _export),
    ]
    findings = [_look(what, check) for what, check in checks]
    return [*findings, *_data(settings)]


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
    return "configured in FARM_BROKER_URL"


def _farm(settings: Settings) -> str:
    if not settings.is_embedded:
        return "of many hosts"
    return "up" if local.is_up(settings) else "none is up; farm submit brings one, farm up has one that stays"


def _export() -> str:
    return "torch is installed" if importlib.util.find_spec("torch") else "no torch: farm export needs farm[export]"


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
