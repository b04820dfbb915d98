"""What published scripts print and write, byte for byte."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from db.results import Row
from farm.data.ade20k_classes import NAMES
from farm.errors import UsageError
from farm.jobs import ResultState
from farm.reports import published
from farm.reports.outputs import encoded
from farm.reports.terminal import per_class

GOLDEN = Path(__file__).parents[1] / "golden" / "published"


def row(rank: int | None, name: str = "") -> Row:
    return Row(
        name=name,
        state=ResultState.SCORED,
        label=0,
        rank=rank,
        classes=(),
        scores=(),
        sha256=None,
        reason="",
        device="",
    )


def golden(form: str) -> str:
    return (GOLDEN / f"{form}.txt").read_text().removesuffix("\n")


def rows(ranks: dict[int, int], total: int) -> list[Row]:
    """So many labels of each rank; the others are beyond the fifth."""
    found = [row(rank) for rank, count in ranks.items() for _ in range(count)]
    return found + [row(7)] * (total - len(found))


@pytest.mark.parametrize(
    ("form", "ranks"),
    [
        ("twins", {1: 41850}),
        ("lvvit", {1: 41585}),
        ("conformer", {1: 41925, 2: 3675, 3: 1115, 4: 785, 5: 785}),
    ],
)
def test_a_line_of_a_guide_is_what_its_counts_give(form: str, ranks: dict[int, int]) -> None:
    assert published._classified(form, rows(ranks, 50000), 1000) == golden(form)


@pytest.mark.parametrize("form", ["focal", "focal-lines"])
def test_focals_entries_are_one_a_picture_and_means_are_over_those_so_far(form: str) -> None:
    assert published._classified(form, [row(1, "a"), row(5, "b"), row(6, "c")], 1000) == golden(form)


def test_focals_summary_of_the_whole_set_is_the_guides() -> None:
    many = [row(1 if i < 41794 else 6, f"{i:05}") for i in range(50000)]

    assert published._classified("focal", many, 1000).endswith('"summary": {"Acc@1": 83.588, "Acc@5": 83.588}}')


def test_entries_are_in_the_order_of_the_results_names() -> None:
    text = published._classified("focal", [row(1, "a"), row(1, "a-b")], 1000)

    assert text.index('"a-b_0.txt"') < text.index('"a_0.txt"')


def test_the_performance_summary_is_the_tools() -> None:
    times = np.array([[0.7932186126708984, 59.518001556396484, 98.02532196044922]], np.float32)

    assert "\n".join(published.performance(times, 1)) == golden("summary")


def test_percentiles_are_interpolated_and_counts_are_of_batches() -> None:
    compute = np.array([59.5, 60.2, 59.7, 59.8], np.float32)

    found = published.timings(np.stack([compute, compute, compute], axis=1), 4)

    assert found["NPU_compute_time"]["percentile(99%)"] == np.percentile(compute.astype(float), 99)
    assert found["NPU_compute_time"]["count"] == 4
    assert found["npu_compute_time_list"] == compute.astype(float).tolist()
    assert found["throughput"] == 4000 / compute.astype(float).mean()
    assert list(found)[:3] == ["NPU_compute_time", "H2D_latency", "D2H_latency"]


def test_the_table_of_classes_is_the_guides() -> None:
    known = {"wall": (76.8812, 88.541), "building": (81.81, 91.749), "flag": (44.418, 49.0101)}
    classes = [
        {"class": name, "iou": known.get(name, (0.0, 0.0))[0], "acc": known.get(name, (0.0, 0.0))[1]} for name in NAMES
    ]
    text = per_class({"classes": classes, "metrics": {"aacc": 82.491, "miou": 47.9206, "macc": 59.5}})

    lines = text.split("\n")
    assert lines[:6] == golden("swin").split("\n")[:6]
    assert lines[-9:] == golden("swin").split("\n")[-9:]
    assert len(lines) == len(golden("swin").split("\n")) + len(NAMES) - 3


def test_text_has_six_decimals_a_blank_after_each_value_and_a_line_a_row() -> None:
    output = np.array([[0.1, -2.0], [1e-7, 12345678.0]], np.float32)

    assert b"".join(encoded(output, "TXT")) == b"0.100000 -2.000000 \n0.000000 12345678.000000 \n"
    assert b"".join(encoded(np.array([1, -2], np.int32), "TXT")) == b"1 -2 \n"


def test_an_array_keeps_its_batch_axis_and_raw_bytes_are_raw(tmp_path: Path) -> None:
    output = np.arange(6, dtype=np.float32).reshape(2, 3)
    (tmp_path / "x.npy").write_bytes(b"".join(encoded(output, "NPY")))

    assert np.load(tmp_path / "x.npy").shape == (1, 2, 3)
    assert b"".join(encoded(output, "BIN")) == output.tobytes()


@pytest.mark.parametrize("names", [["img.1", "img.2"], ["a", "a.b"]])
def test_bins_whose_results_would_have_one_name_are_refused(names: Sequence[str]) -> None:
    with pytest.raises(UsageError, match=f"results of {names[0]} and {names[1]} would both be called"):
        published.result_stems(names)


def test_results_are_called_up_to_the_first_dot() -> None:
    assert published.result_stems(["a.b-0,0", "c"]) == {"a.b-0,0": "a", "c": "c"}
