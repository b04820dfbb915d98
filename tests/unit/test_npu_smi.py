"""
The tool's texts, and the tool itself, as a stand-in.

Captures are in golden/npu_smi. All else is drawn: records, printed in every layout, must come back as they were.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep

import psutil
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from farm.errors import DeviceError, UsageError
from tests.fake_npu_smi import (
    LAYOUTS,
    P310,
    P910,
    TWO_DIES,
    Layout,
    answering,
    draw_cards,
    draw_mapping,
    draw_processes,
    draw_values,
    install,
)
from workers import npu_smi
from workers.npu_smi import Card, Chip, Health, Info, MappedChip, Process

GOLDEN = Path(__file__).parents[1] / "golden" / "npu_smi"
ROOT = Path(__file__).parents[2]

DUO = Info(
    version=None,
    driver=None,
    chips=tuple(
        Chip(
            card_id=1,
            chip_id=number,
            logic_id=number,
            name="310P3",
            health_text="OK",
            temperature_c=62,
            aicore_percent=0,
            hugepages_used=7210,
            hugepages_total=7210,
            memory_used_mb=used,
            memory_total_mb=total,
            bus_id="0000:01:00.0",
        )
        for number, (used, total) in enumerate([(16302, 44280), (15543, 43693)])
    ),
    processes=(
        Process(card_id=1, chip_id=0, pid=3277562, name="mindie_llm_back", memory_mb=14513),
        Process(card_id=1, chip_id=1, pid=3277565, name="mindie_llm_back", memory_mb=14513),
    ),
    idle_cards=(2,),
)

ALARM = Chip(
    card_id=0,
    chip_id=0,
    logic_id=0,
    name="310B4",
    health_text="Alarm",
    power_w=0.0,
    temperature_c=65,
    aicore_percent=0,
    hugepages_used=15,
    hugepages_total=15,
    memory_used_mb=3628,
    memory_total_mb=15609,
)

MAPPED = (
    MappedChip(card_id=32896, chip_id=0, logic_id=0, name="Ascend 310P3"),
    MappedChip(card_id=32896, chip_id=1, logic_id=None, name="Mcu"),
)


def golden(name: str) -> str:
    return (GOLDEN / f"{name}.txt").read_text()


# ------------------------------------------------------------------ captures


def test_a_duo_with_processes_is_read_whole() -> None:
    assert npu_smi.parse_info(golden("info_duo")) == DUO


def test_a_chip_in_alarm_without_a_bus_or_a_table_of_processes_is_read_whole() -> None:
    found = npu_smi.parse_info(golden("info_310b_alarm"))

    assert found == Info(version=None, driver=None, chips=(ALARM,), processes=None)
    assert found.chips[0].health is Health.ALARM


def test_a_mapping_gives_the_logic_ids_and_the_controller() -> None:
    assert npu_smi.parse_mapping(golden("mapping_310p")) == MAPPED
    assert MAPPED[0].soc == "Ascend310P3"


def test_a_list_of_health_gives_the_state_and_its_codes() -> None:
    alarm, fine = (npu_smi.parse_values(golden(name)).card for name in ("health_alarm", "health_ok"))

    assert (alarm.health, alarm.error_codes) == (Health.ALARM, ("80E3A203",))
    assert (fine.health, fine.error_codes) == (Health.OK, ())


def test_the_drawings_are_the_captures_to_the_character() -> None:
    untitled = replace(P310, title=None)
    drawn = untitled.draw(DUO).splitlines()
    busy, idle = drawn[-3:-1], drawn[-5:-3]
    assert "\n".join([*drawn[:-5], *busy, drawn[-1], *idle, ""]) == golden("info_duo")
    power = replace(untitled, has_power=True)
    alone = Info(version=None, driver=None, chips=(ALARM,), processes=None)
    assert power.draw(alone) == golden("info_310b_alarm")
    assert draw_mapping(MAPPED).rstrip() == golden("mapping_310p").rstrip()


# ------------------------------------------------------------------ drawn tables

names = st.sampled_from(["310P3", "310P1", "310B4", "310", "910B3", "Ascend910", "310P3 Pro"])
versions = st.sampled_from(["22.0.4", "23.0.0", "24.1.0.1", "25.5.1", "26.0.rc2"])
texts = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=24).map(str.strip)
megabytes = st.integers(0, 131072)


@st.composite
def infos(draw: st.DrawFn) -> Info:
    """A host's table: cards with any numbers, one to four chips each, half ones among them, and their processes."""
    cards = draw(st.lists(st.integers(0, 40000), min_size=1, max_size=5, unique=True), label="cards")
    places = [(card, chip) for card in cards for chip in range(draw(st.integers(1, 4), label="chips"))]
    logic_ids = draw(st.permutations(range(len(places))), label="logic ids")
    chips = [draw(chips_at(card, chip, logic_id)) for (card, chip), logic_id in zip(places, logic_ids, strict=True)]
    busy = draw(st.lists(st.sampled_from(places), max_size=6), label="busy")
    processes = [
        Process(
            card_id=card,
            chip_id=chip,
            pid=draw(st.integers(1, 4194304)),
            name=draw(texts),
            memory_mb=draw(megabytes),
        )
        for card, chip in busy
    ]
    return Info(
        version=draw(versions),
        driver=draw(versions),
        chips=tuple(chips),
        processes=tuple(processes),
        idle_cards=tuple(card for card in cards if card not in {busy_card for busy_card, _ in busy}),
    )


