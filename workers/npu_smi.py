"""
What `npu-smi`, the driver's own tool, says about the NPUs of this host: its texts as records, and the calling of it.

Leaves to others which cards to use: a card may say OK and hang, or say Alarm and work. Whatever keeps the tool from
answering is a `DeviceError` that says so. It never reads as "no cards": one broken card is enough to fail the tool for
all of them. Layouts are those the driver's published source prints, of 2022 to 2026; where versions space them
differently, the heads of the columns are followed, never their places.

A farm on NPUs runs the tool where it opens the devices: a container counts its devices anew.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import pairwise
from pathlib import Path
from signal import SIGKILL, Signals
from typing import Any

from farm.errors import DeviceError, UsageError
from farm.leash import ROOT

COMMAND = "npu-smi"
TIMEOUT_S = 30.0  #: it takes one to two seconds where eight cards are well

#: Where the driver's installer puts the tool; a service's or a user's PATH may not have both.
USUAL_PLACES = ("/usr/local/sbin", "/usr/local/bin")

VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"

_NO_CARD = "There is no NPU card on this server."
_CONTROLLERS = ("mcu", "3559")  #: what a card's own controllers are called where chips have names
_KILL_S = 2.0  #: a killed process that is still there then sits in the driver, where no signal reaches it


class Health(str, Enum):
    """A chip's state. All but UNKNOWN are the tool's words."""

    OK = "OK"
    WARNING = "Warning"
    ALARM = "Alarm"
    CRITICAL = "Critical"
    UNKNOWN = "UNKNOWN"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """
    A chip of the table of `npu-smi info`: one device. A Duo card has two.

    None is what was not printed. The table has two lines a chip, and the tool leaves out the first where it has no word
    for the health, the second where it does not find the logic id: half chips occur, see `is_whole`.
    """

    card_id: int | None = None  #: "NPU" in the table: any number (32896), for `-i`; not the device's
    chip_id: int | None = None  #: within the card, for `-c`
    logic_id: int | None = None  #: the device number of ACL, as long as `visible` does not say otherwise
    physical_id: int | None = None  #: printed instead of the logic id where cards have two dies of the 910 family
    name: str | None = None  #: such as "310P3"
    health_text: str | None = None  #: as printed; `health` is what it is worth
    power_w: float | None = None  #: not of a 310P, where only the card's controller measures it
    temperature_c: float | None = None
    aicore_percent: float | None = None
    hugepages_used: int | None = None
    hugepages_total: int | None = None
    memory_used_mb: int | None = None
    memory_total_mb: int | None = None
    hbm_used_mb: int | None = None
    hbm_total_mb: int | None = None
    bus_id: str | None = None  #: PCIe, DDDD:BB:DD.F; the chips of a Duo share one

    @property
    def health(self) -> Health:
        """
        The health that can be believed.

        A chip that does not answer is printed as OK with 0 for everything asked: OK counts only from one that told its
        memory, and its name or temperature.
        """
        said = _health(self.health_text)
        answered = bool(self.memory_total_mb or self.hbm_total_mb) and bool(self.name or self.temperature_c)
        return Health.UNKNOWN if said is Health.OK and not answered else said

    @property
    def soc(self) -> str | None:
        """The chip as the compiler calls it: "Ascend310P3"."""
        return _soc(self.name)

    @property
    def is_whole(self) -> bool:
        """Whether both its lines were printed."""
        return self.card_id is not None and self.chip_id is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A process that holds memory of a chip. In a container's table the pid is the container's or the host's."""

    card_id: int | None
    chip_id: int | None
    pid: int
    name: str  #: may be empty; the tool cuts long ones
    memory_mb: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Info:
    """What `npu-smi info` printed."""

    version: str | None  #: the tool's; None where the title was cut off
    driver: str | None
    chips: tuple[Chip, ...]
    processes: tuple[Process, ...] | None  #: at most 8 a chip; None without such a table (310B, some boards)
    idle_cards: tuple[int, ...] = ()  #: cards that the table of processes calls free

    def processes_on(self, chip: Chip) -> tuple[Process, ...] | None:
        """The processes that hold memory of a chip; None where the table does not tell."""
        if self.processes is None or not chip.is_whole:
            return None
        on_card = [process for process in self.processes if process.card_id == chip.card_id]
        if not on_card and chip.card_id not in self.idle_cards:
            return None
        return tuple(process for process in on_card if process.chip_id == chip.chip_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class MappedChip:
    """A row of `npu-smi info -m`."""

    card_id: int
    chip_id: int
    logic_id: int | None  #: the device number of ACL; None for a card's controller
    physical_id: int | None = None
    name: str = ""  #: such as "Ascend 310P3", or "Mcu"

    @property
    def soc(self) -> str | None:
        """The chip as the compiler calls it: "Ascend310P3"."""
        return _soc(self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A card of `npu-smi info -l`."""

    card_id: int
    chip_count: int | None = None
    product: str | None = None
    serial: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """Keys and values that the tool prints of one thing: a card, a chip, a card's controller."""

    chip_id: int | None = None
    name: str | None = None  #: of a controller: "mcu"
    values: Mapping[str, str] = field(default_factory=dict)  #: as printed; keys without blanks before their unit

    def number(self, *keys: str) -> float | None:
        """The first of these values that is there and a number; the tool also writes NA, - or Failed."""
        for key in keys:
            if (value := self.values.get(key)) is not None:
                with suppress(ValueError):
                    return _number(value)
        return None

    @property
    def temperature_c(self) -> float | None:
        return self.number("Temperature(C)", "NPU Temperature(C)")

    @property
    def power_w(self) -> float | None:
        """What it draws; what it is rated at on a 310. On a 310P only the controller has it, for its whole card."""
        return self.number("NPU Real-time Power(W)", "Power Dissipation(W)", "Rated Power Dissipation(W)")

    @property
    def aicore_percent(self) -> float | None:
        return self.number("Aicore Usage Rate(%)")

    @property
    def memory_total_mb(self) -> float | None:
        return self.number("DDR Capacity(MB)", "Memory Capacity(MB)", "Capacity(MB)")

    @property
    def memory_percent(self) -> float | None:
        return self.number("DDR Usage Rate(%)", "Memory Usage Rate(%)")

    @property
    def hbm_total_mb(self) -> float | None:
        return self.number("HBM Capacity(MB)")

    @property
    def hbm_percent(self) -> float | None:
        return self.number("HBM Usage Rate(%)")

    @property
    def health(self) -> Health | None:
        """
        The state that `-t health` gives; None if this is no such list.

        Weaker than the table's: without an error code this list turns Warning, Alarm and Critical into OK.
        """
        text = self.values.get("Health Status", self.values.get("Health"))
        return None if text is None else _health(text)

    @property
    def error_codes(self) -> tuple[str, ...]:
        """Those of `-t health`, such as 80E3A203."""
        return tuple(code for code in self.values.get("Error Code", "").split() if code != "NA")


@dataclass(frozen=True, slots=True, kw_only=True)
class CardValues:
    """What `npu-smi info -t ... -i CARD` printed: board, common, health, memory, power, temp, usages and their like."""

    card_id: int | None  #: None where the list does not say: it answers `-c`
    card: Values  #: what belongs to no chip; everything, where it answers `-c`
    chips: tuple[Values, ...] = ()
    controllers: tuple[Values, ...] = ()

    @property
    def chip_count(self) -> int | None:
        """As the list says it; chips that do not know what was asked may be missing from `chips`."""
        count = self.card.number("Chip Count")
        return None if count is None else int(count)

    @property
    def power_w(self) -> float | None:
        """What the whole card draws, where it says so."""
        return next((each.power_w for each in (*self.controllers, self.card) if each.power_w is not None), None)


def parse_info(text: str) -> Info:
    """The table of `npu-smi info`. `DeviceError` if it is none, or a row of it cannot be read."""
    reader = _InfoReader()
    for line in _lines(text):
        row = line.strip()
        if row.startswith("+"):
            reader.line()
        elif row.startswith("|"):
            try:
                reader.row(row)
            except ValueError as exc:
                raise _unreadable("info", f"this row: {_quoted(row)} ({exc})") from exc
    try:
        found = reader.end()
    except ValueError as exc:
        raise _unreadable("info", f"a table with {exc}") from exc
    if not found.chips:
        raise _unreadable("info", _quoted(text))
    return found


def parse_mapping(text: str) -> tuple[MappedChip, ...]:
    """The rows of `npu-smi info -m`, controllers too; none only if the tool says that there is no card."""
    found: list[MappedChip] = []
    columns: list[str] | None = None
    for line in _lines(text):
        if columns is None:
            if line.split()[:2] == ["NPU", "ID"]:
                columns = re.split(r"\s{2,}", line.strip())
                if columns[-1] != "Chip Name" or not {"NPU ID", "Chip ID"} <= set(columns):
                    raise _unreadable("info -m", f"these columns: {_quoted(line)}")
        elif line.strip() and not line.lstrip().startswith("["):
            try:
                found.append(_mapped(columns, line))
            except ValueError as exc:
                raise _unreadable("info -m", f"this row: {_quoted(line)}") from exc
    if not found and not _says_none(text):
        raise _unreadable("info -m", _quoted(text))
    try:
        _once("chip", ((each.card_id, each.chip_id) for each in found))
        _once("logic id", (each.logic_id for each in found))
    except ValueError as exc:
        raise _unreadable("info -m", str(exc)) from exc
    return tuple(found)


def parse_cards(text: str) -> tuple[Card, ...]:
    """The cards of `npu-smi info -l`; none only if the tool says that there is none."""
    blocks: list[dict[str, str]] = []
    counts: dict[str, str] = {}
    for key, value in _pairs(text):
        if key == "NPU ID":
            blocks.append({})
        (blocks[-1] if blocks else counts)[key] = value
    if not blocks and _says_none(text):
        return ()
    try:
        expected = _whole(counts.get("Total Count") or counts.get("Card Count") or "")
        found = tuple(
            Card(
                card_id=_whole(block["NPU ID"]),
                chip_count=_whole(block["Chip Count"]) if "Chip Count" in block else None,
                product=block.get("Product Name") or None,
                serial=block.get("Serial Number") or None,
            )
            for block in blocks
        )
        _once("card", (card.card_id for card in found))
    except ValueError as exc:
        raise _unreadable("info -l", _quoted(text)) from exc
    if len(found) != expected:
        raise _unreadable("info -l", f"a count of {expected} and {len(found)} cards")
    return found


def parse_values(text: str) -> CardValues:
    """
    A list of `npu-smi info -t ...`: board, common, health, memory, power, temp, usages.

    Some lists begin a chip with its id, some end it with it: the first chip tells. A list without chip ids answers
    `-c`, or is about the card as a whole.
    """
    pairs = list(_pairs(text))
    if not pairs:
        raise _unreadable("info -t", _quoted(text))
    try:
        head: dict[str, str] = {}
        while pairs and pairs[0][0] in ("NPU ID", "Chip Count"):
            _put(head, *pairs.pop(0))
        if any(key == "NPU ID" for key, _ in pairs):
            raise ValueError("more than one card")
        card_id = _whole(head["NPU ID"]) if "NPU ID" in head else None
        if not any(_names(key, value) for key, value in pairs):
            blocks, rest = [], pairs
        elif _names(*pairs[0]):
            blocks, rest = _begun(pairs), []
        else:
            blocks, rest = _ended(pairs)
        for key, value in rest:
            _put(head, key, value)
        _once("chip", (block.chip_id for block in blocks))
    except ValueError as exc:
        raise _unreadable("info -t", f"a list with {exc}") from exc
    return CardValues(
        card_id=card_id,
        card=Values(values=head),
        chips=tuple(block for block in blocks if block.chip_id is not None and block.name is None),
        controllers=tuple(block for block in blocks if block.name is not None),
    )


def parse_processes(text: str, *, card_id: int | None = None, chip_id: int | None = None) -> tuple[Process, ...]:
    """The processes of `npu-smi info -t proc-mem -i CARD [-c CHIP]`. If it names its chips, then behind each."""
    found: list[Process] = []
    named, is_idle = 0, False
    for line in map(str.strip, _lines(text)):
        if match := _PROCESS.fullmatch(line):
            pid, name, memory = match.groups()
            found.append(Process(card_id=card_id, chip_id=chip_id, pid=int(pid), name=name, memory_mb=int(memory)))
        elif match := re.fullmatch(r"Chip ID\s*:\s*([0-9]{1,9})", line):
            found[named:] = [replace(each, chip_id=int(match[1])) for each in found[named:]]
            named = len(found)
        elif line.startswith("Process id"):
            raise _unreadable("info -t proc-mem", f"this row: {_quoted(line)}")
        is_idle |= line == "No process in device."
    if not found and not is_idle:
        raise _unreadable("info -t proc-mem", _quoted(text))
    return tuple(found)


def completed(info: Info, mapping: Sequence[MappedChip]) -> Info:
    """
    The table with what only `-m` tells: the logic ids of the 910 family; card and name of a chip without a first line.

    A chip without a second line stays half. `DeviceError` if the two contradict each other: cards came or went between.
    """
    by_place: dict[tuple[int | None, int | None], MappedChip] = {}
    by_logic: dict[int | None, MappedChip] = {}
    for each in mapping:
        if each.logic_id is not None:
            by_place[each.card_id, each.chip_id] = by_logic[each.logic_id] = each
    chips = []
    for chip in info.chips:
        row = by_place.get((chip.card_id, chip.chip_id)) if chip.is_whole else by_logic.get(chip.logic_id)
        chips.append(chip if row is None else _joined(chip, row))
    try:
        _once("chip", ((chip.card_id, chip.chip_id) for chip in chips if chip.is_whole))
    except ValueError as exc:
        raise _contradiction(str(exc)) from exc
    return replace(info, chips=tuple(chips))


def visible(value: str | None, logic_ids: Iterable[int]) -> dict[int, int]:
    """
    The devices a process can open: ACL's device number -> logic id.

    `value` is ASCEND_RT_VISIBLE_DEVICES, None if it is not set: then the two are the same. Set, it lists logic ids, and
    the process counts these from 0. By the vendor's description the runtime reads up to the first character that is
    neither digit nor comma, or the first id that is not there (so "1, 2" is device 1 alone), and supports rising ids
    only; `UsageError` for others, whose order would be a guess.
    """
    there = sorted(set(logic_ids))
    if value is None:
        return {logic_id: logic_id for logic_id in there}
    listed: list[int] = []
    for text in value.split(","):
        digits = re.split("[^0-9]", text, maxsplit=1)[0]
        if not 0 < len(digits) < 10 or int(digits) not in there:
            break
        listed.append(int(digits))
        if digits != text:
            break
    if any(after <= before for before, after in pairwise(listed)):
        raise UsageError(f"{VISIBLE}={value}: the runtime supports rising ids only. Write {_rising(listed)}")
    return dict(enumerate(listed))


def is_installed(command: str = COMMAND) -> bool:
    """Whether the tool is on this host, even if we may not run it: a host without it is not set up for NPUs."""
    return any(path.is_file() for path in _places(command))


def run(*arguments: str, timeout_s: float = TIMEOUT_S, command: str = COMMAND) -> str:
    """
    What `npu-smi ARGUMENTS` prints: `run("info", "-m")`. No shell is involved, and its language is English.

    `DeviceError` if it is not there, may not be run, does not end in time or reports a failure, as it does when a
    single card is broken, or another process or container holds them.
    """
    spoken = " ".join([COMMAND, *arguments])
    # The tool counts all devices whatever is visible to us, and the vendor rules out the two together.
    environment = {name: value for name, value in os.environ.items() if name != VISIBLE} | {"LC_ALL": "C"}
    # Each on a leash: a hanging tool does not outlive a killed worker.
    leash = [sys.executable, "-m", "farm.leash", str(os.getpid()), _located(command)]
    try:
        process = subprocess.Popen(
            [*leash, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
            cwd=ROOT,
        )
    except (OSError, ValueError) as exc:
        raise _untold(f"{spoken} could not be started: {exc}") from exc
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        stuck = "" if _killed(process) else f", nor when it was killed (process {process.pid})"
        raise _untold(f"{spoken} did not end within {timeout_s:g} s{stuck}: a card or the driver hangs") from None
    except BaseException:
        _killed(process)
        raise
    finally:
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
    if process.returncode == 0:
        return output.decode(errors="replace")
    # Its errors are on stdout; the loader's, if a library is missing, on stderr.
    said = _quoted((output if output.strip() else errors).decode(errors="replace"), last=True)
    raise _untold(f"{spoken} {_ending(process.returncode)} and said: {said}")


def read_info(*, timeout_s: float = TIMEOUT_S, command: str = COMMAND) -> Info:
    """The chips of this host, their logic ids looked up where the table has none (910 family, half chips)."""
    info = parse_info(run("info", timeout_s=timeout_s, command=command))
    if all(chip.is_whole and chip.logic_id is not None for chip in info.chips):
        return info
    return completed(info, parse_mapping(run("info", "-m", timeout_s=timeout_s, command=command)))


def _joined(chip: Chip, row: MappedChip) -> Chip:
    places = {name: getattr(chip, name) for name in ("card_id", "chip_id", "logic_id", "physical_id")}
    for name, place in places.items():
        mapped = getattr(row, name)
        if None not in (place, mapped) and place != mapped:
            raise _contradiction(f"{name} {place} and {mapped}")
        places[name] = mapped if place is None else place
    return replace(chip, **places, name=chip.name or row.name or None)


class _InfoReader:
    """The table's rows, one after the other. Raises `ValueError`."""

    def __init__(self) -> None:
        self._version: str | None = None
        self._driver: str | None = None
        self._part = "title"  # then "head", "chips", "processes"
        self._first: list[str] = []
        self._second: list[str] = []
        self._second_id: str | None = None
        self._half: dict[str, Any] | None = None
        self._chips: list[Chip] = []
        self._processes: list[Process] | None = None
        self._idle: list[int] = []

    def line(self) -> None:
        """A chip's two lines stand together: a half does not pair with one beyond a separator."""
        if self._half is not None:
            self._chips.append(Chip(**self._half))
            self._half = None

    def row(self, row: str) -> None:
        if len(row) < 2 or not row.endswith("|"):
            raise ValueError("it is cut off")
        cells = [" ".join(cell.split()) for cell in row[1:-1].split("|")]
        if title := re.fullmatch(r"npu-smi (\S+) Version: ?(\S*)", cells[0]):
            self._version, self._driver = title[1], title[2] or None
        elif cells[0].startswith("NPU ") and "Health" in cells:
            self.line()
            self._part, self._first = "head", _titles(cells[-1])
        elif self._part == "head" and cells[0].split()[:1] == ["Chip"] and "Bus-Id" in cells:
            words = cells[0].split()
            self._part, self._second = "chips", _titles(cells[-1])
            self._second_id = {"device": "logic_id", "phy-id": "physical_id"}.get(words[-1].lower())
        elif cells[0].startswith("NPU") and "Process id" in cells:
            self.line()
            # Whatever a newer table of processes looks like, it is no reason not to find the chips.
            known = [cell.lower() for cell in cells] == ["npu chip", "process id", "process name", "process memory(mb)"]
            self._part, self._processes = ("processes", self._processes or []) if known else ("unknown", None)
        elif self._part == "chips":
            self._chip(cells)
        elif self._part == "processes":
            self._process(row[1:-1].split("|"))
        elif self._part != "unknown":
            raise ValueError("it stands before the heads of the columns")

    def end(self) -> Info:
        self.line()
        _once("chip", ((chip.card_id, chip.chip_id) for chip in self._chips if chip.is_whole))
        _once("logic id", (chip.logic_id for chip in self._chips))
        return Info(
            version=self._version,
            driver=self._driver,
            chips=tuple(self._chips),
            processes=None if self._processes is None else tuple(self._processes),
            idle_cards=tuple(self._idle),
        )

    def _chip(self, cells: list[str]) -> None:
        if len(cells) != 3:
            raise ValueError(f"{len(cells)} cells instead of 3")
        ids, state, values = cells
        number, _, rest = ids.partition(" ")
        if state == "NA" or _BUS.fullmatch(state):
            second: dict[str, Any] = {"chip_id": _whole(number), "bus_id": None if state == "NA" else state}
            if rest and self._second_id:
                second[self._second_id] = _known(_whole(rest))
            second |= _columns(values, self._second)
            first, self._half = self._half or {}, None
            self._chips.append(Chip(**first, **second))
            return
        self.line()
        first = {"card_id": _whole(number), "name": rest or None, "health_text": state}
        self._half = first | _columns(values, self._first)

    def _process(self, cells: list[str]) -> None:
        assert self._processes is not None
        if idle := re.fullmatch(r"\s*No running processes found in NPU ([0-9]{1,9})\s*", cells[0]):
            self._idle.append(int(idle[1]))
            return
        if len(cells) < 4:
            raise ValueError(f"{len(cells)} cells instead of 4")
        # A process may well have "|" in its name.
        place, pid, *name, memory = cells
        card_id, _, chip_id = " ".join(place.split()).partition(" ")
        self._processes.append(
            Process(
                card_id=_whole(card_id),
                chip_id=_whole(chip_id),
                pid=_whole(pid.strip()),
                name="|".join(name).strip(),
                memory_mb=_whole(memory.strip()),
            )
        )


_BUS = re.compile(r"[0-9A-Fa-f]{4,8}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.[0-9A-Fa-f]{1,4}")
_PROCESS = re.compile(r"Process id:([0-9]{1,9})\s+Process name:(.*?)\s+Process memory\(MB\):([0-9]{1,18})")

#: Fields by the head of their column; "used/ total" where the head says Usage.
_FIELDS = {
    "power": ("power_w",),
    "temp": ("temperature_c",),
    "aicore": ("aicore_percent",),
    "hugepages-usage": ("hugepages_used", "hugepages_total"),
    "memory-usage": ("memory_used_mb", "memory_total_mb"),
    "hbm-usage": ("hbm_used_mb", "hbm_total_mb"),
}


def _titles(cell: str) -> list[str]:
    """The heads in a cell that holds several columns, without their units."""
    return [head.strip().lower() for head in re.findall(r"([^()]+)\([^()]*\)", cell)]


def _columns(cell: str, titles: Sequence[str]) -> dict[str, float | None]:
    """The fields of a cell that holds several columns; those we have no name for are read over."""
    tokens = cell.replace("/", " / ").split()
    found: dict[str, float | None] = {}
    numbers: list[float | None]
    for title in titles:
        if title.endswith("-usage"):
            part, tokens = tokens[:3], tokens[3:]
            if len(part) != 3 or part[1] != "/":
                raise ValueError(f"no used/ total for {title}")
            numbers = [None if each in ("NA", "-") else _known(_whole(each)) for each in part[::2]]
        else:
            part, tokens = tokens[:1], tokens[1:]
            numbers = [None if each in ("NA", "-") else _number(each) for each in part]
        found |= zip(_FIELDS.get(title, ()), numbers, strict=False)
    if tokens:
        raise ValueError("more values than columns")
    return found


def _mapped(columns: Sequence[str], line: str) -> MappedChip:
    cells = dict(zip(columns, line.split(maxsplit=len(columns) - 1), strict=False))
    if len(cells) < len(columns) - 1:
        raise ValueError("too few cells")

    def optional(column: str) -> int | None:
        return None if (cell := cells.get(column, "-")) == "-" else _known(_whole(cell))

    return MappedChip(
        card_id=_whole(cells["NPU ID"]),
        chip_id=_whole(cells["Chip ID"]),
        logic_id=optional("Chip Logic ID"),
        physical_id=optional("Chip Phy-ID"),
        name=" ".join(cells.get("Chip Name", "").split()),
    )


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    """The lines "key : value" of a text. Blanks before a key's unit vary with the version and are taken out."""
    for line in _lines(text):
        key, colon, value = line.partition(":")
        if colon and key.strip() and not key.lstrip().startswith("["):
            yield re.sub(r"\s*\(", "(", " ".join(key.split())), " ".join(value.split())


def _names(key: str, value: str) -> bool:
    """Whether a pair says whose values stand around it; chips have names too, in other lists."""
    return key == "Chip ID" or (key == "Chip Name" and value.lower() in _CONTROLLERS)


def _named(key: str, value: str, values: dict[str, str]) -> Values:
    chip_id, name = (_whole(value), None) if key == "Chip ID" else (None, value)
    return Values(chip_id=chip_id, name=name, values=values)


def _begun(pairs: Sequence[tuple[str, str]]) -> list[Values]:
    """Blocks that begin with whose they are."""
    found: list[Values] = []
    values: dict[str, str] = {}
    for key, value in pairs:
        if not _names(key, value):
            _put(values, key, value)
        elif found and not values and found[-1].name is None and key == "Chip Name":
            found[-1] = replace(found[-1], name=value)  # a controller, asked for by its number
        else:
            values = {}
            found.append(_named(key, value, values))
    return found


def _ended(pairs: Sequence[tuple[str, str]]) -> tuple[list[Values], list[tuple[str, str]]]:
    """Blocks that end with whose they are, and what stands behind the last."""
    found: list[Values] = []
    rest: list[tuple[str, str]] = []
    for key, value in pairs:
        if not _names(key, value):
            rest.append((key, value))
            continue
        values: dict[str, str] = {}
        for each in rest:
            _put(values, *each)
        found.append(_named(key, value, values))
        rest = []
    if rest:
        raise ValueError(f"values of nobody: {_quoted(rest[0][0])} after the last chip")
    return found, rest


def _put(values: dict[str, str], key: str, value: str) -> None:
    if key in values and values[key] != value:
        raise ValueError(f"two values of {_quoted(key)}")
    values[key] = value


def _lines(text: str) -> Iterator[str]:
    """Not `splitlines`: a process may have one of its stranger line ends in its name."""
    return (line.rstrip("\r") for line in text.split("\n"))


def _whole(text: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,18}", text):
        raise ValueError(f"{_quoted(text)} is no number")
    return int(text)


def _number(text: str) -> float:
    if not re.fullmatch(r"-?[0-9]{1,18}(\.[0-9]{1,9})?", text):
        raise ValueError(f"{_quoted(text)} is no number")
    return float(text) if "." in text else int(text)


def _known(number: int) -> int | None:
    """A count or an id below 0 is the tool's arithmetic on something it did not get."""
    return None if number < 0 else number


def _once(what: str, values: Iterable[object]) -> None:
    seen = set()
    for value in values:
        if value is not None and value in seen:
            raise ValueError(f"{what} {value} twice")
        seen.add(value)


def _health(text: str | None) -> Health:
    try:
        return Health(text)
    except ValueError:
        return Health.UNKNOWN


def _soc(name: str | None) -> str | None:
    bare = re.sub(r"^ascend", "", "".join((name or "").split()), flags=re.IGNORECASE)
    return f"Ascend{bare}" if bare else None


def _says_none(text: str) -> bool:
    return any(line.strip() == _NO_CARD for line in _lines(text))


def _rising(listed: Sequence[int]) -> str:
    return f"{VISIBLE}={','.join(map(str, sorted(set(listed))))}"


def _places(command: str) -> list[Path]:
    if os.sep in command:
        return [Path(command).absolute()]
    folders = [folder for folder in os.environ.get("PATH", os.defpath).split(os.pathsep) if folder]
    return [Path(folder, command).absolute() for folder in (*folders, *USUAL_PLACES)]


def _located(command: str) -> str:
    there = [path for path in _places(command) if path.is_file()]
    if not there:
        raise _untold(
            f"{command} is not installed: it is neither on PATH nor in {' or '.join(USUAL_PLACES)}. It comes with the "
            "NPU driver; a container must be given it"
        )
    for path in there:
        if found := shutil.which(str(path)):
            return found
    raise _untold(f"no permission to run {there[0]}: ask for the group of the NPU driver, or run as its user")


def _killed(process: subprocess.Popen[bytes]) -> bool:
    """End the tool and its children; False if it is still there."""
    if process.returncode is None:  # not reaped, so the number is still its own
        os.killpg(process.pid, SIGKILL)
    try:
        process.wait(_KILL_S)
    except subprocess.TimeoutExpired:
        return False
    return True


def _ending(returncode: int) -> str:
    if returncode >= 0:
        return f"ended with status {returncode}"
    with suppress(ValueError):
        return f"was killed by {Signals(-returncode).name}"
    return f"was killed by signal {-returncode}"


def _quoted(text: str, *, last: bool = False) -> str:
    """A text in one printable line of at most 200 characters: its first ones, or its last."""
    lines = [" ".join(line.split()) for line in text.split("\n") if line.strip()]
    line = "".join(each if each.isprintable() else "?" for each in " / ".join(lines))
    if len(line) > 200:
        line = f"...{line[-200:]}" if last else f"{line[:200]}..."
    return line or "nothing"


def _contradiction(what: str) -> DeviceError:
    return _untold(f"{COMMAND} info and {COMMAND} info -m, run one after the other, contradict each other: {what}")


def _unreadable(arguments: str, found: str) -> DeviceError:
    return _untold(f"{COMMAND} {arguments}: expected a layout that this version knows, found {found}")


def _untold(what: str) -> DeviceError:
    return DeviceError(
        f"{what}. That does not mean that there are no NPUs, only that they cannot be told: run {COMMAND} info by hand "
        "and see to the driver, or to the card it complains of"
    )
