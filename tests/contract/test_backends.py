"""What every backend keeps, whatever device it drives; and below it what one kind alone can do."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray

from farm import artifacts, zoo
from farm.errors import DeviceError, HostError, JobError
from tests import fake_acl
from tests.datasets import write_tiny_onnx
from workers.backends import BACKENDS, open_backend
from workers.backends.base import Backend, Load, TensorSpec, Times
from workers.backends.simulated import scores
from workers.ring import Ring

Floats = NDArray[np.float32]

LVVIT = zoo.get("lvvit")
BS = 4


def load_of(artifact: artifacts.Artifact, path: str = "", **options: object) -> Load:
    return Load(
        backend=artifact.backend,
        path=path,
        input=TensorSpec(**artifact.input.model_dump()),
        output=TensorSpec(**artifact.output.model_dump()),
        device="h:0",
        options=options,
    )


def acl_load(data_dir: Path, bs: int) -> Load:
    """On a stand-in for the vendor's module, whose answers are the simulated device's."""
    load = simulated_load(data_dir, bs)
    given, wanted = load.input, load.output
    path = fake_acl.write_om(
        data_dir / f"tiny_bs{bs}.om",
        [(given.name, given.dtype, given.shape)],
        [(f"Gemm_9:0:{wanted.name}", wanted.dtype, wanted.shape)],  # as the compiler names a graph's output
    )
    return replace(load, backend="acl", path=str(path), options={})


def ort_load(data_dir: Path, bs: int) -> Load:
    artifact = write_tiny_onnx(data_dir, bs)
    return load_of(artifact, str(artifacts.directory(data_dir, LVVIT.name) / artifact.file))


def simulated_load(_: Path, bs: int) -> Load:
    return load_of(artifacts.simulated(LVVIT, bs), simulated='{"compute_ms": 0}')


#: The backends that keep the contract, each with a small model for it.
KINDS: Mapping[str, Callable[[Path, int], Load]] = {"acl": acl_load, "ort": ort_load, "simulated": simulated_load}
#: Of these, what loads a file.
FILES = [kind for kind in KINDS if kind != "simulated"]


@pytest.fixture(autouse=True)
def acl_without_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(fake_acl.FOLDER))


@pytest.fixture(params=KINDS)
def load(request: pytest.FixtureRequest, tmp_path: Path) -> Load:
    return KINDS[request.param](tmp_path, BS)


@pytest.fixture
def backend(load: Load) -> Iterator[Backend]:
    with closing(open_backend(load)) as backend:
        yield backend


def images(count: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((count, *LVVIT.input.shape), dtype=np.float32)


def infer(backend: Backend, batch: Floats) -> Floats:
    """What a backend writes for a batch, on a place full of NaN."""
    out = np.full((len(batch), *LVVIT.output.shape), np.nan, dtype=np.float32)
    backend.infer(batch, out)
    return out


def test_every_backend_there_is_keeps_the_contract() -> None:
    assert set(KINDS) == set(BACKENDS)


def test_an_answer_is_finite_scores_for_every_sample(backend: Backend) -> None:
    assert np.isfinite(infer(backend, images(BS))).all()


def test_an_answer_is_written_where_it_was_asked_for_and_nowhere_else(backend: Backend) -> None:
    memory = np.full((BS + 2, *LVVIT.output.shape), np.nan, dtype=np.float32)

    backend.infer(images(BS), memory[1:-1])

    assert np.isfinite(memory).all(axis=1).tolist() == [False, *[True] * BS, False]


def test_a_batch_is_taken_from_the_ring_and_answered_in_it(backend: Backend, load: Load) -> None:
    ring = Ring(load.input, load.output)
    given, wanted = ring.inputs[1].array, ring.outputs[2].array
    given[:] = images(BS)

    backend.infer(given, wanted)

    assert wanted.tobytes() == infer(backend, images(BS)).tobytes()
    ring.close()


def test_a_batch_is_not_changed(backend: Backend) -> None:
    batch = images(BS)

    infer(backend, batch)

    assert batch.tobytes() == images(BS).tobytes()


def test_the_same_batch_has_the_same_answer(backend: Backend) -> None:
    assert infer(backend, images(BS)).tobytes() == infer(backend, images(BS)).tobytes()


def test_another_load_gives_the_same_answer(backend: Backend, load: Load) -> None:
    with closing(open_backend(load)) as other:
        assert infer(other, images(BS)).tobytes() == infer(backend, images(BS)).tobytes()


def test_different_samples_have_different_answers(backend: Backend) -> None:
    assert len({row.tobytes() for row in infer(backend, images(BS))}) == BS


def test_an_answer_does_not_depend_on_the_place_in_the_batch(backend: Backend) -> None:
    batch = images(BS)

    turned = infer(backend, batch[::-1].copy())[::-1]

    assert turned.tobytes() == infer(backend, batch).tobytes()


def test_an_answer_does_not_depend_on_its_neighbours(backend: Backend) -> None:
    batch, others = images(BS), images(BS, seed=1)
    others[2] = batch[2]

    assert infer(backend, others)[2].tobytes() == infer(backend, batch)[2].tobytes()


def test_an_answer_does_not_depend_on_padding(backend: Backend) -> None:
    batch = images(BS)
    padded = batch.copy()
    padded[1:] = 0

    assert infer(backend, padded)[0].tobytes() == infer(backend, batch)[0].tobytes()


def test_times_are_h2d_compute_and_d2h_in_ms_from_zero(backend: Backend) -> None:
    times = backend.infer(images(BS), np.empty((BS, *LVVIT.output.shape), dtype=np.float32))

    assert isinstance(times, Times)
    assert min(times) >= 0


def test_closing_twice_is_harmless(backend: Backend) -> None:
    backend.close()

    backend.close()


def test_a_backend_that_is_not_there_is_a_job_error_that_says_which_are() -> None:
    load = replace(simulated_load(Path(), 1), backend="abacus")

    with pytest.raises(JobError, match="unknown backend 'abacus': this worker has acl, ort, simulated"):
        open_backend(load)


# -- files -------------------------------------------------------------------------------------------------------


def other_tensor(load: Load, role: str, **changes: object) -> Load:
    """The load, with one of its tensors as the model's file does not have it."""
    tensor: TensorSpec = getattr(load, role)
    return replace(load, **{role: replace(tensor, **changes)})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("role", "changes", "wanted"),
    [
        ("input", {"name": "picture"}, "picture float32[4, 3, 224, 224]"),
        ("input", {"dtype": "float16"}, "image float16[4, 3, 224, 224]"),
        ("input", {"shape": (1, 3, 224, 224)}, "image float32[1, 3, 224, 224]"),
        ("input", {"shape": (4, 3, 256, 256)}, "image float32[4, 3, 256, 256]"),
        ("output", {"name": "logits"}, "logits float32[4, 1000]"),
        ("output", {"dtype": "float16"}, "features float16[4, 1000]"),
        ("output", {"shape": (4, 150)}, "features float32[4, 150]"),
    ],
)
@pytest.mark.parametrize("kind", FILES)
def test_a_model_with_other_tensors_is_a_job_error_that_names_both(
    tmp_path: Path, kind: str, role: str, changes: Mapping[str, object], wanted: str
) -> None:
    load = KINDS[kind](tmp_path, 4)
    found = str(getattr(load, role))

    with pytest.raises(JobError) as caught:
        open_backend(other_tensor(load, role, **changes))

    assert f"{load.path} has {role} {found}, the job needs {wanted}" in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"no model", b"\x08\x08garbage" * 50], ids=["empty", "text", "garbage"])