@st.composite
def chips_at(draw: st.DrawFn, card_id: int, chip_id: int, logic_id: int) -> Chip:
    bus_id = draw(st.none() | st.just(f"0000:{card_id % 256:02X}:00.0"))
    chip = Chip(
        card_id=card_id,
        chip_id=chip_id,
        logic_id=logic_id,
        physical_id=logic_id + 100,
        name=draw(st.none() | names),
        health_text=draw(st.sampled_from([each.value for each in Health])),
        power_w=draw(st.none() | st.integers(0, 3100).map(lambda tenths: tenths / 10)),
        temperature_c=draw(st.integers(-20, 110)),
        aicore_percent=draw(st.integers(0, 100)),
        hugepages_used=draw(st.integers(0, 20000)),
        hugepages_total=draw(st.integers(0, 20000)),
        memory_used_mb=draw(megabytes if bus_id else st.none() | megabytes),
        memory_total_mb=draw(megabytes),
        hbm_used_mb=draw(megabytes),
        hbm_total_mb=draw(megabytes),
        bus_id=bus_id,
    )
    missing = draw(st.sampled_from(["", "", "", "", "first", "second"]))
    if missing == "first":
        first = ("card_id", "name", "health_text", "power_w", "temperature_c", "hugepages_used", "hugepages_total")
        return replace(chip, **dict.fromkeys(first))
    if missing == "second":
        return Chip(
            card_id=chip.card_id,
            name=chip.name,
            health_text=chip.health_text,
            power_w=chip.power_w,
            temperature_c=chip.temperature_c,
            hugepages_used=chip.hugepages_used,
            hugepages_total=chip.hugepages_total,
        )
    return chip


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@settings(deadline=None, max_examples=60, derandomize=True)
@given(info=infos())
def test_what_is_drawn_comes_back_in_every_layout(layout: Layout, info: Info) -> None:
    assert npu_smi.parse_info(layout.draw(info)) == layout.printed(info)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_every_line_of_a_drawing_is_as_wide_as_its_border(layout: Layout) -> None:
    alone = replace(ALARM, logic_id=0, physical_id=0, hbm_used_mb=1, hbm_total_mb=2, bus_id="0000:01:00.0")
    drawn = layout.draw(replace(DUO, version="25.5.1", driver="25.5.1", chips=(alone,)))

    assert len({len(line) for line in drawn.split(layout.line_end) if line}) == 1


def whole() -> Chip:
    return DUO.chips[0]


def read_back(*chips: Chip, layout: Layout = P310) -> tuple[Chip, ...]:
    return npu_smi.parse_info(layout.draw(replace(DUO, version="1", driver="1", chips=chips))).chips


def test_halves_of_two_chips_are_not_taken_for_one() -> None:
    one, other = whole(), DUO.chips[1]
    drawn = P310.draw(replace(DUO, version="1", driver="1", chips=(one, other))).splitlines()
    rows = [number for number, line in enumerate(drawn) if "310P3" in line or "0000:01:00.0" in line]
    without = [line for number, line in enumerate(drawn) if number not in (rows[1], rows[2])]

    found = npu_smi.parse_info("\n".join(without)).chips

    assert [(chip.card_id, chip.chip_id, chip.logic_id) for chip in found] == [(1, None, None), (None, 1, 1)]
    assert not any(chip.is_whole for chip in found)
    assert [chip.health for chip in found] == [Health.UNKNOWN, Health.UNKNOWN]


def test_a_first_line_without_its_second_does_not_take_the_next_ones() -> None:
    *heads, first, second, _, other_first, other_second = golden("info_duo").splitlines()[:8]
    there = first.replace("| 1  ", "| 9  ")

    for between in ([], heads[:2]):
        text = "\n".join([*heads, there, *between, other_first, other_second])
        chips = npu_smi.parse_info(text).chips
        assert [(chip.card_id, chip.chip_id) for chip in chips] == [(9, None), (1, 1)]

    text = "\n".join([*heads, there, *heads[:2], second])
    assert [chip.card_id for chip in npu_smi.parse_info(text).chips] == [9, None]


@pytest.mark.parametrize(
    ("change", "health"),
    [
        ({}, Health.OK),
        ({"memory_total_mb": 0, "memory_used_mb": 0}, Health.UNKNOWN),
        ({"temperature_c": 0, "name": None}, Health.UNKNOWN),
        ({"temperature_c": 0}, Health.OK),
        ({"name": None}, Health.OK),
        ({"health_text": "Alarm", "memory_total_mb": 0}, Health.ALARM),
        ({"health_text": "Warning"}, Health.WARNING),
        ({"health_text": "Critical"}, Health.CRITICAL),
        ({"health_text": "UNKNOWN"}, Health.UNKNOWN),
        ({"health_text": "Splendid"}, Health.UNKNOWN),
    ],
    ids=str,
)
def test_health_is_believed_only_from_a_chip_that_answered(change: dict[str, object], health: Health) -> None:
    chip = replace(whole(), **change)  # type: ignore[arg-type]

    assert read_back(chip) == (chip,)
    assert chip.health is health


