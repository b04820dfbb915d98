"""
A stand-in for `npu-smi`: its texts, drawn from the parser's own records in every layout that is known, and an
executable that prints them. Widths are those of the published source.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from workers.npu_smi import Card, Chip, Info, MappedChip, Process

#: A chip that is well, on no card yet.
SOUND = Chip(
    name="310P3",
    health_text="OK",
    temperature_c=41,
    aicore_percent=0,
    hugepages_used=0,
    hugepages_total=15,
    memory_used_mb=1621,
    memory_total_mb=44280,
    bus_id="0000:01:00.0",
)


@dataclass(frozen=True)
class Layout:
    """How one kind of table looks. Cells are printf's."""

    name: str
    widths: tuple[int, int, int]
    heads: tuple[str, str]
    first: str
    second: str
    title: str | None = "| npu-smi %-40s Version: %-44s |"
    title_width: int = 104
    process_head: str | None = None
    process: str = ""
    has_power: bool = True
    has_hbm: bool = False
    id_field: str | None = "logic_id"  #: what stands beside the chip's id
    dashes_only: bool = False
    line_end: str = "\n"
    margin: str = ""

    def line(self, character: str) -> str:
        return "+" + "+".join(character * width for width in self.widths) + "+"

    def printed(self, info: Info) -> Info:
        """What of it this layout prints."""
        chips = [
            replace(
                chip,
                power_w=chip.power_w if self.has_power else None,
                hbm_used_mb=chip.hbm_used_mb if self.has_hbm else None,
                hbm_total_mb=chip.hbm_total_mb if self.has_hbm else None,
                logic_id=chip.logic_id if self.id_field == "logic_id" else None,
                physical_id=chip.physical_id if self.id_field == "physical_id" else None,
            )
            for chip in info.chips
        ]
        return Info(
            version=info.version if self.title else None,
            driver=info.driver if self.title else None,
            chips=tuple(chips),
            processes=info.processes if self.process_head else None,
            idle_cards=info.idle_cards if self.process_head else (),
        )

    def draw(self, info: Info) -> str:
        """The table; of a chip without health the second line alone, of one without a chip id the first."""
        info = self.printed(info)
        lines = []
        if self.title:
            lines += [f"+{'-' * self.title_width}+", self.title % (info.version, info.driver), self.line("-")]
        lines += [*self.heads, self.line("=")]
        for number, chip in enumerate(info.chips):
            if chip.health_text is not None:
                lines.append(self._first(chip))
            if chip.chip_id is not None:
                lines.append(self._second(chip))
            same_card = number + 1 < len(info.chips) and info.chips[number + 1].card_id == chip.card_id
            lines.append(self.line("-" if self.dashes_only or same_card else "="))
        if self.process_head and info.processes is not None:
            lines += [self.line("-"), self.process_head, self.line("=")]
            for card_id in info.idle_cards:
                text = f"| No running processes found in NPU {card_id}"
                lines += [f"{text:<{self.title_width}} |", self.line("=")]
            for process in info.processes:
                values = process.card_id, process.chip_id, process.pid, process.name, process.memory_mb
                lines.append(self.process % values)
            if info.processes:
                lines.append(self.line("="))
        return "".join(f"{self.margin}{line}{self.line_end}" for line in lines)

    def _first(self, chip: Chip) -> str:
        power = ("-" if self.has_hbm else "NA") if chip.power_w is None else f"{chip.power_w:.1f}"
        pages = chip.hugepages_used, chip.hugepages_total
        return self.first % (chip.card_id, chip.name or "", chip.health_text, power, chip.temperature_c, *pages)

    def _second(self, chip: Chip) -> str:
        ids = [chip.chip_id] if self.id_field is None else [chip.chip_id, getattr(chip, self.id_field)]
        used = "NA " if chip.memory_used_mb is None else chip.memory_used_mb
        values = [*ids, chip.bus_id or "NA", chip.aicore_percent, used, chip.memory_total_mb]
        return self.second % (*values, *([chip.hbm_used_mb, chip.hbm_total_mb] if self.has_hbm else []))


def _wide(left: str, middle: str, right: str) -> str:
    """The last cell of a head since 26.0."""
    return f"{left:<21}{middle:<24}{right:<24}|"


