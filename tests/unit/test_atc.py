"""What is asked of ATC and what is made of its words; nothing runs here."""

from __future__ import annotations

from pathlib import Path

import pytest

from farm import atc, zoo
from farm.errors import UsageError

COMMAND = zoo.get("lvvit").atc_command(4, graph="/d/a.onnx", output="a")


def test_further_options_are_kept_as_they_are() -> None:
    found = atc.further(["--precision_mode=allow_mix_precision", "--output_type=FP32", "--mode=0"], COMMAND)

    assert found.options == ("--precision_mode=allow_mix_precision", "--output_type=FP32", "--mode=0")
    assert found.files == {}
    assert not found.has_aipp


@pytest.mark.parametrize("part", COMMAND[1:], ids=lambda part: part[2:].partition("=")[0])
def test_an_option_that_the_command_sets_is_refused_by_name(part: str) -> None:
    name = part.partition("=")[0]

    with pytest.raises(UsageError, match=rf"^{name} is set by farm compile itself"):
        atc.further([f"{name}=1"], COMMAND)


@pytest.mark.parametrize(
    ("option", "against"),
    [
        ("--dynamic_batch_size=1,4", "--input_shape, which has one batch size"),
        ("--output_type=FP16", "the tensors that jobs expect"),
        ("--input_fp16_nodes=image", "the tensors that jobs expect"),
        ("--out_nodes=x:0", "the tensors that jobs expect"),
        ("--mode=1", "--model"),
        ("--external_weight=1", "the artifact, which is one file"),
    ],
)
def test_an_option_that_would_make_something_else_is_refused(option: str, against: str) -> None:
    name = option.partition("=")[0]

    with pytest.raises(UsageError) as caught:
        atc.further([option], COMMAND)

    assert str(caught.value) == f"{name} contradicts {against}: leave it out"


@pytest.mark.parametrize("option", ["twins", "--precision_mode", "-precision_mode=x", "--precision_mode=", "--=x"])
def test_what_is_no_option_is_refused(option: str) -> None:
    with pytest.raises(UsageError, match=r"is no option of ATC's: after -- they are written --name=value"):
        atc.further([option], COMMAND)


def test_a_file_of_an_option_is_found_from_anywhere_and_has_a_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "aipp.cfg").write_text("")
    monkeypatch.chdir(tmp_path)

    found = atc.further(["--insert_op_conf=aipp.cfg", "--op_bank_path=bank"], COMMAND)

    assert found.options == (f"--insert_op_conf={tmp_path}/aipp.cfg", f"--op_bank_path={tmp_path}/bank")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert found.files == {f"{tmp_path}/aipp.cfg": empty}
    assert found.has_aipp


def test_a_file_of_an_option_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^--insert_op_conf=.*none: cannot read .*none: No such file"):
        atc.further([f"--insert_op_conf={tmp_path}/none"], COMMAND)


START = "ATC start working now, please wait for a moment.\n...\n"
FAILED = START + "ATC run failed, Please check the detail log, Try 'atc --help' for more information\n"
TRACE = "        TraceBack (most recent call last):\n        Parse failed[FUNC:Parse][FILE:main.cc][LINE:7]\n\n"
ADVICE = "        Possible Cause: It is wrong.\n        Solution: Make it right.\n"


@pytest.mark.parametrize(
    "head",
    [
        "E10001: Value [x] for [--y] is invalid.",
        "E10001: [PID: 10490] 2025-03-18-09:02:18.501.341 Value [x] for [--y] is invalid.",
        "[PID: 10490] 2025-03-18-09:02:18.501.341 Invalid_Argument(E10001): Value [x] for [--y] is invalid.",
    ],
    ids=["7", "8", "2025"],
)
def test_a_complaint_is_understood_whatever_its_age(head: str) -> None:
    code, lines = atc.complaint(f"{FAILED}{head}\n{ADVICE}{TRACE}")

    assert code == "E10001"
    assert lines == [
        "Value [x] for [--y] is invalid.",
        "Possible Cause: It is wrong.",
        "Solution: Make it right.",
    ]


@pytest.mark.parametrize(
    "head",
    [
        "E19999: Inner Error!\n        Call Build failed",
        "E19999: Inner Error!\nE19999[PID: 7] 2025-03-18-09:02:18.501.341 (E19999):  Call Build failed",
        "E19999: Inner Error!\nE19999: [PID: 7] 2025-03-18-09:02:18.501.341 Call Build failed",
    ],
    ids=["7", "2025", "8"],
)
def test_of_an_error_inside_its_trace_is_told(head: str) -> None:
    code, lines = atc.complaint(f"{FAILED}{head}\n{TRACE}")

    assert code == "E19999"
    assert lines == ["Call Build failed", "Parse failed[FUNC:Parse][FILE:main.cc][LINE:7]"]


def test_warnings_are_no_complaint() -> None:
    said = (
        START + "W11001: Op [x] does not hit the high-priority operator.\nATC run success, welcome to the next use.\n"
    )

    assert atc.complaint(said)[0] == ""


def test_without_a_code_the_last_lines_are_told() -> None:
    assert atc.complaint("\n".join(map(str, range(20)))) == ("", ["14", "15", "16", "17", "18", "19"])


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("E10001", "does not take one of its options"),
        ("E10054", "does not take one of its options"),
        ("E10016", "the graph has no input of this name"),
        ("E10041", "cannot read this graph"),
        ("E16005", "cannot read this graph"),
        ("E10052", "the AIPP file of --insert_op_conf"),
        ("E10410", "cannot open, read or write a file"),
        ("E13004", "cannot open, read or write a file"),
        ("E19010", "lacks an operator"),
        ("EZ3003", "lacks an operator"),
        ("EC0010", "the first python3 on PATH"),
        ("EL0004", "the driver says no"),
        ("EZ9999", "an error inside ATC"),
    ],
)
def test_a_code_comes_with_what_to_do(code: str, words: str) -> None:
    said = atc.reason(255, f"{FAILED}{code}: It is wrong.\n{TRACE}")

    assert said.startswith(f"ATC failed ({code}): ")
    assert words in said.splitlines()[0]
    assert said.splitlines()[1:] == [
        "    It is wrong.",
        *(["    Parse failed[FUNC:Parse][FILE:main.cc][LINE:7]"] * ("9999" in code)),
    ]


def test_an_unknown_code_is_told_all_the_same() -> None:
    assert atc.reason(255, f"{FAILED}E77777: New.\n") == "ATC failed (E77777)\n    New."


@pytest.mark.parametrize("code", [137, -9])
def test_a_kill_is_blamed_on_memory(code: int) -> None:
    assert atc.reason(code, "BrokenPipeError: [Errno 32] Broken pipe\n").startswith(
        "ATC was killed, most likely for memory"
    )


def test_a_missing_library_is_told_with_what_to_source() -> None:
    said = atc.reason(127, "atc.bin: error while loading shared libraries: libascend_hal.so: cannot open\n")

    assert "source CANN's set_env.sh" in said.splitlines()[0]
    assert "libascend_hal.so" in said.splitlines()[1]