def test_a_chip_with_nothing_but_hbm_is_believed_too() -> None:
    chip = replace(whole(), memory_used_mb=0, memory_total_mb=0, hbm_used_mb=3397, hbm_total_mb=65536)

    assert read_back(chip, layout=P910)[0].health is Health.OK


def test_a_used_memory_below_zero_is_unknown() -> None:
    assert read_back(replace(whole(), memory_used_mb=-5))[0].memory_used_mb is None


@pytest.mark.parametrize("name", ["310P3", "Ascend 310P3", "Ascend310P3"])
def test_the_soc_is_what_the_compiler_calls_the_chip(name: str) -> None:
    assert Chip(name=name).soc == "Ascend310P3"
    assert Chip().soc is None


def test_processes_are_found_by_card_and_chip() -> None:
    found = npu_smi.parse_info(golden("info_duo"))

    assert [found.processes_on(chip) for chip in found.chips] == [DUO.processes[:1], DUO.processes[1:]]  # type: ignore[index]
    assert found.processes_on(replace(whole(), card_id=2)) == ()
    assert found.processes_on(replace(whole(), chip_id=2)) == ()  # others of its card are told
    assert found.processes_on(replace(whole(), card_id=3)) is None
    assert npu_smi.parse_info(golden("info_310b_alarm")).processes_on(ALARM) is None


@pytest.mark.parametrize(
    "name", ["", "a|b", "  ", "| |", "a  b c", "a\x0bb\u2028c", "No running processes found in NPU 1"]
)
def test_a_process_may_have_any_name(name: str) -> None:
    process = Process(card_id=1, chip_id=0, pid=7, name=name.strip(), memory_mb=1)
    drawn = P310.draw(replace(DUO, version="1", driver="1", processes=(process,)))

    assert npu_smi.parse_info(drawn).processes == (process,)


def test_a_table_of_processes_of_another_kind_does_not_hide_the_chips() -> None:
    text = golden("info_duo").replace("NPU     Chip  ", "NPU     Die   ")

    found = npu_smi.parse_info(text)

    assert (found.chips, found.processes) == (DUO.chips, None)


def test_columns_that_are_not_known_are_read_over() -> None:
    text = golden("info_310b_alarm").replace("Temp(C)          ", "Temp(C)  Fan(%)  ").replace("  65   ", "  65  7")

    assert npu_smi.parse_info(text).chips == (ALARM,)


def test_what_stands_around_the_table_is_read_over() -> None:
    warning = "[WARNING]The driver package may not be completely installed, which may cause function abnormal.\n"

    assert npu_smi.parse_info(f"$ npu-smi info\n{golden('info_duo')}{warning}") == DUO


# ------------------------------------------------------------------ tables that tell nothing

ERRORS = [
    "",
    "dcmi module initialize failed. ret is -8005\n",
    "dcmi model initialized failed, because the device is used. ret is -8020\n",
    "dcmi model initialized failed\n",
    "Failed to get device type.\n",
    "Failed to query card chip total info.\n",
    "There is no NPU card on this server.\n",
]


@pytest.mark.parametrize("text", ERRORS)
def test_a_text_without_a_table_is_an_error_and_never_no_cards(text: str) -> None:
    with pytest.raises(DeviceError, match="does not mean that there are no NPUs") as error:
        npu_smi.parse_info(text)

    assert (text.strip() or "found nothing") in str(error.value)


def broken(old: str, new: str) -> str:
    text = golden("info_duo")
    assert old in text
    return text.replace(old, new, 1)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("\n".join(golden("info_duo").splitlines()[:3]), "found "),
        ("\n".join(golden("info_duo").splitlines()[3:]), "before the heads"),
        (golden("info_duo") * 2, "chip \\(1, 0\\) twice"),
        (broken("| 1       1  ", "| 1       0  "), "logic id 0 twice"),
        (broken("16302/ 44280", "16302  44280"), "no used/ total for memory-usage"),
        (broken("16302/ 44280", "16302/ 44x80"), "44x80 is no number"),
        (broken("16302/ 44280", "16302/ 4428٣"), "4428٣ is no number"),
        (broken("16302/ 44280", "16302/ 44280 9"), "more values than columns"),
        (broken("NA           62 ", "NA           6²"), "6² is no number"),
        (broken("7210  / 7210          |", "7210  / 7210"), "cut off"),
        (broken("310P3                 | OK", "310P3 | x             | OK"), "4 cells instead of 3"),
        (broken("| 3277562 ", "| 32775x2 "), "32775x2 is no number"),
        (
            broken("| mindie_llm_back          | 14513  ", "  mindie_llm_back            14513  "),
            "2 cells instead of 4",
        ),
    ],
)
def test_a_row_that_cannot_be_read_is_named(text: str, complaint: str) -> None:
    with pytest.raises(DeviceError, match=complaint):
        npu_smi.parse_info(text)