@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_no_model_is_a_job_error_by_name(tmp_path: Path, kind: str, data: bytes) -> None:
    load = KINDS[kind](tmp_path, 1)
    Path(load.path).write_bytes(data)

    with pytest.raises(JobError, match=f"cannot load {load.path}"):
        open_backend(load)


@pytest.mark.parametrize("kind", FILES)
def test_a_model_cut_short_is_a_job_error_by_name(tmp_path: Path, kind: str) -> None:
    load = KINDS[kind](tmp_path, 1)
    data = Path(load.path).read_bytes()
    Path(load.path).write_bytes(data[: len(data) // 2])

    with pytest.raises(JobError, match=f"cannot load {load.path}"):
        open_backend(load)


@pytest.mark.parametrize("kind", FILES)
def test_a_model_that_is_not_there_is_a_host_error_by_name(tmp_path: Path, kind: str) -> None:
    load = KINDS[kind](tmp_path, 1)
    Path(load.path).unlink()

    with pytest.raises(HostError, match=f"cannot load {load.path}"):
        open_backend(load)


def test_a_model_computes_what_its_graph_says(tmp_path: Path) -> None:
    """16 x 16 means and a linear layer, in numpy."""
    weights = np.random.default_rng(0).standard_normal((588, 1000), dtype=np.float32)
    batch = images(BS)
    means = batch.reshape(BS, 3, 14, 16, 14, 16).mean(axis=(3, 5), dtype=np.float64).reshape(BS, 588)

    with closing(open_backend(ort_load(tmp_path, BS))) as backend:
        np.testing.assert_allclose(infer(backend, batch), means @ weights, rtol=0, atol=1e-4)


# -- the simulated device ----------------------------------------------------------------------------------------


def simulate(*, device: str = "h:0", **behaviour: object) -> Backend:
    """A simulated device that does as it is told, e.g. ``simulate(faults=[{"kind": "nan"}])``."""
    text = json.dumps({"compute_ms": 0} | behaviour)
    return open_backend(replace(load_of(artifacts.simulated(LVVIT, 2), simulated=text), device=device))


def spoilt(backend: Backend, batch: Floats) -> list[bool]:
    """Which samples of a batch have scores that are no numbers."""
    return [not np.isfinite(row).all() for row in infer(backend, batch)]


def hash_of(sample: Floats) -> str:
    return xxhash.xxh3_64_hexdigest(sample.tobytes())


def test_a_simulated_answer_is_a_function_of_the_samples_bytes() -> None:
    batch = images(2)

    answers = infer(simulate(), batch)

    expected = [scores(xxhash.xxh3_64_intdigest(sample.tobytes()), 1000) for sample in batch]
    assert answers.tobytes() == np.stack(expected).tobytes()


@pytest.mark.parametrize("side", [128, 250, 512])
def test_a_large_simulated_answer_is_that_function_too(side: int) -> None:
    batch, out = images(1), np.empty((1, 5, side, side), np.float32)

    simulate().infer(batch, out)

    assert out.tobytes() == scores(xxhash.xxh3_64_intdigest(batch[0].tobytes()), out.size).tobytes()


def test_smooth_maps_are_functions_of_the_samples_bytes_that_vary_slowly() -> None:
    batch = images(2)
    first, again = np.empty((2, 5, 128, 128), np.float32), np.empty((2, 5, 128, 128), np.float32)

    simulate(smooth=True).infer(batch, first)
    simulate(smooth=True).infer(batch[::-1], again)

    assert first.tobytes() == again[::-1].tobytes()
    assert not np.array_equal(first[0], first[1])
    steps = [np.abs(np.diff(first, axis=axis)).max() for axis in (2, 3)]
    assert max(steps) <= 0.5 < np.ptp(first)  # of 16, over the 32 cells from one point to the next


def test_a_simulated_device_takes_the_time_it_is_told() -> None:
    times = simulate(h2d_ms=2, compute_ms=4, d2h_ms=3).infer(images(2), np.empty((2, 1000), dtype=np.float32))

    assert times.h2d_ms >= 2
    assert times.compute_ms >= 4
    assert times.d2h_ms >= 3


def test_a_slow_device_takes_a_multiple() -> None:
    slow = simulate(compute_ms=2, faults=[{"kind": "slow", "factor": 5}])

    assert slow.infer(images(2), np.empty((2, 1000), dtype=np.float32)).compute_ms >= 10


def test_a_fault_strikes_the_sample_it_names() -> None:
    batch = images(2)

    backend = simulate(faults=[{"kind": "nan", "sample": hash_of(batch[1])}])

    assert spoilt(backend, batch) == [False, True]


def test_a_fault_that_names_no_sample_strikes_all() -> None:
    assert spoilt(simulate(faults=[{"kind": "nan"}]), images(2)) == [True, True]


def test_a_fault_strikes_the_batch_it_names() -> None:
    backend = simulate(faults=[{"kind": "nan", "batch": 2}])

    assert [spoilt(backend, images(2))[0] for _ in range(3)] == [False, True, False]


@pytest.mark.parametrize(("device", "strikes"), [("h:0", False), ("h:1", True)])
def test_a_fault_strikes_the_device_it_names(device: str, strikes: bool) -> None:
    backend = simulate(device=device, faults=[{"kind": "nan", "device": "h:1"}])

    assert spoilt(backend, images(2)) == [strikes, strikes]


@pytest.mark.parametrize("names", [{"sample": "0" * 16}, {"batch": 2}, {"device": "h:7"}])
def test_a_fault_strikes_only_where_all_it_names_fits(names: Mapping[str, object]) -> None:
    batch = images(2)
    fitting = {"sample": hash_of(batch[0]), "batch": 1, "device": "h:0"}

    backend = simulate(faults=[{"kind": "error", **fitting, **names}])

    assert spoilt(backend, batch) == [False, False]


def test_a_fault_that_strikes_once_strikes_one_process_of_all(tmp_path: Path) -> None:
    once = {"kind": "nan", "once": str(tmp_path / "mark")}
    backends = [simulate(faults=[once]), simulate(faults=[once])]

    assert [spoilt(backend, images(2))[0] for backend in [*backends, *backends]] == [True, False, False, False]


def test_a_device_that_is_told_to_fail_says_so() -> None:
    with pytest.raises(DeviceError, match="the simulated device failed, as it was told to"):
        infer(simulate(faults=[{"kind": "error"}]), images(2))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "no JSON",
        '{"speed": 3}',
        '{"faults": [{"kind": "flood"}]}',
        '{"faults": [{"kind": "nan", "bach": 3}]}',
    ],
)
def test_a_behaviour_that_makes_no_sense_is_a_job_error_by_its_variables_name(text: str) -> None:
    with pytest.raises(JobError, match="FARM_SIMULATED describes no simulated device"):
        open_backend(load_of(artifacts.simulated(LVVIT, 1), simulated=text))
