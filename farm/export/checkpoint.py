"""
Checkpoints: what a user's weights file may be, and how it gets into a network.

Nothing but tensors is ever unpickled: a checkpoint comes from the internet, and a pickle can run any code.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from farm.artifacts import sha256_of
from farm.errors import DataError, UsageError

WRAPPERS = ("state_dict", "model")  #: keys under which training scripts keep the state dict

PREFIX = "module."  #: what data-parallel training puts before every name
NAMED = 3  #: how many of a kind of wrong keys a message names


def fingerprint(path: Path) -> str:
    """The file's sha256. Raises as `load_checkpoint` does for a file that cannot be read."""
    with _opened(path):
        return sha256_of(path)


def load_checkpoint(path: Path, net: nn.Module, *, training_only: tuple[str, ...] = ()) -> None:
    """
    Put the checkpoint's weights into the network, all of them or none.

    The file holds a dict of tensors, bare or under one of `WRAPPERS`, its names with or without `PREFIX`; those that
    begin with one of `training_only` are passed over. Any floating type will do, the network keeps its own.
    `UsageError` for a missing file, `DataError` for one that does not fit.
    """
    found = _state_dict(path, _unpickled(path))
    state = {name: tensor for name, tensor in found.items() if not name.startswith(training_only)}
    expected = net.state_dict()
    _check_keys(path, type(net).__name__, expected, state)
    fitted = {name: state[name].detach().to(tensor.dtype) for name, tensor in expected.items()}
    _check_finite(path, fitted)
    net.load_state_dict(fitted)


class _Inert:
    """Stands for an object that is not wanted: takes whatever it is made of, and does nothing with it."""

    def __new__(cls, *_contents: object) -> Any:
        return super().__new__(cls)

    def __setstate__(self, _state: object) -> None:
        pass


class _InertDict(_Inert):
    """The same for an object that is a dict: PyTorch's unpickler fills this type of the standard library's."""

    def __new__(cls, *_contents: object) -> Any:
        return OrderedDict()


#: What official checkpoints hold beside their tensors: Focal its configuration, others their training's arguments or
#: a best score. Each is read as a thing that calls nothing.
_INERT: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_InertDict, "yacs.config.CfgNode"),
    (_Inert, "argparse.Namespace"),
    (_Inert, "numpy.core.multiarray.scalar"),
    (_Inert, "numpy._core.multiarray.scalar"),
    (_Inert, "numpy.dtype"),
]


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        file = path.open("rb")
    except FileNotFoundError as exc:
        raise UsageError(f"there is no checkpoint {path}: give the path of the model's weights file") from exc
    except IsADirectoryError as exc:
        raise DataError(f"{path} is a directory, expected a checkpoint file") from exc
    except OSError as exc:
        raise DataError(f"cannot read the checkpoint {path}: {exc.strerror}") from exc
    with file:
        yield file


def _unpickled(path: Path) -> Any:
    with _opened(path) as file, warnings.catch_warnings(), torch.serialization.safe_globals(_INERT):
        warnings.simplefilter("ignore")
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
            damaged = _damaged_entry(file)
        except Exception as exc:  # a damaged file makes the unpickler stumble in any way there is
            raise DataError(_refusal(path, exc)) from exc
    if damaged:
        raise DataError(f"{path} is damaged: the checksum of its entry {damaged} is wrong. Fetch it again.")
    return content


def _damaged_entry(file: BinaryIO) -> str | None:
    """PyTorch itself takes tensors with flipped bits without a word."""
    if not zipfile.is_zipfile(file):
        return None  # the format of before 1.6 has no checksums
    with zipfile.ZipFile(file) as archive:
        return archive.testzip()


def _refusal(path: Path, exc: Exception) -> str:
    # PyTorch's texts differ by version but all name what the pickle wants to call after this word.
    if wanted := re.search(r"\bGLOBAL ([\w.]+)", str(exc)):
        return (
            f"{path} was not loaded: it wants {wanted[1]} to be called on loading, and the farm loads nothing but "
            "tensors. Nothing was called. Use a checkpoint that holds the state dict alone."
        )
    return (
        f"{path} is no PyTorch checkpoint of tensors: it is damaged, cut short or something else "
        f"({path.stat().st_size} bytes). Fetch it again and compare its size."
    )


def _state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and wrapper in content:
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise DataError(f"{path} holds {_kind(content)}, expected a state dict: tensors by name")
    strange = [f"{key!r}: {_kind(value)}" for key, value in content.items() if not _is_plain(key, value)]
    if strange:
        raise DataError(
            f"{path} holds no state dict, bare or under {' or '.join(WRAPPERS)}: of its {len(content)} entries "
            f"{len(strange)} are no plain tensors by name ({_some(strange)})"
        )
    return {name.removeprefix(PREFIX): tensor for name, tensor in content.items()}


def _is_plain(key: object, value: object) -> bool:
    return (
        isinstance(key, str)
        and isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )


def _kind(value: object) -> str:
    if isinstance(value, Mapping) and not value:
        return "an empty dict"
    if isinstance(value, Tensor):
        return f"a tensor ({_describe(value)})"
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _check_keys(path: Path, net: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    misshaped = [
        f"{name}: expected {_describe(tensor)}, found {_describe(found[name])}"
        for name, tensor in expected.items()
        if name in found and not _fits(tensor, found[name])
    ]
    problems = [
        f"{len(names)} {problem} ({_some(names)})"
        for problem, names in (("missing", missing), ("unexpected", unexpected), ("misshaped", misshaped))
        if names
    ]
    if problems:
        raise DataError(
            f"{path} does not fit {net}: of {len(expected)} keys expected and {len(found)} found, "
            f"{', '.join(problems)}. Are these the weights of this model?"
        )


def _fits(expected: Tensor, found: Tensor) -> bool:
    return expected.shape == found.shape and expected.is_floating_point() == found.is_floating_point()


def _check_finite(path: Path, state: Mapping[str, Tensor]) -> None:
    broken = [
        f"{name}: {int((~tensor.isfinite()).sum())} of {tensor.numel()} values"
        for name, tensor in state.items()
        if not tensor.isfinite().all()
    ]
    if broken:
        raise DataError(
            f"{path} has NaN or infinite weights in {len(broken)} of {len(state)} tensors ({_some(broken)}): "
            "no score can come of them. Use another checkpoint."
        )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