# ------------------------------------------------------------------ other lists


@st.composite
def mappings(draw: st.DrawFn) -> tuple[MappedChip, ...]:
    rows: list[MappedChip] = []
    cards = draw(st.lists(st.integers(0, 40000), min_size=1, max_size=5, unique=True))
    for card in cards:
        chips = draw(st.integers(1, 3))
        for chip in range(chips):
            name = f"Ascend {draw(names)}"
            rows.append(MappedChip(card_id=card, chip_id=chip, logic_id=len(rows), physical_id=len(rows), name=name))
        if draw(st.booleans()):
            rows.append(MappedChip(card_id=card, chip_id=chips, logic_id=None, physical_id=None, name="Mcu"))
    return tuple(rows)


@pytest.mark.parametrize("physical", [False, True])
@settings(deadline=None, max_examples=50, derandomize=True)
@given(rows=mappings())
def test_a_drawn_mapping_comes_back(rows: tuple[MappedChip, ...], physical: bool) -> None:
    expected = rows if physical else tuple(replace(row, physical_id=None) for row in rows)

    assert npu_smi.parse_mapping(draw_mapping(rows, physical=physical)) == expected


@pytest.mark.parametrize("text", [each for each in ERRORS if "no NPU card" not in each])
def test_a_mapping_that_is_none_is_an_error(text: str) -> None:
    with pytest.raises(DeviceError, match="cannot be told"):
        npu_smi.parse_mapping(text)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("Chip Name", "Chip Nick", "these columns"),
        ("32896", "3289x", "this row"),
        ("\t32896                          1 ", "\t32896                          0 ", r"chip \(32896, 0\) twice"),
        ("-                              Mcu", "0                              Mcu", "logic id 0 twice"),
    ],
)
def test_a_mapping_with_a_row_that_cannot_be_read_is_an_error(old: str, new: str, complaint: str) -> None:
    assert old in golden("mapping_310p")
    with pytest.raises(DeviceError, match=complaint):
        npu_smi.parse_mapping(golden("mapping_310p").replace(old, new, 1))


def test_a_warning_behind_a_mapping_is_read_over() -> None:
    warning = "[WARNING]The driver package may not be completely installed, which may cause function abnormal.\n"

    assert npu_smi.parse_mapping(golden("mapping_310p") + warning) == MAPPED


def test_only_the_tools_own_word_makes_a_host_without_cards() -> None:
    text = draw_cards([])

    assert (npu_smi.parse_mapping(text), npu_smi.parse_cards(text)) == ((), ())


cards = st.builds(
    Card,
    card_id=st.integers(0, 40000),
    chip_count=st.integers(1, 4),
    product=st.none() | st.just("Atlas 300I Duo"),
    serial=st.none() | st.just("2102312PMJ10M1000001"),
)


@pytest.mark.parametrize("count", ["Total Count", "Card Count"])
@settings(deadline=None, max_examples=30, derandomize=True)
@given(listed=st.lists(cards, max_size=8, unique_by=lambda card: card.card_id))
def test_a_drawn_list_of_cards_comes_back(listed: list[Card], count: str) -> None:
    assert npu_smi.parse_cards(draw_cards(listed, count=count)) == tuple(listed)


def test_a_list_of_cards_that_is_cut_off_is_an_error() -> None:
    text = draw_cards([Card(card_id=0, chip_count=1), Card(card_id=32, chip_count=1)])

    with pytest.raises(DeviceError, match="a count of 2 and 1 cards"):
        npu_smi.parse_cards(text[: text.index("NPU ID", text.index("NPU ID") + 1)])


@pytest.mark.parametrize("text", [*ERRORS[:-1], "NPU ID : x\nTotal Count : 1\n", "Total Count : 1\nNPU ID : x\n"])
def test_a_list_of_cards_that_is_none_is_an_error(text: str) -> None:
    with pytest.raises(DeviceError, match="cannot be told"):
        npu_smi.parse_cards(text)


HEAD: dict[str, object] = {"NPU ID": 2944, "Chip Count": 2}
USAGES: list[dict[str, object]] = [
    {
        "DDR Capacity(MB)": capacity,
        "DDR Usage Rate(%)": 2,
        "DDR Hugepages Total(page)": 0,
        "DDR Hugepages Usage Rate(%)": 0,
        "Aicore Usage Rate(%)": 7 + chip,
        "Aicpu Usage Rate(%)": 0,
        "DVPP VDEC Usage Rate(%)": 0,
        "Chip ID": chip,
    }
    for chip, capacity in enumerate([44278, 43693])
]
CONTROLLER: dict[str, object] = {
    "Chip Name": "mcu",
    "Temperature(C)": 48,
    "NPU Real-time Power(W)": 42.8,
}


def reversed_block(block: dict[str, object]) -> dict[str, object]:
    return dict(reversed(block.items()))