P310 = Layout(
    name="310P",
    widths=(31, 17, 54),
    heads=(
        "| NPU     Name                  | Health          | Power(W)     Temp(C)           Hugepages-Usage(page) |",
        "| Chip    Device                | Bus-Id          | AICore(%)    Memory-Usage(MB)                        |",
    ),
    first="| %-7s %-22s| %-15s | %-12s %-17s %-6s/ %-13s |",
    second="| %-7s %-22s| %-15s | %-12s %-5s/ %-32s |",
    process_head=(
        "| NPU     Chip                  | Process id      | Process name             | Process memory(MB)        |"
    ),
    process="| %-7s %-22s| %-15s | %-24s | %-25s |",
    has_power=False,
)
B310 = replace(P310, name="310B", has_power=True, process_head=None)
P910 = Layout(
    name="910",
    widths=(27, 15, 52),
    heads=(
        "| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|",
        "| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |",
    ),
    first="| %-5s %-20s| %-13s | %-11s %-17s %-5s/ %-14s|",
    second="| %-26s| %-13s | %-11s %-5s/ %-10s %-5s/ %-13s |",
    title="| npu-smi %-24s Version: %-52s |",
    title_width=96,
    process_head="| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |",
    process="| %-7s %-18s| %-13s | %-24s | %-24s|",
    has_hbm=True,
    id_field=None,
)
TWO_DIES = replace(
    P910,
    name="910, two dies",
    heads=(P910.heads[0], P910.heads[1].replace("Chip         ", "Chip  Phy-ID ")),
    second="| %-5s %-20s| %-13s | %-11s %-5s/ %-10s %-5s/ %-13s |",
    id_field="physical_id",
)
LAYOUTS = (
    P310,
    replace(P310, name="310", has_power=True),
    B310,
    replace(
        P310,
        name="310P of 22.0.4",
        heads=(
            P310.heads[0].replace("Temp(C)           Hugepages-Usage(page)", "Temp(C)     Hugepages-Usage(page)      "),
            P310.heads[1],
        ),
        process_head=None,
        dashes_only=True,
    ),
    replace(P310, name="310P, dashes only", dashes_only=True),
    replace(
        P310,
        name="310P of the guides",
        title=None,
        widths=(19, 17, 54),
        heads=tuple(head.replace("            |", "|", 1) for head in P310.heads),  # type: ignore[arg-type]
        first="| %-7s %-10s| %-15s | %-12s %-17s %-5s/ %-14s |",
        second="| %-7s %-10s| %-15s | %-12s %-5s/ %-32s |",
        process_head=None,
        has_power=True,
    ),
    replace(P310, name="310P, pasted", line_end="  \r\n", margin="    "),
    P910,
    TWO_DIES,
    replace(
        TWO_DIES,
        name="910 of 26.0",
        widths=(27, 15, 70),
        heads=(
            f"| NPU   Name                | Health        | {_wide('Power(W)', 'Temp(C)', 'Hugepages-Usage(page)')}",
            f"| Chip  Phy-ID              | Bus-Id        | {_wide('AICore(%)', 'Memory-Usage(MB)', 'HBM-Usage(MB)')}",
        ),
        first="| %-5s %-20s| %-13s | %-20s %-23s %-5s/ %-16s |",
        second="| %-5s %-20s| %-13s | %-20s %-5s/ %-16s %-5s/ %-16s |",
        title="| npu-smi %-35s Version: %-59s |",
        title_width=114,
        process_head=f"{(P910.process_head or '').rstrip('|'):<115}|",
        process="| %-7s %-18s| %-13s | %-24s | %-41s |",
    ),
)


def draw_mapping(rows: Iterable[MappedChip], *, physical: bool = False) -> str:
    """`npu-smi info -m`."""
    heads = ["NPU ID", "Chip ID", "Chip Logic ID", *(["Chip Phy-ID"] if physical else []), "Chip Name"]
    lines = [" ".join(f"{head:<30}" for head in heads)]
    for row in rows:
        ids: list[object] = [row.card_id, row.chip_id, "-" if row.logic_id is None else row.logic_id]
        if physical:
            ids.append("-" if row.physical_id is None else row.physical_id)
        lines.append(" ".join([*(f"{number:<30}" for number in ids), row.name]))
    return "".join(f"\t{line}\n" for line in lines)


def draw_values(*blocks: Mapping[str, object]) -> str:
    """Keys and values, a blank line between the blocks."""
    return "\n".join("".join(f"\t{key:<30} : {value}\n" for key, value in block.items()) for block in blocks)


def draw_cards(cards: Sequence[Card], *, count: str = "Total Count") -> str:
    """`npu-smi info -l`."""
    if not cards:
        return "There is no NPU card on this server.\n"
    blocks: list[dict[str, object]] = [{count: len(cards)}]
    for card in cards:
        known = {"Product Name": card.product, "Serial Number": card.serial, "Chip Count": card.chip_count}
        blocks.append({"NPU ID": card.card_id} | {key: value for key, value in known.items() if value is not None})
    return draw_values(*blocks)


def draw_processes(processes: Iterable[Process]) -> str:
    """`npu-smi info -t proc-mem -i CARD -c CHIP`."""
    lines = [
        f"Process id:{each.pid:<7} Process name:{each.name:<17} Process memory(MB):{each.memory_mb}"
        for each in processes
    ]
    return "".join(f"\t{line}\n" for line in lines or ["No process in device."])


def install(folder: Path, script: str) -> str:
    """An executable `npu-smi` in a folder; its path."""
    path = folder / "npu-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def answering(folder: Path, answers: Mapping[str, str]) -> str:
    """One that answers some arguments, such as "info -m", and fails at all others as the tool does; its path."""
    texts = folder / "answers"
    texts.mkdir()
    for arguments, text in answers.items():
        (texts / arguments).write_text(text)
    return install(folder, f'cat {shlex.quote(str(texts))}/"$*" 2>&- || {{ echo "Error parameter of $1"; exit 1; }}')
