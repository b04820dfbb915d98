"""Devices: each start of a device's worker is a new incarnation, and beats while it lives."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, bindparam, case, or_, select, update

from db import events, tables
from db.engine import Database, locks_rows
from farm.artifacts import Artifact
from farm.errors import UsageError
from farm.jobs import LIVE, DeviceState

#: Failures in a row, on shards that other devices can do, after which a device gets no more work.
STRIKES = 3

# Every device asks this every few seconds, so it is put together once.
_BEAT = update(tables.device).where(
    tables.device.c.name == bindparam("me"), tables.device.c.incarnation == bindparam("mine")
)
_MINE = select(tables.attempt.c.id).where(
    tables.attempt.c.device == bindparam("me"),
    tables.attempt.c.incarnation == bindparam("mine"),
    tables.one_of(tables.attempt.c.state, LIVE),
)

_QUARANTINED = DeviceState.QUARANTINED.value
_ALL = select(tables.device).order_by(tables.device.c.host, tables.device.c.idx)
_SOME = _ALL.where(tables.device.c.name.in_(bindparam("names", expanding=True)))
_BLAMED = or_(tables.device.c.strikes > 0, tables.device.c.quarantines > 0)
_CLEAR = (
    update(tables.device)
    .where(tables.device.c.name == bindparam("me"), tables.device.c.state == DeviceState.UP.value, _BLAMED)
    .values(strikes=0, quarantines=0)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device as the database holds it."""

    name: str  #: host:index
    host: str
    soc: str
    backends: tuple[str, ...]
    state: DeviceState
    incarnation: int
    pid: int
    pid_started: float
    registered: float
    heartbeat: float
    strikes: int
    kind: str  #: devices of one kind give the same bits
    drained: bool  #: by its user: takes no work, even after a restart
    quarantines: int  #: since it was last seen to be sound
    reason: str  #: of its quarantine
    info: Mapping[str, Any]

    @property
    def takes_work(self) -> bool:
        return self.state is DeviceState.UP and not self.drained

    def serves(self, artifact: Artifact) -> bool:
        return artifact.runs_on(self.backends, self.soc)


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """What a worker says of itself when it starts."""

    name: str
    host: str
    index: int
    soc: str
    backends: tuple[str, ...]
    pid: int
    pid_started: float
    kind: str
    info: Mapping[str, Any]


def register(conn: Connection, database: Database, registration: Registration, lease_s: float) -> int:
    """
    Begin a new incarnation of a device and return its number. The old one's attempts are orphans from now on.

    A quarantined device stays so: its worker has it answer a canary first. `UsageError` when another machine serves
    this device, or when a database file that serves one host serves another one.
    """
    now = database.now(conn)
    name, device = registration.name, tables.device.c
    _refuse_double(conn, database, registration, lease_s)
    values = {
        "host": registration.host,
        "idx": registration.index,
        "soc": registration.soc,
        "backends": ",".join(registration.backends),
        "state": case((device.state == _QUARANTINED, _QUARANTINED), else_=DeviceState.UP.value),
        "pid": registration.pid,
        "pid_started": registration.pid_started,
        "registered": now,
        "heartbeat": now,
        "strikes": case((device.state == _QUARANTINED, device.strikes), else_=0),
        "kind": registration.kind,
        "info": json.dumps(registration.info),
    }
    before = conn.scalar(select(tables.device.c.incarnation).where(tables.device.c.name == name).with_for_update())
    incarnation = (before or 0) + 1
    if before is None:
        values |= {"state": DeviceState.UP.value, "strikes": 0}
        conn.execute(tables.device.insert().values(name=name, incarnation=incarnation, **values))
    else:
        known = tables.device.c.name == name
        conn.execute(update(tables.device).where(known).values(incarnation=incarnation, **values))
    # What its host lacked, only workers know to look for, and this one knows of nothing.
    conn.execute(tables.unfit.delete().where(tables.unfit.c.host == registration.host))
    events.record(conn, now, "device_up", f"incarnation {incarnation}, pid {registration.pid}", device=name)
    if why := registration.info.get("forced"):
        events.record(conn, now, "device_forced", f"incarnation {incarnation}: {why}", device=name)
    return incarnation


def _refuse_double(conn: Connection, database: Database, registration: Registration, lease_s: float) -> None:
    refuse_second_host(conn, database, registration.host, lease_s)
    for other in heard(conn, database, lease_s):
        machines = other.info.get("machine"), registration.info.get("machine")
        if other.name == registration.name and None not in machines and len(set(machines)) == 2:
            raise UsageError(
                f"device {other.name} is served by another machine, heard of a moment ago: "
                "give each host a name of its own in FARM_HOST"
            )


def refuse_second_host(conn: Connection, database: Database, host: str, lease_s: float) -> None:
    """`UsageError` when a database file, which serves one host, serves another one than this."""
    others = {d.host for d in heard(conn, database, lease_s)} - {host}
    if database.is_sqlite and others:
        raise UsageError(
            f"{database} serves host {', '.join(sorted(others))}, and SQLite serves one host only: give the hosts a "
            "Postgres in FARM_DATABASE_URL (postgresql+psycopg://...), or end the farm of the other host first"
        )


def beat(conn: Connection, database: Database, name: str, incarnation: int) -> frozenset[int] | None:
    """
    Say that an incarnation lives, and learn which of its attempts may still win.

    None when a newer incarnation took over: this one has to go.
    """
    me = {"me": name, "mine": incarnation}
    if conn.execute(_BEAT, {**me, "heartbeat": database.now(conn)}).rowcount != 1:
        return None
    return frozenset(conn.execute(_MINE, me).scalars())