def test_usages_end_a_chip_with_its_id() -> None:
    found = npu_smi.parse_values(draw_values(HEAD, *USAGES))

    assert (found.card_id, found.chip_count) == (2944, 2)
    assert [(chip.chip_id, chip.memory_total_mb, chip.aicore_percent) for chip in found.chips] == [
        (0, 44278, 7),
        (1, 43693, 8),
    ]
    assert found.chips[1].values["DVPP VDEC Usage Rate(%)"] == "0"


def test_common_begins_a_chip_with_its_id_and_has_the_cards_power_in_its_controller() -> None:
    chips: list[dict[str, object]] = [
        {"Chip ID": chip, "Memory Usage Rate(%)": 2, "Aicore Usage Rate(%)": 0, "Temperature(C)": 45 + chip}
        for chip in range(2)
    ]
    found = npu_smi.parse_values(draw_values(HEAD, *chips, CONTROLLER))

    assert [(chip.chip_id, chip.temperature_c, chip.power_w) for chip in found.chips] == [(0, 45, None), (1, 46, None)]
    assert [(each.name, each.temperature_c) for each in found.controllers] == [("mcu", 48)]
    assert found.power_w == 42.8
    assert found.chips[0].memory_percent == 2


def test_blank_lines_are_not_needed_to_tell_chips_apart() -> None:
    for blocks in ([HEAD, *USAGES], [HEAD, *map(reversed_block, USAGES), CONTROLLER]):
        text = draw_values(*blocks)

        assert npu_smi.parse_values(text.replace("\n\n", "\n")) == npu_smi.parse_values(text)


@pytest.mark.parametrize("label", ["Power Dissipation(W)", "Rated Power Dissipation(W)", "NPU Real-time Power(W)"])
def test_power_has_three_names(label: str) -> None:
    found = npu_smi.parse_values(draw_values({"NPU ID": 5, "Chip Count": 1}, {label: 42.9, "Chip Name": "MCU"}))

    assert found.power_w == 42.9
    assert (found.chips, [each.name for each in found.controllers]) == ((), ["MCU"])


@pytest.mark.parametrize("label", ["NPU Temperature (C)", "Temperature (C)", "Temperature(C)"])
def test_temperature_has_three_names(label: str) -> None:
    found = npu_smi.parse_values(draw_values({"NPU ID": 5, "Chip Count": 1}, {label: -3, "Chip ID": 0}))

    assert [chip.temperature_c for chip in found.chips] == [-3]


def test_a_list_about_one_chip_has_its_values_and_no_chips() -> None:
    found = npu_smi.parse_values(
        draw_values({"DDR Capacity(MB)": 21534, "HBM Capacity(MB)": 65536, "HBM Usage Rate(%)": 3})
    )

    assert (found.card_id, found.chips, found.card.memory_total_mb) == (None, (), 21534)
    assert (found.card.hbm_total_mb, found.card.hbm_percent, found.card.health) == (65536, 3, None)


def test_a_board_is_read_with_the_colons_in_its_values() -> None:
    board = {"NPU ID": 4, "Software Version": "25.5.1", "Compatibility": "OK", "PCIe Bus Info": "0000:81:00.0"}
    found = npu_smi.parse_values(draw_values({**board, "Slot ID": 3, "Chip Count": 1}))

    assert found.card_id == 4
    assert found.card.values["PCIe Bus Info"] == "0000:81:00.0"
    assert (found.card.values["Software Version"], found.card.values["Compatibility"]) == ("25.5.1", "OK")
    assert found.chip_count == 1


def test_a_chip_asked_for_its_board_keeps_its_name_and_a_controller_is_one() -> None:
    chip = npu_smi.parse_values(draw_values({"NPU ID": 4, "Chip ID": 0, "Chip Type": "Ascend", "Chip Name": "310P3"}))
    controller = npu_smi.parse_values(draw_values({"NPU ID": 4, "Chip ID": 1, "Chip Name": "mcu", "Board ID": "0x60"}))

    assert [each.values["Chip Name"] for each in chip.chips] == ["310P3"]
    assert controller.chips == ()
    assert [(each.chip_id, each.values) for each in controller.controllers] == [(1, {"Board ID": "0x60"})]


@pytest.mark.parametrize("value", ["NA", "-", "Failed", "", "1e3", "٣", "9" * 30])
def test_a_value_that_is_no_number_is_unknown(value: str) -> None:
    assert npu_smi.parse_values(draw_values({"Temperature(C)": value})).card.temperature_c is None


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        *((text, "cannot be told") for text in ERRORS),
        (draw_values(HEAD, USAGES[0], {"DDR Capacity(MB)": 1}), "after the last chip"),
        (draw_values(HEAD, USAGES[0], USAGES[0]), "chip 0 twice"),
        (draw_values(HEAD, {"DDR Capacity(MB)": 1}, USAGES[0]), "two values of DDR Capacity"),
        (draw_values(HEAD, USAGES[0], {"NPU ID": 7}, USAGES[1]), "more than one card"),
        (draw_values({"NPU ID": "x"}), "x is no number"),
        (draw_values(HEAD, {"Chip ID": "x"}), "x is no number"),
    ],
)
def test_a_list_that_cannot_be_read_is_an_error(text: str, complaint: str) -> None:
    with pytest.raises(DeviceError, match=complaint):
        npu_smi.parse_values(text)


