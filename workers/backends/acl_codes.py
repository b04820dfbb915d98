"""
ACL's codes: what one means, whom it concerns, and how to find it in what CANN printed.

The vendor's module tells the code of a failed execution to nobody; CANN's own complaint names it, most of the time.
"""

from __future__ import annotations

import re
from enum import Enum


class Blame(Enum):
    """Whom a code concerns, by what is to be done next. Of several codes the first of these counts."""

    CARD = "card"  #: take it out
    MEMORY = "memory"  #: fewer sessions, or a smaller batch
    BATCH = "batch"  #: once elsewhere; then it is the batch, or the model
    OURS = "ours"  #: a call that cannot work, here or elsewhere
    DEVICE = "device"  #: all else: elsewhere


_CARD = {
    507010: "the device lost its heartbeat",
    507033: "the device cannot be set up",
    507899: "internal error of the driver",
    507901: "the link to the device is closed",
}
_MEMORY = {
    207001: "memory allocation failed",
    207018: "the device's memory is exhausted",
}
_BATCH = {
    507011: "the model's execution failed",
    507012: "the device's report timed out",
    507013: "DMA error",
    507014: "AI core timeout",
    507015: "AI core exception",
    507016: "AI core trap",
    507017: "AI CPU timeout",
    507018: "AI CPU exception",
    507034: "vector core timeout",
    507035: "vector core exception",
}
_OTHER = {
    107000: "invalid parameter",
    107001: "invalid device id",
    107002: "no context",
    107003: "the stream is of another context",
    107019: "a wait timed out",
    107020: "a task timed out",
    145000: "invalid parameter",
    145001: "the executor is not initialised",
    145002: "invalid model path",
    145003: "invalid model id",
    145006: "invalid size of the model's data",
    145011: "invalid address of the dynamic input",
    145012: "invalid length of the dynamic input",
    145013: "invalid dynamic batch size",
    207004: "no device",
    207005: "no resource left",
    207006: "no permission",
    207007: "no event left",
    207008: "no stream left",
    207012: "over a limit",
    500001: "failure inside CANN",
    500002: "failure of the graph engine",
    500003: "failure of the runtime",
    500004: "failure of the driver",
    500005: "failure inside CANN",
    507001: "failure of the task scheduler",
    507900: "internal error of the AI CPU",
}
_MEANING = {**_CARD, **_MEMORY, **_BATCH, **_OTHER}

#: Codes in running text. Round numbers such as 100000 are left out: there they are anything.
_NUMBER = re.compile(
    r"(?<![\w.])(10700\d|1070[12]\d|1450[01]\d|20700\d|20701[0-8]|50000[1-5]|5070[0-4]\d|50705[0-2]|507899|50790[01])"
    r"(?![\w.]*\w)"
)
#: Numbers that are none, and may look like one: of processes, models, streams, tasks.
_IDENTITY = re.compile(r"\b\w*id\b(?:\s+is)?\W{0,3}\d+", re.IGNORECASE)

#: What CANN says without a number.
_WORDS = (
    (r"lost heart ?beat|\bEL0001\b", 507010),
    (r"\bEL0004\b|out of memory", 207001),
    (r"alloc\w*\b.{0,40}\b(?:memory|fail)|memory.{0,40}\b(?:alloc|exhaust|insufficient)", 207001),
    (r"(?:vector ?core|aivec)\b.{0,40}time ?out", 507034),
    (r"(?:vector ?core|aivec)\b.{0,40}exception", 507035),
    (r"ai ?core\b.{0,40}time ?out", 507014),
    (r"ai ?core\b.{0,40}exception", 507015),
    (r"ai ?core\b.{0,40}trap", 507016),
    (r"ai ?cpu\b.{0,40}time ?out", 507017),
    (r"ai ?cpu\b.{0,40}exception", 507018),
    (r"\bhdc\b.{0,40}(?:closed|disconnect)", 507901),
)  # fmt: skip
_COMPLAINTS = tuple((re.compile(words, re.IGNORECASE), code) for words, code in _WORDS)


def blame(code: int) -> Blame:
    for codes, whom in ((_CARD, Blame.CARD), (_MEMORY, Blame.MEMORY), (_BATCH, Blame.BATCH)):
        if code in codes:
            return whom
    return Blame.OURS if code // 1000 in (107, 145) else Blame.DEVICE


def meaning(code: int) -> str:
    """A phrase with the code's number, e.g. ``AI core exception (507015)``."""
    return f"{_MEANING[code]} ({code})" if code in _MEANING else f"ACL error {code}"


def find(said: str) -> int | None:
    """
    The code in what was printed during a call: the number that tells most, else the one its words stand for.

    One complaint may name several, for every layer adds its own.
    """
    text = _IDENTITY.sub("", said)
    found = [int(match[1]) for match in _NUMBER.finditer(text)]
    found = found or [code for words, code in _COMPLAINTS if words.search(text)]
    return min(found, key=lambda code: list(Blame).index(blame(code)), default=None)
