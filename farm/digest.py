"""The digest: one number for all answers of a job, equal however the work was spread or interrupted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

FAILED = "!"


def answers_digest(answers: Iterable[tuple[str, Sequence[int] | None]]) -> str:
    r"""
    sha256 over ``name\tc1,c2,c3,c4,c5\n`` in byte order of the names; a failed sample (None) is ``name\t!\n``.
    """
    digest = hashlib.sha256()
    for name, classes in sorted(answers, key=lambda answer: answer[0].encode()):
        text = FAILED if classes is None else ",".join(map(str, classes))
        digest.update(f"{name}\t{text}\n".encode())
    return digest.hexdigest()