process_names = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=20).map(str.strip)
processes = st.builds(
    Process,
    card_id=st.just(5),
    chip_id=st.just(1),
    pid=st.integers(1, 4194304),
    name=process_names,
    memory_mb=megabytes,
)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(listed=st.lists(processes, max_size=6))
def test_a_drawn_list_of_processes_comes_back(listed: list[Process]) -> None:
    assert npu_smi.parse_processes(draw_processes(listed), card_id=5, chip_id=1) == tuple(listed)


def test_a_list_of_processes_of_a_whole_card_names_the_chip_behind_them() -> None:
    one = Process(card_id=5, chip_id=0, pid=11, name="one", memory_mb=1)
    other = replace(one, chip_id=1, pid=12)
    text = "\n".join([draw_values({"NPU ID": 5, "Chip Count": 3}),
                      draw_processes([one]), draw_values({"Chip ID": 0}),
                      draw_processes([other]), draw_values({"Chip ID": 1}),
                      draw_processes([]), draw_values({"Chip ID": 2})])  # fmt: skip

    assert npu_smi.parse_processes(text, card_id=5) == (one, other)


@pytest.mark.parametrize(
    "text",
    [
        *ERRORS,
        f"{draw_processes(DUO.processes or ())}Process id:x Process name:y Process memory(MB):1",
        "Chip ID : 0",
    ],
)
def test_a_list_of_processes_that_is_none_is_an_error(text: str) -> None:
    with pytest.raises(DeviceError, match="cannot be told"):
        npu_smi.parse_processes(text)


# ------------------------------------------------------------------ damaged texts

PARSERS: tuple[Callable[[str], object], ...] = (
    npu_smi.parse_info,
    npu_smi.parse_mapping,
    npu_smi.parse_cards,
    npu_smi.parse_values,
    npu_smi.parse_processes,
)
UNDAMAGED = [
    *(path.read_text() for path in sorted(GOLDEN.glob("*.txt"))),
    *(layout.draw(replace(DUO, version="1", driver="1")) for layout in (P310, P910, TWO_DIES)),
    draw_values(HEAD, *USAGES),
    draw_values(HEAD, *map(reversed_block, USAGES), CONTROLLER),
    draw_cards([Card(card_id=0, chip_count=1, product="Atlas 300I Pro"), Card(card_id=32, chip_count=2)]),
    draw_processes(DUO.processes or ()),
]
pieces = st.sampled_from(
    [
        "|",
        "+",
        "/",
        ":",
        "-",
        "NA",
        "0",
        "-1",
        "9" * 5000,
        "\n",
        "\r",
        "\t",
        "\x0b",
        "\x00",
        "\u2028",
        "²",
        "\ud800",
        "OK",
    ]
) | st.text(max_size=5)


@st.composite
def damaged(draw: st.DrawFn) -> str:
    text = draw(st.sampled_from(UNDAMAGED))
    for _ in range(draw(st.integers(0, 6))):
        lines = text.split("\n")
        here, there = (draw(st.integers(0, max(len(lines) - 1, 0))) for _ in range(2))
        at = draw(st.integers(0, len(text)))
        match draw(st.sampled_from(["cut", "insert", "remove", "drop line", "double line", "swap lines", "splice"])):
            case "cut":
                text = text[:at]
            case "insert":
                text = text[:at] + draw(pieces) + text[at:]
            case "remove":
                text = text[:at] + text[at + draw(st.integers(1, 40)) :]
            case "drop line":
                text = "\n".join(lines[:here] + lines[here + 1 :])
            case "double line":
                text = "\n".join([*lines[:here], lines[here], *lines[here:]])
            case "swap lines":
                lines[here], lines[there] = lines[there], lines[here]
                text = "\n".join(lines)
            case "splice":
                text = text[:at] + draw(st.sampled_from(UNDAMAGED))
    return text


@settings(deadline=None, max_examples=1500)
@given(text=damaged() | st.text())
@example("")
@example("|\n||\n|||\n+|+")
def test_a_damaged_text_is_read_or_refused_and_nothing_else(text: str) -> None:
    for parse in PARSERS:
        said = ""
        try:
            parse(text)
        except DeviceError as exc:
            said = str(exc)
        assert "\n" not in said
        assert len(said) < 1000


@settings(deadline=None, max_examples=500)
@given(text=damaged())
def test_a_damaged_table_never_makes_a_host_without_cards_or_a_chip_twice(text: str) -> None:
    try:
        found = npu_smi.parse_info(text)
    except DeviceError:
        return
    places = [(chip.card_id, chip.chip_id) for chip in found.chips if chip.is_whole]
    logic_ids = [chip.logic_id for chip in found.chips if chip.logic_id is not None]
    assert found.chips
    assert len(set(places)) == len(places)
    assert len(set(logic_ids)) == len(logic_ids)


# ------------------------------------------------------------------ logic ids


