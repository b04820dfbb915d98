"""`farm compile` with a stand-in for ATC, and `farm import` of what ATC made elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from farm import artifacts, canary, cli, zoo
from farm.artifacts import Artifact, TensorInfo
from tests import fake_acl, fake_atc
from tests.cluster import wait_for
from workers.backends import open_backend
from workers.backends.base import Load, TensorSpec

LVVIT, SWIN = zoo.get("lvvit"), zoo.get("swin")


@dataclass
class Store:
    """FARM_DATA with exported graphs, and an ATC that can be told what to do."""

    root: Path
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def trace(self) -> Path:
        return self.root / "trace"

    def tell(self, **behaviour: object) -> None:
        for name, value in fake_atc.told(trace=str(self.trace), **behaviour).items():
            self.monkeypatch.setenv(name, value)

    def runs(self) -> list[tuple[list[str], str, str]]:
        """Of every run of ATC: arguments, working directory, PATH."""
        lines = self.trace.read_text().splitlines() if self.trace.exists() else []
        return [tuple(json.loads(line)[:3]) for line in lines]

    def graph(self, bs: int = 4, *, data: bytes = b"a graph of image", **changes: Any) -> Artifact:
        """An exported graph that only looks like one, with its sidecar and what onnxruntime said."""
        spec = zoo.get(changes.get("model", "lvvit"))
        head = changes.get("head", "")
        file = f"{spec.name}_bs{bs}_0123abcd{'_' if head else ''}{head}.onnx"
        fields = {
            "model": spec.name, "bs": bs, "backend": "ort", "soc": "cpu", "file": file,
            "sha256": hashlib.sha256(data).hexdigest(), "weights": "w.pth", "weights_sha256": "c" * 64, "opset": 13,
            "input": TensorInfo.of(spec.input, bs), "output": TensorInfo.of(spec.output_of(head), bs),
            "versions": {"torch": "2.6"}, "max_abs_diff": 1e-6,
        }  # fmt: skip
        artifact = Artifact.model_validate(fields | changes)
        directory = self.directory(spec.name)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / artifact.file).write_bytes(data)
        canary.write_reference(directory / artifact.file, np.ones((canary.COUNT, 1000)))
        artifacts.write_sidecar(directory, artifact)
        return artifact

    def directory(self, model: str = "lvvit") -> Path:
        return artifacts.directory(self.data, model)

    def files(self) -> list[str]:
        return sorted(path.name for path in self.directory().iterdir())

    def compiled(self, model: str = "lvvit") -> list[Artifact]:
        return [each for each in artifacts.stored(self.data, model) if each.backend == "acl"]

    def farm(self, *arguments: str, code: int = 0) -> str:
        """What a command prints, on stdout or, if it is to fail, on stderr."""
        self.monkeypatch.setattr(sys, "argv", ["farm", *arguments])
        self.capsys.readouterr()
        found = cli.run()
        said = self.capsys.readouterr()
        assert found == code, f"{said.out}{said.err}"
        return said.err if code else said.out


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Store:
    store = Store(tmp_path, monkeypatch, capsys)
    fake_atc.install(tmp_path / "cann" / "bin")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("PATH", f"{tmp_path}/cann/bin:{os.environ['PATH']}")
    monkeypatch.setenv("FARM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FARM_DATA", str(store.data))
    store.tell()
    return store


def have_cann(store: Store, version: str) -> None:
    info = store.root / "cann" / "ascend_toolkit_install.info"
    info.write_text(f"package_name=Ascend-cann-toolkit\nversion={version}\ninnerversion=V100R001\n")


NAME = "lvvit_bs4_0123abcd_Ascend310P3"


def test_a_graph_becomes_an_artifact_for_npus(store: Store) -> None:
    have_cann(store, "8.0.RC1")
    source = store.graph()
    before = os.umask(0)

    try:
        printed = store.farm("compile", "lvvit", "--bs", "4")
    finally:
        os.umask(before)

    path = store.directory() / f"{NAME}.om"
    assert printed == f"lvvit bs 4: {path} (by ATC of CANN 8.0.RC1)\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    (artifact,) = store.compiled()
    ((_, directory, _),) = store.runs()
    assert artifact.model_dump(exclude={"created"}) == {
        **source.model_dump(exclude={"created"}),
        "backend": "acl",
        "soc": "Ascend310P3",
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "max_abs_diff": None,
        "source_sha256": source.sha256,
        "command": f"atc --framework=5 --model={store.directory()}/{source.file} --output={NAME} --input_format=NCHW "
        "--input_shape=image:4,3,224,224 --log=error --soc_version=Ascend310P3",
        "versions": {"torch": "2.6", "cann": "8.0.RC1"},
    }
    assert canary.distance(path, np.ones((4, 1000)), 0) == 0
    assert not Path(directory).exists()
    assert not os.listdir(store.root / "tmp")
    graphs = [source.file, "lvvit_bs4_0123abcd.json", "lvvit_bs4_0123abcd.canary.npy"]
    assert store.files() == sorted([*graphs, f"{NAME}.om", f"{NAME}.json", f"{NAME}.canary.npy"])


def test_what_was_compiled_is_what_an_npu_loads(store: Store) -> None:
    store.graph()
    store.farm("compile", "lvvit", "--bs", "4")
    store.monkeypatch.syspath_prepend(str(fake_acl.FOLDER))
    (artifact,) = store.compiled()
    load = Load(
        backend=artifact.backend,
        path=str(store.directory() / artifact.file),
        input=TensorSpec(**artifact.input.model_dump()),
        output=TensorSpec(**artifact.output.model_dump()),
        device="h:0",
    )

    out = np.full((4, 1000), np.nan, np.float32)
    with closing(open_backend(load)) as backend:
        backend.infer(np.zeros((4, 3, 224, 224), np.float32), out)

    assert np.isfinite(out).all()


def test_several_batch_sizes_are_a_file_each(store: Store) -> None:
    for bs in (1, 8):
        store.graph(bs)

    printed = json.loads(store.farm("compile", "lvvit", "--bs", "1,8", "--soc", "Ascend310P1", "--json"))

    assert [(each["bs"], each["soc"], each["input"]["shape"][0]) for each in printed] == [
        (1, "Ascend310P1", 1),
        (8, "Ascend310P1", 8),
    ]
    assert printed == [artifact.model_dump(mode="json") for artifact in store.compiled()]


def test_nothing_is_begun_if_one_of_the_graphs_is_not_there(store: Store) -> None:
    store.graph(1)

    said = store.farm("compile", "lvvit", "--bs", "1,4", code=2)

    assert "no artifact of lvvit for bs 4 and backend ort" in said
    assert "farm export lvvit --weights CKPT --bs 4" in said
    assert store.runs() == []


def test_of_several_graphs_one_is_chosen_by_head_and_input(store: Store) -> None:
    for head in ("full", "small"):
        store.graph(1, model="swin", head=head, data=b"input" + head.encode())
    uint8 = TensorInfo(name="input", dtype="uint8", shape=(1, 3, 512, 512))
    store.graph(1, model="swin", head="small", input=uint8, file="u.onnx")

    assert "choose one with --artifact SHA or --input or --head" in store.farm("compile", "swin", code=2)
    store.farm("compile", "swin", "--head", "small", "--input", "float32")

    (artifact,) = store.compiled("swin")
    assert (artifact.head, artifact.input.dtype, artifact.output.shape) == ("small", "float32", (1, 150, 128, 128))
    assert "no artifact of swin for bs 1 and backend ort and uint8 input" in store.farm(
        "compile", "swin", "--head", "full", "--input", "uint8", code=2
    )


def test_a_graph_that_is_not_its_sidecars_is_not_compiled(store: Store) -> None:
    graph = store.directory() / store.graph().file
    graph.write_bytes(b"another image")

    assert f"{graph} is not the file its sidecar tells of: export lvvit again" in store.farm(
        "compile", "lvvit", "--bs", "4", code=1
    )


def test_what_is_there_is_not_compiled_again_even_without_atc(store: Store) -> None:
    store.graph()
    store.farm("compile", "lvvit", "--bs", "4")
    (store.root / "cann" / "bin" / "atc").unlink()

    printed = store.farm("compile", "lvvit", "--bs", "4")

    assert printed == f"lvvit bs 4: {store.directory()}/{NAME}.om (there already)\n"
    assert len(store.runs()) == 1


def test_a_store_that_moved_still_has_what_was_compiled(store: Store) -> None:
    store.graph()
    store.farm("compile", "lvvit", "--bs", "4")
    moved = store.root / "moved"
    store.data.rename(moved)
    store.monkeypatch.setenv("FARM_DATA", str(moved))

    assert "there already" in store.farm("compile", "lvvit", "--bs", "4")


def damage(store: Store) -> None:
    (store.directory() / f"{NAME}.om").write_bytes(b"")


def lose(store: Store) -> None:
    (store.directory() / f"{NAME}.om").unlink()


@pytest.mark.parametrize(
    "change",
    [damage, lose, lambda store: store.graph(data=b"image, exported again"), lambda store: have_cann(store, "8.1")],
    ids=["damaged", "lost", "another graph", "another CANN"],
)
def test_it_is_compiled_again_when_it_would_not_be_the_same(change: Callable[[Store], object], store: Store) -> None:
    have_cann(store, "8.0")
    source = store.graph()
    store.farm("compile", "lvvit", "--bs", "4")
    change(store)

    assert "there already" not in store.farm("compile", "lvvit", "--bs", "4")

    assert len(store.runs()) == 2
    (artifact,) = store.compiled()
    assert artifacts.sha256_of(store.directory() / artifact.file) == artifact.sha256
    graph = artifacts.sha256_of(store.directory() / source.file)
    assert artifact.source_sha256 == graph


def test_further_options_are_passed_on_and_kept_with_the_hash_of_their_file(store: Store) -> None:
    store.graph()
    conf = store.root / "ops.ini"
    conf.write_text("[ops]\n")
    options = ("--precision_mode=allow_mix_precision", f"--op_precision_mode={conf}")
    store.farm("compile", "lvvit", "--bs", "4")

    store.farm("compile", "lvvit", "--bs", "4", "--", *options)
    assert "there already" in store.farm("compile", "lvvit", "--bs", "4", "--", *options)
    conf.write_text("[other]\n")
    store.farm("compile", "lvvit", "--bs", "4", "--", *options)

    plain, *others = sorted(store.compiled(), key=lambda each: len(each.file))
    assert plain.conf_sha256 == {}
    assert len(others) == 2, "another file of options makes another artifact"
    assert artifacts.sha256_of(conf) in [each.conf_sha256[str(conf)] for each in others]
    assert all(each.command.endswith(" ".join(options)) for each in others)
    assert [arguments[-2:] for arguments, _, _ in store.runs()[1:]] == [list(options)] * 2


def test_with_aipp_nothing_of_the_graphs_is_compared_and_that_is_said(store: Store) -> None:
    store.graph()
    conf = store.root / "aipp.cfg"
    conf.write_text("aipp_op {}\n")

    printed = store.farm("compile", "lvvit", "--bs", "4", "--", f"--insert_op_conf={conf}")

    assert "nothing of onnxruntime's to compare its answers with" in printed
    (artifact,) = store.compiled()
    assert not canary.has_reference(store.directory() / artifact.file)


def test_an_option_that_contradicts_is_refused_before_anything_runs(store: Store) -> None:
    store.graph()

    said = store.farm("compile", "lvvit", "--bs", "4", "--", "--input_shape=image:8,3,224,224", code=2)

    assert said.startswith("error: --input_shape is set by farm compile itself")
    assert store.runs() == []


def test_what_is_printed_can_be_run_anywhere_and_its_result_imported(store: Store) -> None:
    source = store.graph()

    line = store.farm("compile", "lvvit", "--bs", "4", "--print")
    assert store.runs() == []
    elsewhere = store.root / "else where"
    elsewhere.mkdir()
    subprocess.run(line, shell=True, cwd=elsewhere, check=True, stdout=subprocess.DEVNULL)
    store.farm("import", f"{elsewhere}/{NAME}.om", "--model", "lvvit", "--bs", "4", "--onnx", source.sha256[:12])

    (artifact,) = store.compiled()
    assert (artifact.weights_sha256, artifact.source_sha256, artifact.opset) == ("c" * 64, source.sha256, 13)
    assert canary.has_reference(store.directory() / artifact.file)


def test_a_command_line_is_quoted_for_a_shell(store: Store) -> None:
    store.graph()
    conf = store.root / "my conf.ini"
    conf.write_text("x")

    line = store.farm("compile", "lvvit", "--bs", "4", "--print", "--", f"--keep_dtype={conf}")

    assert line.endswith(f" '--keep_dtype={conf}'\n")


@pytest.mark.parametrize("suffix", ["_linux_x86_64", "_linux_aarch64"])
def test_a_name_that_tells_of_the_system_is_found(suffix: str, store: Store) -> None:
    store.graph()
    store.tell(suffix=suffix)

    store.farm("compile", "lvvit", "--bs", "4")

    assert f"{NAME}.om" in store.files()


CAUSE = {"cause": "No parser for this.", "solution": "Take another opset."}


@pytest.mark.parametrize(
    ("behaviour", "sentence", "lines"),
    [
        *(
            (
                {"fault": "code", "code": "E19010", "text": "No parser is registered for Op [a].", "age": age, **CAUSE},
                "ATC failed (E19010): this CANN lacks an operator",
                [
                    "No parser is registered for Op [a].",
                    "Possible Cause: No parser for this.",
                    "Solution: Take another opset.",
                ],
            )
            for age in ("7", "8", "2025")
        ),
        ({"fault": "inner", "age": "2025"}, "ATC failed (E19999): this is an error inside ATC", ["Call Build failed"]),
        ({"fault": "killed"}, "ATC was killed, most likely for memory", ["BrokenPipeError"]),
        ({"fault": "loader"}, "ATC does not start for want of a program or library", ["libascend_hal.so"]),
        ({"fault": "nothing"}, "ATC ended well, but left no model", ["ATC run success"]),
        ({"fault": "empty"}, "ATC ended well, but left no model", ["ATC run success"]),
        ({"fault": "says so only"}, "ATC failed (E13000): it cannot open, read or write a file", ["Save model failed"]),
    ],
    ids=["7", "8", "2025", "inner", "killed", "loader", "nothing", "empty", "exit code 0"],
)
def test_a_failure_is_a_sentence_with_atcs_own_words_and_leaves_the_store_as_it_was(
    behaviour: dict[str, object], sentence: str, lines: list[str], store: Store
) -> None:
    store.graph()
    before = store.files()
    store.tell(**behaviour)

    said = store.farm("compile", "lvvit", "--bs", "4", code=1)

    error = said[said.index("error: ") :].splitlines()
    assert error[0].startswith(f"error: {NAME}.om was not made: {sentence}")
    for line in lines:
        assert any(line in each for each in error[1:-1]), error
    log = store.root / "home" / "log" / f"atc-{NAME}.log"
    assert error[-1] == f"All that ATC said is in {log}"
    assert "ATC" in log.read_text() or "atc" in log.read_text()
    assert store.files() == before
    assert not os.listdir(store.root / "tmp")


def test_an_artifact_that_was_there_outlives_a_failure(store: Store) -> None:
    have_cann(store, "8.0")
    store.graph()
    store.farm("compile", "lvvit", "--bs", "4")
    before = store.compiled()
    have_cann(store, "8.1")
    store.tell(fault="inner")

    store.farm("compile", "lvvit", "--bs", "4", code=1)

    assert store.compiled() == before


def test_a_graph_with_another_input_is_named_by_atc(store: Store) -> None:
    store.graph(data=b"a graph of something else")

    said = store.farm("compile", "lvvit", "--bs", "4", code=1)

    assert "ATC failed (E10016): the graph has no input of this name" in said
    assert "Opname image specified in --input_shape is not found in the model." in said


def test_without_atc_it_says_what_to_source(store: Store) -> None:
    store.graph()
    store.monkeypatch.setenv("PATH", str(store.root))

    said = store.farm("compile", "lvvit", "--bs", "4", code=2)

    assert "there is no atc on PATH: source /usr/local/Ascend/ascend-toolkit/set_env.sh first" in said


def test_atc_does_not_find_the_farms_own_python(store: Store) -> None:
    store.graph()
    own = Path(sys.prefix) / "bin"
    store.monkeypatch.setenv("PATH", f"{own}:{os.environ['PATH']}")

    store.farm("compile", "lvvit", "--bs", "4")

    ((_, _, path),) = store.runs()
    assert str(own) not in path.split(":")
    assert f"{store.root}/cann/bin" in path.split(":")


def test_a_store_that_cannot_be_written_is_named_before_atc_runs(store: Store) -> None:
    store.graph()

    def refuse(*, dir: Path) -> Any:  # noqa: A002
        if Path(dir) == store.directory():
            raise OSError(30, "Read-only file system")
        return real(dir=dir)

    real: Any = tempfile.TemporaryFile
    store.monkeypatch.setattr(tempfile, "TemporaryFile", refuse)

    said = store.farm("compile", "lvvit", "--bs", "4", code=1)

    assert f"cannot write {store.directory()}/{NAME}.om: Read-only file system" in said
    assert store.runs() == []


@pytest.mark.parametrize(
    ("place", "why"),
    [("my data", "takes only letters, digits"), ("/".join("abcdefghijklmnopqrstuvwxyz"), "takes 32 levels at most")],
    ids=["blank", "deep"],
)
def test_a_place_that_no_npu_loads_from_is_refused_before_atc_runs(place: str, why: str, store: Store) -> None:
    store.graph()
    (store.root / place).parent.mkdir(parents=True, exist_ok=True)
    store.data.rename(store.root / place)
    store.monkeypatch.setenv("FARM_DATA", str(store.root / place))

    said = store.farm("compile", "lvvit", "--bs", "4", code=2)

    assert why in said
    assert "Set FARM_DATA" in said
    assert store.runs() == []


@pytest.mark.parametrize("soc", ["310P3", "Ascend 310P3", "Ascend", "Ascend310P3/.."])
def test_a_chips_name_begins_with_ascend(soc: str, store: Store) -> None:
    store.graph()

    assert f"--soc {soc}: expected a name such as Ascend310P3" in store.farm("compile", "lvvit", "--soc", soc, code=2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "term"])
def test_an_interrupt_ends_all_that_atc_started_and_leaves_nothing(number: int, store: Store) -> None:
    store.graph()
    before = store.files()
    store.tell(fault="hang")
    store.monkeypatch.setenv("TMPDIR", str(store.root / "tmp"))
    command = [sys.executable, "-m", "farm", "compile", "lvvit", "--bs", "4"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    hangs = Path(f"{store.trace}.hangs")
    pids = wait_for(lambda: hangs.exists() and hangs.read_text(), what="ATC hangs").split()
    started = [psutil.Process(int(pid)) for pid in pids]
    assert os.listdir(store.root / "tmp")

    try:
        process.send_signal(number)
        out, err = process.communicate(timeout=30)

        assert process.returncode == 130
        assert out == ""
        assert "Traceback" not in err
        wait_for(lambda: not any(is_running(each) for each in started), what="ATC and its child end")
        assert store.files() == before
        assert not os.listdir(store.root / "tmp")
        assert not os.listdir(store.root / "home" / "log")
    finally:
        for each in started:
            with suppress(psutil.NoSuchProcess):
                each.kill()


def is_running(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# -- farm import of an .om -------------------------------------------------------------------------------------------


@pytest.fixture
def om(tmp_path: Path) -> Path:
    path = tmp_path / "elsewhere" / "model_best_bs1_sim.om"
    path.parent.mkdir()
    path.write_bytes(b"compiled elsewhere")
    path.chmod(0o666)
    return path


def test_an_om_is_copied_into_the_store_as_an_npu_wants_it(store: Store, om: Path) -> None:
    printed = store.farm("import", str(om), "--model", "lvvit", "--bs", "1")

    (artifact,) = store.compiled()
    path = store.directory() / artifact.file
    sha256 = artifacts.sha256_of(om)
    assert artifact.file == f"lvvit_bs1_{sha256[:8]}_Ascend310P3.om"
    assert printed == f"lvvit bs 1: {path} (imported, nothing of onnxruntime's to compare its answers with)\n"
    assert (artifact.sha256, artifact.soc, artifact.input.shape) == (sha256, "Ascend310P3", (1, 3, 224, 224))
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert stat.S_IMODE(om.stat().st_mode) == 0o666


def test_an_om_that_is_there_is_not_imported_again(store: Store, om: Path) -> None:
    store.farm("import", str(om), "--model", "lvvit", "--bs", "1")
    before = store.files()

    again = store.farm("import", str(om), "--model", "lvvit", "--bs", "1")

    assert "there already" in again
    assert store.files() == before


def test_an_om_that_was_damaged_in_the_store_is_put_right(store: Store, om: Path) -> None:
    store.farm("import", str(om), "--model", "lvvit", "--bs", "1")
    (artifact,) = store.compiled()
    (store.directory() / artifact.file).write_bytes(b"")

    assert "there already" not in store.farm("import", str(om), "--model", "lvvit", "--bs", "1")

    assert store.compiled() == [artifact]
    assert artifacts.sha256_of(store.directory() / artifact.file) == artifact.sha256


def test_where_an_om_came_from_can_be_said_later(store: Store, om: Path) -> None:
    source = store.graph(1)
    store.farm("import", str(om), "--model", "lvvit", "--bs", "1")

    printed = store.farm("import", str(om), "--model", "lvvit", "--bs", "1", "--onnx", source.file, "--json")

    (artifact,) = store.compiled()
    assert json.loads(printed) == artifact.model_dump(mode="json")
    assert artifact.source_sha256 == source.sha256
    assert canary.has_reference(store.directory() / artifact.file)


def test_what_was_compiled_here_is_known_when_it_comes_in_again(store: Store, tmp_path: Path) -> None:
    store.graph()
    store.farm("compile", "lvvit", "--bs", "4")
    shutil.copy(store.directory() / f"{NAME}.om", tmp_path / "x.om")

    assert "there already" in store.farm("import", str(tmp_path / "x.om"), "--model", "lvvit", "--bs", "4")


@pytest.mark.parametrize(
    "more", [("--bs", "4"), ("--bs", "1", "--soc", "Ascend310P1"), ("--bs", "1", "--input", "uint8")]
)
def test_one_file_is_one_artifact(more: tuple[str, ...], store: Store, om: Path) -> None:
    store.farm("import", str(om), "--model", "lvvit", "--bs", "1")

    said = store.farm("import", str(om), "--model", "lvvit", *more, code=2)

    assert f"{om} is in the store as lvvit_bs1_" in said
    assert re.search(r"remove \S+\.om and \S+\.json, then import it again", said)


def test_a_link_is_followed_for_an_npu_does_not(store: Store, om: Path) -> None:
    link = om.with_name("link.om")
    link.symlink_to(om)

    store.farm("import", str(link), "--model", "lvvit", "--bs", "1")

    (artifact,) = store.compiled()
    assert not (store.directory() / artifact.file).is_symlink()


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["{om}"], 2, "say what {om} is: farm import {om} --model MODEL --bs N"),
        (["{om}", "--model", "lvvit"], 2, "say what {om} is: farm import {om} --model MODEL --bs N"),
        (["{om}", "--model", "resnet", "--bs", "1"], 2, "unknown model 'resnet'"),
        (["{om}", "--model", "lvvit", "--bs", "0"], 2, "--bs 0: a batch size is 1 or more"),
        (["{om}", "--model", "lvvit", "--bs", "1", "--soc", "310P3"], 2, "expected a name such as Ascend310P3"),
        (["{om}", "--model", "lvvit", "--bs", "1", "--head", "small"], 2, "lvvit has no head 'small'"),
        (["{om}", "--model", "lvvit", "--bs", "1", "--input", "int8"], 2, "no bins are of 'int8'"),
        (["{om}", "--model", "lvvit", "--bs", "1", "--onnx", "ff"], 2, "no artifact of lvvit for bs 1 and backend ort"),
        (["{om}", "--model", "lvvit", "--bs", "1", "--recipe", "lvvit", "--subset"], 2, "leave out --recipe, --subset"),
        (["none.om", "--model", "lvvit", "--bs", "1"], 1, "none.om is no file: expected the .om that ATC made"),
        (["dir.om", "--model", "lvvit", "--bs", "1"], 1, "dir.om is no file: expected the .om that ATC made"),
        (["x.onnx", "--model", "lvvit", "--bs", "1"], 2, "x.onnx is a file that does not end in .om"),
        ([".", "--recipe", "lvvit", "--bs", "1"], 2, ". is a folder of bins, which takes --recipe: leave out --bs"),
        (["."], 2, "say what made the bins in .: farm import . --recipe lvvit, in256 or seg"),
    ],
)
def test_what_cannot_be_imported_says_why(
    arguments: list[str], code: int, sentence: str, store: Store, om: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(om.parent)
    (om.parent / "x.onnx").touch()
    (om.parent / "dir.om").mkdir()

    said = store.farm("import", *(each.format(om=om) for each in arguments), code=code)

    assert sentence.format(om=om) in said
    assert not store.directory().exists()


@pytest.mark.parametrize("head", [None, "small"])
def test_an_om_of_segmentation_has_the_guides_head_unless_told(head: str | None, store: Store, om: Path) -> None:
    store.farm("import", str(om), "--model", "swin", "--bs", "1", *(["--head", head] if head else []))

    (artifact,) = store.compiled("swin")
    assert artifact.head == (head or "full")
    assert artifact.output == TensorInfo.of(SWIN.output_of(artifact.head), 1)
