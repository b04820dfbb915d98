"""Checkpoints: what is taken, what is refused with which sentence, and that nothing in them is ever run."""

from __future__ import annotations

import argparse
import pickle
import random
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from farm.artifacts import sha256_of
from farm.errors import DataError, UsageError
from farm.export.checkpoint import fingerprint, load_checkpoint

JARGON = ("weights_only", "weights only", "Unpickl", "safe_globals", "PytorchStreamReader", "zip archive", "Traceback")


class Tiny(nn.Module):
    """Seven keys, an integer among them."""

    def __init__(self, fill: float = 0.0) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)
        self.bn = nn.BatchNorm1d(2)
        nn.init.constant_(self.head.weight, fill)
        nn.init.constant_(self.head.bias, fill)


class Malicious:
    """Unpickled, it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.touch, (self.marker,))


def weights() -> dict[str, Tensor]:
    return Tiny(fill=1.5).state_dict()


def saved(path: Path, content: object, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def refusal(path: Path, error: type[Exception] = DataError) -> str:
    """The sentence with which a checkpoint is refused, after the checks that hold for every such sentence."""
    net = Tiny()
    with pytest.raises(error) as caught:
        load_checkpoint(path, net)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert not any(word in message for word in JARGON)
    assert net.head.weight.eq(0).all(), "a refused checkpoint must leave the network as it was"
    return message


def assert_loaded(net: Tiny) -> None:
    assert net.head.weight.eq(1.5).all()
    assert net.head.bias.eq(1.5).all()


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda state: state, id="bare"),
        pytest.param(lambda state: {"state_dict": state, "epoch": 300}, id="state_dict"),
        pytest.param(lambda state: {"model": state, "optimizer": {}}, id="model"),
        pytest.param(lambda state: {f"module.{name}": tensor for name, tensor in state.items()}, id="module."),
        pytest.param(lambda state: {"state_dict": {f"module.{n}": t for n, t in state.items()}}, id="both"),
        pytest.param(lambda state: OrderedDict((n, nn.Parameter(t, False)) for n, t in state.items()), id="parameters"),
    ],
)
def test_a_state_dict_is_taken_in_every_wrapping(wrap: Callable[[dict[str, Tensor]], Any], tmp_path: Path) -> None:
    net = Tiny()

    load_checkpoint(saved(tmp_path / "w.pth", wrap(weights())), net)

    assert_loaded(net)


def test_the_file_format_of_before_pytorch_1_6_is_taken(tmp_path: Path) -> None:
    net = Tiny()

    load_checkpoint(saved(tmp_path / "w.pth", weights(), _use_new_zipfile_serialization=False), net)

    assert_loaded(net)


def test_half_precision_weights_are_taken_as_the_networks_type(tmp_path: Path) -> None:
    net = Tiny()
    state = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in weights().items()}

    load_checkpoint(saved(tmp_path / "w.pth", state), net)

    assert_loaded(net)
    assert net.head.weight.dtype == torch.float32


def test_a_fingerprint_is_the_files_sha256(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", weights())

    assert fingerprint(path) == sha256_of(path)


def test_a_missing_file_is_a_mistake_in_the_command(tmp_path: Path) -> None:
    assert "there is no checkpoint" in refusal(tmp_path / "none.pth", UsageError)


def test_a_fingerprint_of_a_missing_file_is_refused_alike(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no checkpoint"):
        fingerprint(tmp_path / "none.pth")


def test_a_directory_is_refused_as_one(tmp_path: Path) -> None:
    assert "is a directory" in refusal(tmp_path)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old format"])
@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_refused_as_cut_short(fraction: float, old: bool, tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", weights(), _use_new_zipfile_serialization=not old)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * fraction)])

    assert f"cut short or something else ({path.stat().st_size} bytes)" in refusal(path)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"<!DOCTYPE html><html>Quota exceeded</html>", id="web page"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", id="lfs pointer"),
        pytest.param(random.Random(0).randbytes(4096), id="noise"),
        pytest.param(bytes(4096), id="zeros"),
        pytest.param(pickle.dumps({"head.weight": 1.0}, protocol=2), id="plain pickle"),
        pytest.param(pickle.dumps({"head.weight": 1.0}, protocol=4), id="newer pickle"),
    ],
)
def test_a_file_that_is_something_else_is_refused_as_no_checkpoint(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(content)

    assert "is no PyTorch checkpoint of tensors" in refusal(path)


def test_a_flipped_bit_in_a_tensor_is_noticed(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", weights())
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(np.full(6, 1.5, np.float32).tobytes())] ^= 1
    path.write_bytes(damaged)

    assert "is damaged" in refusal(path)


@pytest.mark.parametrize("seed", range(60))
def test_random_damage_is_never_more_than_a_data_error(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    path = saved(tmp_path / "w.pth", weights(), _use_new_zipfile_serialization=bool(seed % 2))
    damaged = bytearray(path.read_bytes())
    for _ in range(12):
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    path.write_bytes(damaged)

    with suppress(DataError):  # not raised where the damage hit nothing that matters
        load_checkpoint(path, Tiny())


@pytest.mark.parametrize("save", ["torch.save", "old format", "pickle"])
def test_a_malicious_pickle_is_refused_and_not_run(save: str, tmp_path: Path) -> None:
    path, marker = tmp_path / "w.pth", tmp_path / "marker"
    content = {"state_dict": weights(), "extra": Malicious(marker)}
    if save == "pickle":
        path.write_bytes(pickle.dumps(Malicious(marker), protocol=2))
    else:
        saved(path, content, _use_new_zipfile_serialization=save == "torch.save")

    message = refusal(path)

    assert "Nothing was called" in message
    assert not marker.exists()
    if save != "pickle":  # the file is one that would bite, were it unpickled
        torch.load(path, weights_only=False)
        assert marker.exists()


def test_a_checkpoint_with_an_object_of_its_trainers_says_what_it_wants_called(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", {"state_dict": weights(), "args": types.SimpleNamespace(lr=1e-3)})

    assert "types.SimpleNamespace" in refusal(path)


class Config(dict[str, Any]):
    """What training code keeps its settings in: a dict with a state of its own."""

    __module__ = "yacs.config"
    __qualname__ = "CfgNode"

    def __init__(self, **settings: Any) -> None:
        super().__init__(settings)
        self.__dict__["__immutable__"] = True


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old format"])
def test_a_checkpoint_with_focals_configuration_is_taken(
    old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pickled by the name it has where it comes from, which need not be installed where it is read.
    yacs = types.ModuleType("yacs.config")
    yacs.CfgNode = Config  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", yacs)
    config = Config(DATA=Config(IMG_SIZE=224), AMP="O1", LEVELS=[2, 2])
    content = {"model": weights(), "optimizer": {}, "max_accuracy": np.float64(83.6), "epoch": 299, "config": config}
    path = saved(tmp_path / "focal.pth", content, _use_new_zipfile_serialization=not old)
    monkeypatch.delitem(sys.modules, "yacs.config")
    net = Tiny()

    load_checkpoint(path, net)

    assert_loaded(net)


def test_a_checkpoint_with_the_training_arguments_is_taken(tmp_path: Path) -> None:
    net = Tiny()

    load_checkpoint(saved(tmp_path / "w.pth", {"state_dict": weights(), "args": argparse.Namespace(lr=1e-3)}), net)

    assert_loaded(net)


def test_keys_of_training_alone_are_passed_over_and_no_others(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", {**weights(), "auxiliary_head.bias": torch.zeros(1)})
    net = Tiny()

    load_checkpoint(path, net, training_only=("auxiliary_head.",))

    assert_loaded(net)
    assert "1 unexpected (auxiliary_head.bias)" in refusal(path)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        pytest.param([torch.zeros(2)], "a list", id="list"),
        pytest.param(torch.zeros(2), "a tensor (float32 [2])", id="tensor"),
        pytest.param({}, "an empty dict", id="empty"),
        pytest.param({"state_dict": {}}, "an empty dict", id="empty inside"),
        pytest.param({"state_dict": 7}, "an int", id="number inside"),
        pytest.param({"epoch": 3, "net": {"head.weight": torch.zeros(2)}}, "2 are no plain tensors", id="other key"),
        pytest.param({**Tiny().state_dict(), "epoch": 3}, "1 are no plain tensors by name ('epoch': an int)", id="mix"),
        pytest.param({0: torch.zeros(2)}, "1 are no plain tensors by name (0: a tensor", id="numbered"),
        pytest.param({"head.weight": torch.zeros(2).to_sparse()}, "1 are no plain tensors", id="sparse"),
        pytest.param({"head.weight": torch.zeros(2, device="meta")}, "1 are no plain tensors", id="without values"),
    ],
)
def test_what_is_no_state_dict_is_named(content: object, found: str, tmp_path: Path) -> None:
    assert found in refusal(saved(tmp_path / "w.pth", content))


def test_missing_keys_are_counted_and_the_first_named(tmp_path: Path) -> None:
    state = {"head.weight": weights()["head.weight"]}

    message = refusal(saved(tmp_path / "w.pth", state))

    assert "of 7 keys expected and 1 found, 6 missing (head.bias, bn.weight, bn.bias and 3 more)." in message


def test_unexpected_keys_are_counted_and_the_first_named(tmp_path: Path) -> None:
    state = {**weights(), "tail.weight": torch.zeros(1), "tail.bias": torch.zeros(1)}

    assert "9 found, 2 unexpected (tail.weight, tail.bias)." in refusal(saved(tmp_path / "w.pth", state))


def test_misshaped_keys_come_with_both_shapes(tmp_path: Path) -> None:
    state = {**weights(), "head.weight": torch.zeros(10, 3)}

    message = refusal(saved(tmp_path / "w.pth", state))

    assert "1 misshaped (head.weight: expected float32 [2, 3], found float32 [10, 3])." in message


def test_integers_are_no_weights(tmp_path: Path) -> None:
    state = {**weights(), "head.bias": torch.zeros(2, dtype=torch.int64)}

    assert "head.bias: expected float32 [2], found int64 [2]" in refusal(saved(tmp_path / "w.pth", state))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_are_counted_and_named(value: float, tmp_path: Path) -> None:
    state = weights()
    state["head.weight"][1, :2] = value

    message = refusal(saved(tmp_path / "w.pth", state))

    assert "NaN or infinite weights in 1 of 7 tensors (head.weight: 2 of 6 values)" in message


def test_weights_too_large_for_the_networks_type_are_not_finite_either(tmp_path: Path) -> None:
    state = {**weights(), "head.bias": torch.tensor([1e300, 0.0], dtype=torch.float64)}

    assert "head.bias: 1 of 2 values" in refusal(saved(tmp_path / "w.pth", state))
