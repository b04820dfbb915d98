"""
A stand-in for the vendor's `aclruntime`, on no card: same members, argument rules, texts and bad manners.

Faithful in what a caller can trip over: positional arguments only; the GIL held through every call (`PyDLL` keeps it);
messages on descriptor 1 by C stdio; float32 wall clock times; `BaseTensor` keeps nothing alive; outputs lie on the
device until `to_host`, and reading one before that aborts; a failed run leaks its inputs; the ACL code of a failed
run is in no exception. Left out: AIPP, dynamic sizes other than the batch, files, pipelines.

An ``.om`` is JSON: `inputs` and `outputs` ([name, dtype, shape], batch axis -1 for a dynamic batch), `gears` (its batch
sizes), `h2d_ms compute_ms d2h_ms`, `workspace` (bytes on the device), `soc`, `rows` (of an answer, whatever the batch
has), `faults`. A fault has a `kind`:

* ``code`` (an ACL `code`, with CANN's complaint, or the `text` given), ``hang``, ``abort``, ``segfault``
* ``gate``: waits, GIL held, until the FIFO `path` is opened for writing
* ``say``: prints `bytes` bytes, and all is well

and strikes `at` "run" (default), "load" or "to_host", when all of `sample` (xxh3 of a row of the input), `batch` (from
1) and `once` (a file that it manages to create) fit. The machine is ``FAKE_ACL``, JSON: `devices` (1), `memory` (bytes
of each), `broken` (indices), `soc`, `age_s` (how long ago sessions seem to have begun), `api` ("T23", "M24", "T25",
"F26"), `trace` (a file that is told of loads, frees and finalize, with the process).

Outputs: per row, float32 normal numbers of deviation 3 from an SFC64 seeded with the xxh3 of the row's bytes.
"""

# ruff: noqa: A001, N801  the vendor's names

from __future__ import annotations

import ctypes
import enum
import json
import math
import os
import re
import stat
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

_libc = ctypes.PyDLL(None)  # unlike CDLL, it keeps the GIL

_BAD_PATH = "please check model path"
_TEXTS = {
    -1: "ACL: general failure",
    1: "ACL: invalid parameter",
    2: "ACL: memory allocation fail",
    3: "ACL: runtime failure",
    1004: "Invalid parameter",
}


class _Machine:
    """What ``FAKE_ACL`` says now."""

    def __init__(self) -> None:
        said = json.loads(os.environ.get("FAKE_ACL") or "{}")
        self.devices: int = said.get("devices", 1)
        self.memory: int = said.get("memory", 1 << 40)
        self.broken: list[int] = said.get("broken", [])
        self.soc: str = said.get("soc", "Ascend310P3")
        self.age_s: float = said.get("age_s", 0.0)
        self.api: str = said.get("api", "T25")
        self.trace: str = said.get("trace", "")


class _Chip:
    """A device's memory, as this process uses it."""

    def __init__(self) -> None:
        self.blocks = 0
        self.used = 0

    def take(self, nbytes: int) -> bool:
        if self.used + nbytes > _Machine().memory:
            return False
        self.blocks += 1
        self.used += nbytes
        return True

    def give(self, nbytes: int) -> None:
        self.blocks -= 1
        self.used -= nbytes


_chips: dict[int, _Chip] = {}
_state = {"initialised": False, "finalised": False, "models": 0}


def _error(code: int) -> RuntimeError:
    return RuntimeError(f"[{code}][{_TEXTS.get(code, 'Error code unknown')}] ")


def _print(line: str) -> None:
    _libc.puts(line.encode())


def _trace(event: str) -> None:
    if path := _Machine().trace:
        with Path(path).open("a") as file:
            file.write(f"{event} {os.getpid()}\n")


def _spend(ms: float) -> float:
    """Sleep with the GIL held; the answer is how long that took by the wall clock, in ms, as a float32."""
    began = time.time()
    if ms > 0:
        _libc.usleep(ctypes.c_uint(int(1000 * ms)))
    return float(np.float32(1000 * (time.time() - began)))