def test_the_mapping_gives_the_logic_ids_that_a_table_has_not() -> None:
    one = replace(whole(), logic_id=None)
    other = replace(one, chip_id=1)
    rows = [MappedChip(card_id=1, chip_id=chip, logic_id=5 - chip, physical_id=9 - chip) for chip in range(2)]

    found = npu_smi.completed(
        replace(DUO, chips=(one, other)), [*rows, MappedChip(card_id=1, chip_id=2, logic_id=None)]
    )

    assert [(chip.logic_id, chip.physical_id, chip.name) for chip in found.chips] == [(5, 9, "310P3"), (4, 8, "310P3")]


def test_the_mapping_gives_card_and_name_of_a_chip_whose_health_was_not_printed() -> None:
    half = Chip(chip_id=1, logic_id=1, memory_total_mb=43693)
    row = MappedChip(card_id=1, chip_id=1, logic_id=1, name="Ascend 310P3")

    [found] = npu_smi.completed(replace(DUO, chips=(half,)), [row]).chips

    assert (found.card_id, found.name, found.soc, found.is_whole) == (1, "Ascend 310P3", "Ascend310P3", True)
    assert found.health is Health.UNKNOWN


def test_the_mapping_does_not_guess_a_chip_whose_logic_id_was_not_found() -> None:
    half = Chip(card_id=1, name="310P3", health_text="OK", temperature_c=40)

    [found] = npu_smi.completed(replace(DUO, chips=(half,)), [MappedChip(card_id=1, chip_id=0, logic_id=0)]).chips

    assert found == half


@pytest.mark.parametrize(
    "rows",
    [
        [MappedChip(card_id=1, chip_id=0, logic_id=3)],
        [MappedChip(card_id=1, chip_id=0, logic_id=0, physical_id=7)],
        [MappedChip(card_id=1, chip_id=1, logic_id=4)],
    ],
)
def test_a_table_and_a_mapping_that_contradict_each_other_are_an_error(rows: list[MappedChip]) -> None:
    chips = (replace(whole(), physical_id=0), Chip(chip_id=0, logic_id=4))

    with pytest.raises(DeviceError, match="contradict each other"):
        npu_smi.completed(replace(DUO, chips=chips), rows)


@pytest.mark.parametrize(
    ("value", "devices"),
    [
        (None, {0: 0, 1: 1, 2: 2, 3: 3}),
        ("1", {0: 1}),
        ("1,2,3", {0: 1, 1: 2, 2: 3}),
        ("0,3", {0: 0, 1: 3}),
        ("1, 2,3", {0: 1}),
        ("1,3,8", {0: 1, 1: 3}),
        ("1,2,-1,3", {0: 1, 1: 2}),
        ("1-3", {0: 1}),
        ("1x,2", {0: 1}),
        ("2;3", {0: 2}),
        ("", {}),
        (" 1", {}),
        ("8,1", {}),
        ("1,", {0: 1}),
        ("9" * 5000, {}),
        ("٣", {}),
    ],
)
def test_a_process_counts_the_devices_it_is_shown_from_zero(value: str | None, devices: dict[int, int]) -> None:
    assert npu_smi.visible(value, [3, 0, 1, 2]) == devices


def test_a_device_keeps_its_number_where_another_is_missing() -> None:
    assert npu_smi.visible(None, [0, 2]) == {0: 0, 2: 2}


@pytest.mark.parametrize("value", ["3,2,1", "0,1,1", "1,0,x"])
def test_an_order_the_runtime_does_not_support_is_refused_with_the_one_it_does(value: str) -> None:
    with pytest.raises(UsageError, match=r"Write ASCEND_RT_VISIBLE_DEVICES=[0-9](,[0-9])*$") as error:
        npu_smi.visible(value, range(4))

    assert npu_smi.visible(str(error.value).rpartition("=")[2], range(4))


# ------------------------------------------------------------------ the tool


def test_the_tool_is_called_and_its_table_read(tmp_path: Path) -> None:
    command = answering(tmp_path, {"info": golden("info_duo")})

    assert npu_smi.read_info(command=command) == DUO


def test_the_mapping_is_asked_for_where_the_table_has_no_logic_ids(tmp_path: Path) -> None:
    chip = replace(whole(), hbm_used_mb=1, hbm_total_mb=2)
    table = P910.draw(replace(DUO, version="1", driver="1", chips=(chip,)))
    rows = draw_mapping([MappedChip(card_id=1, chip_id=0, logic_id=6, name="Ascend 910B3")])
    command = answering(tmp_path, {"info": table, "info -m": rows})

    assert [chip.logic_id for chip in npu_smi.read_info(command=command).chips] == [6]


def test_the_tool_is_found_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(tmp_path, {"info": golden("info_duo")})
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    assert npu_smi.is_installed()
    assert npu_smi.read_info() == DUO


def test_no_shell_sees_the_arguments(tmp_path: Path) -> None:
    command = install(tmp_path, """printf '%s\\n' "$@" """)

    assert npu_smi.run("info", "; echo $(id) *", "", command=command) == "info\n; echo $(id) *\n\n"


def test_the_tool_speaks_english_and_counts_all_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/driver/lib64")
    command = install(tmp_path, 'echo "$LC_ALL $ASCEND_RT_VISIBLE_DEVICES $LD_LIBRARY_PATH"; cat')

    assert npu_smi.run(command=command) == "C  /driver/lib64\n"


