"""The digest: one number for all answers of a job, equal however the work was spread or interrupted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

FAILED = "!"


def answers_digest(answers: Iterable[tuple[str, str | None]]) -> str:
    r"""
    sha256 over ``name\tanswer\n`` in byte order of the names; a failed sample (None) is ``name\t!\n``.

    An answer is ``c1,c2,c3,c4,c5``, or the sha256 of a label map's uint8 values.
    """
    digest = hashlib.sha256()
    for name, answer in sorted(answers, key=lambda answer: answer[0].encode()):
        digest.update(f"{name}\t{FAILED if answer is None else answer}\n".encode())
    return digest.hexdigest()