def _positional(what: str, given: tuple[Any, ...], types: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    fits = len(given) == len(types) and all(isinstance(a, b) for a, b in zip(given, types, strict=True))
    if keywords or not fits:
        kind = "constructor" if what == "__init__" else "function"
        raise TypeError(f"{what}(): incompatible {kind} arguments. The following argument types are supported: ...")


class _Dtype(enum.Enum):
    """Element types."""

    float32 = 0
    float16 = 1
    int8 = 2
    int32 = 3
    uint8 = 4
    int16 = 6
    uint16 = 7
    uint32 = 8
    int64 = 9
    uint64 = 10
    double = 11
    bool = 12

    def __int__(self) -> int:
        return int(self.value)


class _Type(enum.Enum):
    """Where memory is."""

    memory_host = 0
    memory_device = 1
    memory_dvpp = 2

    def __int__(self) -> int:
        return int(self.value)


dtype, type = _Dtype, _Type


class session_options:
    """Options of a session."""

    def __init__(self) -> None:
        self.loop = 1
        self.log_level = 2
        self.acl_json_path = ""


class infer_options:
    """Options of a pipeline."""

    def __init__(self) -> None:
        self.output_dir = self.out_format = ""
        self.output_names: list[str] = []
        self.shapes_list: list[str] = []
        self.auto_dym_shape = self.auto_dym_dims = self.pure_infer_mode = False


class tensor_desc:
    """An input or output of a model."""

    def __init__(self) -> None:
        self.name, self.format = "", 2
        self.datatype = _Dtype.float32
        self.shape: list[int] = []
        self.size = self.realsize = 0


class sumary:
    """Times of runs."""

    def __init__(self) -> None:
        self._times: list[Any] = []

    @property
    def exec_time_list(self) -> list[Any]:
        return list(self._times)


_Summary = sumary  # under a name that no version drops


class MemorySummary:
    """Times of copies, in ms; one object for the process."""

    _only: MemorySummary | None = None
    _h2d: list[float]
    _d2h: list[float]

    def __new__(cls) -> MemorySummary:
        if cls._only is None:
            cls._only = super().__new__(cls)
            cls._only.reset()
        return cls._only

    @property
    def H2D_time_list(self) -> list[float]:  # noqa: N802
        return list(self._h2d)

    @property
    def D2H_time_list(self) -> list[float]:  # noqa: N802
        return list(self._d2h)

    def reset(self) -> None:
        self._h2d, self._d2h = [], []


class BaseTensor:
    """Somebody's memory: neither owned nor kept."""

    def __init__(self, *given: Any, **keywords: Any) -> None:
        _positional("__init__", given, (int, int), keywords)
        self._address, self._bytes = given

    @property
    def size(self) -> int:
        return int(self._bytes)


class Tensor:
    """Memory of its own: an output, on the device at first, or a copy of an array, on the host."""

    def __init__(self, *given: Any, **keywords: Any) -> None:
        _positional("__init__", given, (object,), keywords)
        if not _state["initialised"]:
            raise _error(2)
        self._fill(np.frombuffer(given[0], np.uint8).copy(), -1, None)

    def _fill(self, data: np.ndarray[Any, Any], device: int, session: InferenceSession | None) -> None:
        self._data, self._device, self._session = data, device, session
        self._freed = weakref.finalize(self, _chips[device].give, data.nbytes) if device >= 0 else None

    @classmethod
    def _output(cls, data: np.ndarray[Any, Any], session: InferenceSession) -> Tensor:
        tensor = cls.__new__(cls)
        tensor._fill(data, session._device, session)
        return tensor

    @property
    def device(self) -> int:
        return self._device

    @property
    def shape(self) -> list[int]:
        return list(self._data.shape)

    @property
    def dtype(self) -> _Dtype:
        return _Dtype[{"float64": "double"}.get(self._data.dtype.name, self._data.dtype.name)]

    @property
    def type(self) -> _Type:
        return _Type.memory_host if self._device < 0 else _Type.memory_device

    def to_host(self) -> None:
        session = self._session
        if session is None or self._freed is None:
            return
        if session._freed or _state["finalised"]:
            raise _error(2)
        session._strike("to_host", [])
        MemorySummary()._d2h.append(_spend(session._model.get("d2h_ms", 0)))
        self._freed()  # the device's memory is replaced by the host's
        self._device = -1


class _PyBuffer(ctypes.Structure):
    """Room for CPython's Py_buffer."""

    _fields_ = [("words", ctypes.c_void_p * 10)]


@ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_void_p, ctypes.c_int)  # type: ignore[untyped-decorator]
def _get_buffer(tensor: Tensor, view: int, flags: int) -> int:
    if tensor._device >= 0:
        _libc.abort()  # as pybind11 does when the function that describes the buffer throws
    get = ctypes.pythonapi.PyObject_GetBuffer
    get.argtypes = [ctypes.py_object, ctypes.c_void_p, ctypes.c_int]
    return int(get(tensor._data, view, flags))