def test_bytes_that_are_no_text_do_not_stop_the_reading(tmp_path: Path) -> None:
    command = install(tmp_path, r"printf 'a\377b'")

    assert npu_smi.run("info", command=command) == "a\ufffdb"


def test_a_missing_tool_is_cannot_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    assert not npu_smi.is_installed("npu-smi-of-nobody")
    for command in ("npu-smi-of-nobody", str(tmp_path / "npu-smi")):
        with pytest.raises(DeviceError, match=r"not installed.*does not mean that there are no NPUs"):
            npu_smi.read_info(command=command)


def test_a_tool_that_may_not_be_run_is_cannot_tell(tmp_path: Path) -> None:
    command = answering(tmp_path, {"info": golden("info_duo")})
    Path(command).chmod(0o644)

    assert npu_smi.is_installed(command)
    with pytest.raises(DeviceError, match=r"no permission to run .*npu-smi.*cannot be told"):
        npu_smi.read_info(command=command)


def test_a_tool_that_is_no_program_is_cannot_tell(tmp_path: Path) -> None:
    command = install(tmp_path, "")
    Path(command).write_bytes(b"\x7fELF")

    with pytest.raises(DeviceError, match=r"Exec format error.*cannot be told"):
        npu_smi.read_info(command=command)


@pytest.mark.parametrize(("text", "status"), [(ERRORS[1], 187), (ERRORS[2], 172), (ERRORS[4], 215), ("", 211)])
def test_a_failing_tool_is_quoted_with_its_status(tmp_path: Path, text: str, status: int) -> None:
    command = install(tmp_path, f"printf '%s' '{text}'; exit {status}")

    with pytest.raises(DeviceError, match=f"npu-smi info ended with status {status} and said: ") as error:
        npu_smi.read_info(command=command)

    assert f"said: {text.strip() or 'nothing'}. That does not mean" in str(error.value)


def test_a_table_does_not_count_when_the_tool_fails_behind_it(tmp_path: Path) -> None:
    (tmp_path / "table").write_text(golden("info_duo"))
    command = install(tmp_path, f"cat '{tmp_path}/table'; exit 1")

    with pytest.raises(DeviceError, match="ended with status 1"):
        npu_smi.read_info(command=command)


def test_what_the_loader_says_of_a_missing_library_is_quoted(tmp_path: Path) -> None:
    command = install(tmp_path, "echo 'libdcmi.so: cannot open shared object file' >&2; exit 127")

    with pytest.raises(DeviceError, match=r"status 127 and said: libdcmi\.so: cannot open"):
        npu_smi.read_info(command=command)


def test_a_tool_that_is_killed_is_cannot_tell(tmp_path: Path) -> None:
    command = install(tmp_path, "kill -SEGV $$")

    with pytest.raises(DeviceError, match="npu-smi info was killed by SIGSEGV"):
        npu_smi.read_info(command=command)


def alive(marker: str) -> list[psutil.Process]:
    return [process for process in psutil.process_iter(["cmdline"]) if marker in (process.info["cmdline"] or [])]


def gone(marker: str) -> bool:
    deadline = monotonic() + 20
    while alive(marker) and monotonic() < deadline:
        sleep(0.02)
    return not alive(marker)


def test_a_tool_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    marker = f"600.{os.getpid()}1"
    command = install(tmp_path, f"sleep {marker} & sleep {marker}")

    with pytest.raises(DeviceError, match=r"did not end within 1\.5 s: a card or the driver hangs"):
        npu_smi.read_info(timeout_s=1.5, command=command)

    assert gone(marker)


def test_a_child_that_keeps_the_output_open_does_not_hold_us(tmp_path: Path) -> None:
    marker = f"600.{os.getpid()}2"
    command = install(tmp_path, f"sleep {marker} & exit 0")

    with pytest.raises(DeviceError, match="did not end within"):
        npu_smi.read_info(timeout_s=1.5, command=command)

    assert gone(marker)


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
def test_a_tool_that_cannot_be_killed_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = []
    monkeypatch.setattr(os, "killpg", lambda group, number: killed.append(group))
    monkeypatch.setattr(npu_smi, "_KILL_S", 0.1)
    command = install(tmp_path, "exec sleep 600")

    with pytest.raises(DeviceError, match=r"did not end within 1 s, nor when it was killed \(process [0-9]+\)"):
        npu_smi.read_info(timeout_s=1, command=command)

    [process] = killed
    os.kill(process, signal.SIGKILL)
    assert os.waitpid(process, 0)[0] == process


def test_a_tool_that_hangs_does_not_outlive_a_killed_worker(tmp_path: Path) -> None:
    marker = f"600.{os.getpid()}3"
    command = install(tmp_path, f"exec sleep {marker}")
    code = f"from workers import npu_smi; npu_smi.run('info', command={command!r})"
    worker = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        deadline = monotonic() + 60
        while not alive(marker) and monotonic() < deadline:
            sleep(0.02)
        assert alive(marker)
    finally:
        worker.kill()
        worker.wait()

    assert gone(marker)
