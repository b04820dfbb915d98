"""The table that the deployment guides end with: accuracy and speed of models at batch sizes, and why one lacks."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.markup import escape
from rich.table import Table

from farm.data.manifest import MADE_UP
from farm.reports.speed import Speed, explained
from farm.zoo.spec import ModelSpec

#: The metric of a dataset that the guides publish.
METRIC = {"imagenet": "top1", "ade20k": "miou"}
#: Devices of one kind that differ by more than this share are worth a remark.
SPREAD = 0.03

Report = Mapping[str, Any]


@dataclass
class Cell:
    """A model at a batch size."""

    spec: ModelSpec
    bs: int
    missing: str = ""  #: why there is nothing
    report: Report | None = None  #: of its job
    speeds: Sequence[Speed] = ()
    of_samples: int = 0  #: samples that there are
    notes: list[str] = field(default_factory=list)

    @property
    def fps(self) -> float | None:
        """Device fps: the mean of the devices'."""
        measured = [speed["fps"] for speed in self.speeds if speed["fps"]]
        return sum(measured) / len(measured) if measured else None

    def lack(self) -> str:
        """Why one of its figures is empty although it was measured; nothing if none is."""
        errors = sorted({speed["error"] for speed in self.speeds if speed["error"]})
        if self.fps is None:
            return errors[0] if errors else "no device was timed"
        empty = self.report is not None and self.report["metrics"][METRIC[self.spec.dataset]] is None
        return "no sample was scored" if empty else ""

    def as_json(self) -> dict[str, Any]:
        metric = METRIC[self.spec.dataset]
        report = self.report or {}
        value = report["metrics"][metric] if report else None
        interval = report["interval"][metric] if report else None
        expected, reference_fps = self.spec.reference.get(metric), self.spec.reference_fps.get(self.bs)
        baseline = self.spec.guide.baseline_fps.get(self.bs) if self.spec.guide else None
        return {
            "model": self.spec.name,
            "bs": self.bs,
            "simulated": any(s["simulated"] for s in self.speeds) or bool(report.get("simulated")),
            "metric": metric,
            "accuracy": value,
            "plus_minus": (interval[1] - interval[0]) / 2 if interval else None,
            "reference": expected,
            "delta": value - expected if value is not None and expected is not None else None,
            "samples": report.get("samples"),
            "device_fps": self.fps,
            "reference_fps": reference_fps,
            "fps_over_reference": self.fps / reference_fps if self.fps and reference_fps else None,
            "wall_fps": report["fps"]["wall"] if report else None,
            "devices": len(self.speeds) or len(report.get("devices", [])),
            "baseline": self.spec.guide.baseline if self.spec.guide and baseline else None,
            "baseline_fps": baseline,
            "over_baseline": self.fps / baseline if self.fps and baseline else None,
            "missing": self.missing,
            "notes": self.remarks(),
            "job": report.get("job"),
            "artifact": report.get("artifact"),
            "digest": report.get("digest"),
        }

    def remarks(self) -> list[str]:
        """What explains the figures, as far as the rows know."""
        said = list(self.notes)
        report, measured = self.report, [speed for speed in self.speeds if speed["fps"]]
        backends = {speed["backend"] for speed in measured} | ({report["backend"]} if report else set())
        if "ort" in backends:
            said.append("onnxruntime on CPUs: its fps is not the card's")
        if report and (total := report["samples"]["total"]) < self.of_samples:
            said.append(f"the first {total} of {self.of_samples} samples")
        if report and not report["simulated"] and report["provenance"].get("source") == MADE_UP:
            said.append("made-up samples: no accuracy here is real")
        if report and report["samples"]["failed"]:
            said.append(f"{report['samples']['failed']} samples failed and do not count")
        if report and report["quarantined"]:
            said.append(f"in quarantine meanwhile: {', '.join(q['device'] for q in report['quarantined'])}")
        said += [f"{each['device']} was used although: {each['reason']}" for each in report["forced"]] if report else []
        if measured:
            slow, fast = min(measured, key=_fps), max(measured, key=_fps)
            if _fps(fast) > (1 + SPREAD) * _fps(slow):
                said.append(f"devices differ: {slow['device']} {_fps(slow):.1f} fps, {fast['device']} {_fps(fast):.1f}")
        said += [f"{speed['device']}: {phrase}" for speed in measured for phrase in explained(speed)]
        said += sorted({s["error"] for s in self.speeds if s["error"]} - {self.missing})
        return said


def _fps(speed: Speed) -> float:
    return float(speed["fps"])


COLUMNS = (
    "model", "bs", "metric", "reference", "measured", "+-", "delta", "310P3 fps", "device fps", "ratio", "wall fps",
    "baseline fps", "over it", "remarks",
)  # fmt: skip


def lines(cells: Sequence[Cell]) -> list[list[str]]:
    """The table as text, a list of `COLUMNS` a cell. The best device fps of a model bears a star."""
    best: dict[str, tuple[float, int]] = {}
    for cell in cells:
        if cell.fps and cell.fps > best.get(cell.spec.name, (0.0, 0))[0]:
            best[cell.spec.name] = (cell.fps, cell.bs)
    found = []
    for cell in cells:
        line = cell.as_json()
        star = "*" if best.get(cell.spec.name, (0.0, 0))[1] == cell.bs else ""
        ratio = line["over_baseline"]
        found.append(
            [
                line["model"],
                str(line["bs"]),
                line["metric"],
                _text(line["reference"], ""),
                _text(line["accuracy"], ".3f"),
                _text(line["plus_minus"], ".3f"),
                _text(line["delta"], "+.3f"),
                _text(line["reference_fps"], ""),
                _text(line["device_fps"], ".2f") + star,
                _text(line["fps_over_reference"], ".3f"),
                _text(line["wall_fps"], ".1f"),
                _text(line["baseline_fps"], ""),
                _text(ratio, ".4f") + ("x" if ratio else ""),
                " ".join("; ".join(filter(None, [line["missing"], *line["notes"]])).split()),
            ]
        )
    return found


def mark(cells: Sequence[Cell]) -> str:
    """What to say above the table, if its devices are none."""
    if any(cell.as_json()["simulated"] for cell in cells):
        return "SIMULATED: times and answers of devices that are none; no accuracy here is real"
    return ""


def terminal(cells: Sequence[Cell]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in COLUMNS:
        is_text = title in ("model", "metric", "remarks")
        table.add_column(title, justify="left" if is_text else "right", no_wrap=title != "remarks")
    for line in lines(cells):
        table.add_row(*map(escape, line))
    return table


def markdown(cells: Sequence[Cell]) -> str:
    rows = [COLUMNS, ["---"] * len(COLUMNS), *lines(cells)]
    body = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)
    said = mark(cells)
    return f"**{said}**\n\n{body}" if said else body


def as_csv(cells: Sequence[Cell]) -> str:
    """A line a cell; the first column says whether it is simulated, for a file has no headline."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["simulated", *COLUMNS])
    for cell, line in zip(cells, lines(cells), strict=True):
        writer.writerow(["yes" if cell.as_json()["simulated"] else "no", *line])
    return file.getvalue().rstrip("\n")


def as_json(cells: Sequence[Cell]) -> str:
    return json.dumps([cell.as_json() for cell in cells], indent=2)


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