# The buffer protocol of a class in Python, which has no name for it before 3.12: `tp_as_buffer` is the 20th word of a
# type in CPython on 64 bits, and its first word the function that gives a buffer.
ctypes.cast(
    ctypes.cast(id(Tensor), ctypes.POINTER(ctypes.c_void_p))[20] or 0,
    ctypes.POINTER(ctypes.c_void_p),
)[0] = ctypes.cast(_get_buffer, ctypes.c_void_p).value


class InferenceSession:
    """A model on a device."""

    def __init__(self, *given: Any, **keywords: Any) -> None:
        _positional("__init__", given, (str, int, session_options), keywords)
        self._path, self._device, self._options = given
        self._freed = True
        self._runs = 0
        if not 1 <= self._options.loop <= 100000:
            raise RuntimeError("loop num out of range. Please check.")
        if not 1 <= self._options.log_level <= 4:
            raise RuntimeError("log level out of range. Please check.")
        self._api = _Machine().api
        if not _is_fine(self._path):
            raise _error(1) if self._api == "T23" else RuntimeError(_BAD_PATH)
        if self._options.acl_json_path and not Path(self._options.acl_json_path).is_file():
            raise RuntimeError("please check acl json path")
        if not 0 <= self._device <= 255:
            raise RuntimeError("device id is out of range")
        self._open_device()
        self._load()
        self._born = time.time() - _Machine().age_s
        self._summary = _Summary()
        _trace("load")

    def _open_device(self) -> None:
        machine = _Machine()
        if not _state["initialised"]:
            _state["initialised"] = True
            self._say("acl init success")
        if self._device >= machine.devices:
            raise _error(107001)
        if self._device in machine.broken:
            raise _error(507033)
        if self._device not in _chips:
            _chips[self._device] = _Chip()
            self._say(f"open device {self._device} success")
        self._chip = _chips[self._device]
        self._say("create new context")

    def _load(self) -> None:
        if _state["finalised"]:
            raise _error(1)
        try:
            self._model: dict[str, Any] = json.loads(Path(self._path).read_bytes())
            self._inputs = [_desc(tensor, self._model.get("gears")) for tensor in self._model["inputs"]]
            self._outputs = [_desc(tensor, self._model.get("gears")) for tensor in self._model["outputs"]]
        except (ValueError, KeyError, TypeError) as exc:
            self._complain("E19999: Inner Error!\nE19999  Parse model failed.")
            raise _error(1) from exc
        if self._model.get("soc", _Machine().soc) != _Machine().soc:
            self._complain("E19999: Inner Error!\nE19999  Assert stream_list.size() failed, stream_list.size(): 0")
            raise _error(1)
        self._strike("load", [])
        self._workspace = self._model.get("workspace", 0)
        if not self._chip.take(self._workspace):
            self._complain(f"EL0004: [PID: {os.getpid()}] 2025-03-18-09:02:18.501.341 Failed to allocate memory.")
            raise _error(1)
        self._freed = False
        _state["models"] += 1
        self._model_id = _state["models"]
        self._say(f"load model {self._path} success")
        self._say("create model description success")
        self._bs: int | None = None

    # -- describing ----------------------------------------------------------------------------------------------

    def get_inputs(self) -> list[tensor_desc]:
        return list(self._inputs)

    def get_outputs(self) -> list[tensor_desc]:
        return list(self._outputs)

    def options(self) -> session_options:
        options: session_options = self._options
        return options

    def sumary(self) -> _Summary:
        return self._summary

    def reset_sumaryinfo(self) -> None:
        self._summary._times.clear()

    def set_context(self) -> int:
        return 0

    def set_staticbatch(self) -> int:
        if self._freed:
            raise _error(1)
        return 0

    def get_max_dym_batchsize(self) -> int:
        return int(max(self._model.get("gears") or [0]))

    def set_dynamic_batchsize(self, *given: Any, **keywords: Any) -> int:
        _positional("set_dynamic_batchsize", given, (int,), keywords)
        gears = self._model.get("gears") or []
        if self._freed:
            raise _error(1)
        if not 0 < given[0] <= max(gears or [0]):
            raise RuntimeError("dynamic batchsize out of range. Please check.")
        if given[0] not in gears:
            raise _error(1)
        self._bs = given[0]
        for desc in (*self._inputs, *self._outputs):
            desc.realsize = desc.size // max(gears) * given[0]
        return 0

    # -- running -------------------------------------------------------------------------------------------------

    def run(self, *given: Any, **keywords: Any) -> list[Tensor]:
        names, feeds = _feeds(given, keywords)
        if self._freed:
            raise _error(1)
        self._runs += 1
        if len(feeds) != len(self._inputs):
            raise _error(-1 if self._api == "M24" or not isinstance(feeds[0], BaseTensor) else 3)
        began = time.time()
        for taken, feed in enumerate(feeds):  # never given back by a run that fails
            if isinstance(feed, BaseTensor) and not self._chip.take(feed.size):
                for other in feeds[:taken]:
                    self._chip.give(other.size)
                raise RuntimeError("copy mem to device failed! cause: malloc device memory data failed!")
        data = [_bytes_of(feed) for feed in feeds]
        MemorySummary()._h2d.append(_spend(self._model.get("h2d_ms", 0)))
        if any(len(d) != desc.realsize for d, desc in zip(data, self._inputs, strict=True)):
            raise _error(-1)
        if self._model.get("gears") and self._bs is None:
            raise _error(-1)
        bs = self._bs or self._inputs[0].shape[0]
        rows = [data[0][i * len(data[0]) // bs : (i + 1) * len(data[0]) // bs] for i in range(bs)]
        began = time.time()
        self._strike("run", rows)
        _spend(self._model.get("compute_ms", 0))
        self._note(began)
        known = {desc.name: desc for desc in self._outputs}
        if any(name not in known for name in names):
            raise _error(-1)
        outputs = [self._answer(known[name], rows) for name in names]
        for feed in feeds:
            if isinstance(feed, BaseTensor):
                self._chip.give(feed.size)
        return outputs

    def _answer(self, desc: tensor_desc, rows: list[bytes]) -> Tensor:
        shape = (len(rows), *desc.shape[1:])
        kind = np.dtype({"double": "float64"}.get(desc.datatype.name, desc.datatype.name))
        count = math.prod(shape[1:])
        table = [np.random.Generator(np.random.SFC64(xxhash.xxh3_64_intdigest(row))) for row in rows]
        numbers = np.stack([g.standard_normal(count, dtype=np.float32) * np.float32(3) for g in table])
        if "rows" in self._model:
            numbers = np.resize(numbers, (self._model["rows"], count))
            shape = (len(numbers), *shape[1:])
        if not self._chip.take(numbers.size * kind.itemsize):
            raise _error(2)
        return Tensor._output(numbers.astype(kind).reshape(shape), self)

    def _note(self, began: float) -> None:
        start, end = (float(np.float32(1000 * (at - self._born))) for at in (began, time.time()))
        self._summary._times.append(float(np.float32(end - start)) if self._api == "T23" else (start, end))

    def _strike(self, at: str, rows: list[bytes]) -> None:
        for fault in self._model.get("faults", []):
            fits = fault.get("at", "run") == at and fault.get("batch", self._runs) == self._runs
            if not fits or not _names_one(fault, rows):
                continue
            if "once" in fault and not _first(fault["once"]):
                continue
            kind = fault["kind"]
            if kind == "hang":
                while True:
                    _libc.sleep(3600)
            elif kind == "abort":
                _libc.abort()
            elif kind == "segfault":
                ctypes.string_at(0)
            elif kind == "gate":
                _libc.close(_libc.open(fault["path"].encode(), os.O_RDONLY))
            elif kind == "say":
                _print("x" * fault["bytes"])
            else:
                self._complain(fault.get("text", _complaint(fault.get("code", 0))))
                if at == "run":
                    _print(f"[ERROR] execute model failed, modelId is {self._model_id}")
                    _print("acl execute failed:1")
                raise _error(1 if at == "load" else -1)

    def _complain(self, text: str) -> None:
        _print(f"[ACL ERROR] {text}")

    def _say(self, text: str) -> None:
        if self._options.log_level <= 2:
            _print(f"[INFO] {text}")

    # -- leaving -------------------------------------------------------------------------------------------------

    def free_resource(self) -> int:
        if self._freed:
            return 1
        self._freed = True
        self._chip.give(self._workspace)
        _trace("free")
        return 0

    @staticmethod
    def finalize() -> int:
        _state["finalised"] = True
        _trace("finalize")
        return 0


def model(modelPath: str, deviceId: int = 0, options: session_options | None = None, /) -> InferenceSession:  # noqa: N803
    """As `InferenceSession`; without options it dies, as the vendor's does."""
    if options is None:
        ctypes.string_at(0)
    return InferenceSession(modelPath, deviceId, options)


def _is_fine(path: str) -> bool:
    """The module's own rules for a model's file."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return (
        stat.S_ISREG(status.st_mode)
        and not status.st_mode & 0o022
        and os.access(path, os.R_OK)
        and path.endswith(".om")
        and status.st_size <= 64 << 30
        and re.fullmatch(r"[A-Za-z0-9_./-]+", path) is not None
        and len([part for part in path.split("/") if part]) <= 32
    )


def _desc(tensor: list[Any], gears: list[int] | None) -> tensor_desc:
    name, kind, shape = tensor
    desc = tensor_desc()
    desc.name, desc.shape = name, list(shape)
    desc.datatype = _Dtype[{"float64": "double"}.get(kind, kind)]
    rows = max(gears) if gears else shape[0]
    desc.size = desc.realsize = rows * math.prod(shape[1:]) * np.dtype(kind).itemsize
    return desc


def _feeds(given: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[list[str], list[Any]]:
    _positional("run", given, (list, (list, dict)), keywords)
    names, feeds = given
    feeds = list(feeds.values()) if isinstance(feeds, dict) else feeds
    if not all(isinstance(name, str) for name in names) or not all(isinstance(f, (BaseTensor, Tensor)) for f in feeds):
        _positional("run", (), (list,), {})
    return names, feeds


def _bytes_of(feed: BaseTensor | Tensor) -> bytes:
    return ctypes.string_at(feed._address, feed.size) if isinstance(feed, BaseTensor) else feed._data.tobytes()


def _complaint(code: int) -> str:
    """What CANN says of a code, in its manner: the module itself prints no number."""
    return (
        f"EZ9999: Inner Error!\nEZ9999[PID: {os.getpid()}] 2026-01-09-00:09:55.447.249 (EZ9999):  The error from "
        "device(chipId:0, dieId:0), serial number is 330.[FUNC:Print][FILE:device.cc][LINE:645]\n"
        "        TraceBack (most recent call last):\n"
        f"       synchronize stream failed, runtime result = {code}[FUNC:ReportCallError][FILE:log_inner.cpp][LINE:161]"
    )


def _names_one(fault: dict[str, Any], rows: list[bytes]) -> bool:
    return "sample" not in fault or fault["sample"] in [xxhash.xxh3_64_hexdigest(row) for row in rows]


def _first(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    return True


# The API as other versions have it, all of which call themselves 0.0.2.
if _Machine().api == "F26":
    summary = sumary
    InferenceSession.summary = InferenceSession.sumary  # type: ignore[attr-defined]
    InferenceSession.reset_summaryinfo = InferenceSession.reset_sumaryinfo  # type: ignore[attr-defined]
    del sumary, InferenceSession.sumary, InferenceSession.reset_sumaryinfo
elif _Machine().api == "T23":
    _finalize = InferenceSession.finalize
    InferenceSession.finalize = lambda _self: _finalize()  # type: ignore[method-assign,assignment,misc]

# The vendor exports the enums' values too, and so hides Python's `bool`.
globals().update({member.name: member for kind in (_Dtype, _Type) for member in kind})