def observe(conn: Connection, name: str, found: Mapping[str, Any]) -> None:
    """Note how a device is now, if it is known; what stands in its `info` besides stays."""
    device = tables.device.c
    before = conn.scalar(select(device.info).where(device.name == name).with_for_update())
    if before is not None:
        info = json.dumps({**json.loads(before), **found})
        conn.execute(update(tables.device).where(device.name == name).values(info=info))


def leave(conn: Connection, database: Database, name: str, incarnation: int) -> bool:
    """Say that an incarnation goes. A quarantined device stays so; False when a newer one took over."""
    changed = conn.execute(
        update(tables.device)
        .where(
            tables.device.c.name == name,
            tables.device.c.incarnation == incarnation,
            tables.device.c.state == DeviceState.UP.value,
        )
        .values(state=DeviceState.GONE.value)
    )
    if changed.rowcount == 1:
        events.record(conn, database.now(conn), "device_gone", device=name)
    return changed.rowcount == 1


def get(conn: Connection, name: str) -> Device | None:
    row = conn.execute(select(tables.device).where(tables.device.c.name == name)).one_or_none()
    return None if row is None else _record(row)


def everything(conn: Connection, only: Collection[str] | None = None) -> list[Device]:
    """All devices, or `only` those with these names."""
    rows = conn.execute(_ALL) if only is None else conn.execute(_SOME, {"names": list(only)})
    return [_record(row) for row in rows]


def heard(conn: Connection, database: Database, lease_s: float, only: Collection[str] | None = None) -> list[Device]:
    """Devices whose worker lives, quarantined ones too."""
    horizon = database.now(conn) - lease_s
    return [d for d in everything(conn, only) if d.state is not DeviceState.GONE and d.heartbeat >= horizon]


def live(conn: Connection, database: Database, lease_s: float, only: Collection[str] | None = None) -> list[Device]:
    """Devices that take work now."""
    return [d for d in heard(conn, database, lease_s, only) if d.takes_work]


def hold(conn: Connection, name: str) -> None:
    """Have a device's window to oneself until the transaction ends."""
    if locks_rows(conn):
        conn.execute(select(tables.device.c.name).where(tables.device.c.name == name).with_for_update(key_share=True))


def strike(conn: Connection, database: Database, name: str, count: int, why: str) -> None:
    """Count failures against a device, or forgive with a negative count; the third in a row quarantines it."""
    device = tables.device.c
    row = conn.execute(select(device.strikes, device.state).where(device.name == name).with_for_update()).one()
    strikes = max(0, row.strikes + count)
    conn.execute(update(tables.device).where(device.name == name).values(strikes=strikes))
    if strikes >= STRIKES and row.state == DeviceState.UP.value:
        quarantine(conn, database, name, why)
    elif strikes < STRIKES and row.state == DeviceState.QUARANTINED.value:
        release(conn, database, name, strikes, "its strikes were the work's fault")


def quarantine(conn: Connection, database: Database, name: str, why: str) -> None:
    """Give a device no more work until it answers a canary as it should."""
    device = tables.device.c
    changed = conn.execute(
        update(tables.device)
        .where(device.name == name, device.state != DeviceState.QUARANTINED.value)
        .values(state=DeviceState.QUARANTINED.value, quarantines=device.quarantines + 1, reason=why)
    )
    if changed.rowcount:
        events.record(conn, database.now(conn), "device_quarantined", why, device=name)


def release(conn: Connection, database: Database, name: str, strikes: int, why: str) -> None:
    """End a quarantine, with so many strikes left on the record."""
    device = tables.device.c
    changed = conn.execute(
        update(tables.device)
        .where(device.name == name, device.state == DeviceState.QUARANTINED.value)
        .values(state=DeviceState.UP.value, strikes=strikes, reason="")
    )
    if changed.rowcount:
        events.record(conn, database.now(conn), "device_up", why, device=name)


def set_drained(conn: Connection, database: Database, names: Collection[str], drained: bool) -> None:
    """Have devices take no work, or take it again."""
    device = tables.device.c
    for name in names:
        changed = conn.execute(
            update(tables.device).where(device.name == name, device.drained != drained).values(drained=drained)
        )
        if changed.rowcount:
            kind = "device_drained" if drained else "device_undrained"
            events.record(conn, database.now(conn), kind, "by its user", device=name)


def clear_strikes(conn: Connection, name: str) -> None:
    """A device did what it was asked to."""
    conn.execute(_CLEAR, {"me": name})


def matching(devices: Collection[Device], artifact: Artifact, only: Collection[str]) -> list[Device]:
    """Those that can serve a job: its backend, its chip, and among the named ones where it names any."""
    return [d for d in devices if d.serves(artifact) and (not only or d.name in only)]


def _record(row: Row[Any]) -> Device:
    return Device(
        name=row.name,
        host=row.host,
        soc=row.soc,
        backends=tuple(row.backends.split(",")),
        state=DeviceState(row.state),
        incarnation=row.incarnation,
        pid=row.pid,
        pid_started=row.pid_started,
        registered=row.registered,
        heartbeat=row.heartbeat,
        strikes=row.strikes,
        kind=row.kind,
        drained=row.drained,
        quarantines=row.quarantines,
        reason=row.reason,
        info=json.loads(row.info),
    )
