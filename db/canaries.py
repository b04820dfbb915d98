"""
Canaries: inputs that are the same everywhere, and what devices say to them.

Devices of one kind with one artifact give the same bits. Who does not is found out by the others, or, where there is
a reference, by its distance to onnxruntime; then nothing counts that it did since it was last right.
"""

from __future__ import annotations

from collections import Counter

from sqlalchemy import Connection, func, insert, or_, select, update

from db import devices, events, reopen, tables
from db.engine import Database
from farm.jobs import Canary, DeviceState, Verdict

c = tables.canary.c


def judge(
    conn: Connection, database: Database, device: str, incarnation: int, canary: Canary
) -> tuple[Verdict, list[str]]:
    """
    Write an answer down and compare it with the latest ones of other devices of the kind.

    Returns its verdict and the devices it condemns, which are in quarantine and distrusted then. A newcomer may settle
    what was disputed: that condemns others than the one that answered.
    """
    kind = conn.scalar(select(tables.device.c.kind).where(tables.device.c.name == device)) or ""
    far = canary.max_abs_diff is not None and not canary.max_abs_diff <= canary.tolerance
    conn.execute(
        insert(tables.canary).values(
            artifact_sha256=canary.artifact_sha256,
            number=canary.number,
            device=device,
            kind=kind,
            incarnation=incarnation,
            at=database.now(conn),
            digest=canary.digest,
            max_abs_diff=canary.max_abs_diff,
            ms=canary.ms,
            verdict=(Verdict.DISAGREES if far else Verdict.UNVERIFIED).value,
        )
    )
    if far:
        why = (
            f"its answer to a canary is {canary.max_abs_diff:.2g} of the largest value away from onnxruntime's, "
            f"tolerated are {canary.tolerance:.2g}"
        )
        _condemn(conn, database, device, canary.artifact_sha256, why)
        return Verdict.DISAGREES, [device]
    verdicts = _compare(conn, device, kind, canary)
    undecided = verdicts[device][1] in (Verdict.UNVERIFIED, Verdict.DISPUTED)
    if undecided and _changed_its_mind(conn, device, kind, canary):
        why = f"its answer to canary {canary.number} is not the one it gave before"
        _condemn(conn, database, device, canary.artifact_sha256, why)
        return Verdict.DISAGREES, [device]
    condemned = []
    for name, (answer, verdict, before) in verdicts.items():
        if verdict is not before:
            conn.execute(update(tables.canary).where(c.id == answer).values(verdict=verdict.value))
        if verdict is Verdict.DISAGREES and (before is not Verdict.DISAGREES or name == device):
            most = sum(v is Verdict.AGREES for _, v, _ in verdicts.values())
            why = f"its answer to canary {canary.number} is not that of {most} others of its kind"
            _condemn(conn, database, name, canary.artifact_sha256, why)
            condemned.append(name)
        elif verdict is Verdict.DISPUTED and before is not Verdict.DISPUTED:
            text = f"as many devices say this to canary {canary.number} as that: one more would tell who is right"
            events.record(conn, database.now(conn), "canary_disputed", text, device=name)
    return verdicts[device][1], condemned


def _compare(conn: Connection, device: str, kind: str, canary: Canary) -> dict[str, tuple[int, Verdict, Verdict]]:
    """
    By device: its latest answer's id, what that is worth now, and what it was thought to be worth.

    Devices in quarantine have no say, but for the one that answers.
    """
    same = (c.artifact_sha256 == canary.artifact_sha256, c.kind == kind, c.number == canary.number)
    near = or_(c.max_abs_diff.is_(None), c.max_abs_diff <= canary.tolerance)
    d = tables.device.c
    heard = select(d.name).where(or_(d.name == device, d.state != DeviceState.QUARANTINED.value))
    latest = select(func.max(c.id)).where(*same, near, c.device.in_(heard)).group_by(c.device)
    rows = conn.execute(select(c.id, c.device, c.digest, c.verdict).where(c.id.in_(latest))).all()
    votes = Counter(row.digest for row in rows)
    (best, most), *others = votes.most_common()
    tie = bool(others) and others[0][1] == most

    def worth(digest: str) -> Verdict:
        if tie and votes[digest] == most:
            return Verdict.DISPUTED
        if digest != best:
            return Verdict.DISAGREES
        return Verdict.AGREES if most > 1 else Verdict.UNVERIFIED

    return {row.device: (row.id, worth(row.digest), Verdict(row.verdict)) for row in rows}


def _changed_its_mind(conn: Connection, device: str, kind: str, canary: Canary) -> bool:
    same = (c.artifact_sha256 == canary.artifact_sha256, c.kind == kind, c.number == canary.number)
    said = select(c.digest).where(*same, c.device == device).order_by(c.id.desc()).limit(2)
    return len(set(conn.execute(said).scalars())) > 1


def _condemn(conn: Connection, database: Database, device: str, artifact_sha256: str, why: str) -> None:
    devices.quarantine(conn, database, device, why)
    right = conn.scalar(
        select(func.max(c.at)).where(
            c.device == device, c.artifact_sha256 == artifact_sha256, c.verdict == Verdict.AGREES.value
        )
    )
    reopen.distrust(conn, database, device, right or 0.0, why, artifact_sha256=artifact_sha256)
