"""What several commands take."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated

import typer

from farm.errors import UsageError

Input = Annotated[
    str | None, typer.Option("--input", metavar="float32|uint8", help="Type of the bins that the model takes.")
]
Force = Annotated[bool, typer.Option("--force", help="Use NPUs that are sick, or in use by others, all the same.")]

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def batch_sizes(text: str) -> list[int]:
    """``1,4`` as [1, 4]; `UsageError` for anything else."""
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1 or len(set(sizes)) != len(sizes):
        raise UsageError(f"--bs {text}: expected different batch sizes such as 4 or 1,4,8")
    return sizes


def check_backend(backend: str | None) -> None:
    if backend not in (None, "acl", "ort", "simulated"):
        raise UsageError(f"--backend {backend}: expected acl, ort or simulated")


def check_input(dtype: str | None) -> None:
    if dtype not in (None, "float32", "uint8"):
        raise UsageError(f"--input {dtype}: expected float32 or uint8")


def names(text: str | None) -> tuple[str, ...]:
    """``host:0,host:1`` as a tuple; empty when not given."""
    return tuple(part.strip() for part in text.split(",") if part.strip()) if text else ()


def since(text: str, now: float) -> float:
    """``90s``, ``5m``, ``2h`` or ``1d`` ago, or a time such as ``2026-11-20T10:00``, as seconds since the epoch."""
    ago = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    try:
        at = now - float(ago[1]) * _SECONDS[ago[2]] if ago else datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError) as exc:
        raise UsageError(f"--since {text}: expected how long ago (90s, 5m, 2h, 1d) or when (2026-11-20T10:00)") from exc
    if at > now:
        raise UsageError(f"--since {text} is in the future")
    return at
