"""What several commands take."""

from __future__ import annotations

from farm.errors import UsageError


def batch_sizes(text: str) -> list[int]:
    """``1,4`` as [1, 4]; `UsageError` for anything else."""
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1 or len(set(sizes)) != len(sizes):
        raise UsageError(f"--bs {text}: expected different batch sizes such as 4 or 1,4,8")
    return sizes


def names(text: str | None) -> tuple[str, ...]:
    """``host:0,host:1`` as a tuple; empty when not given."""
    return tuple(part.strip() for part in text.split(",") if part.strip()) if text else ()
