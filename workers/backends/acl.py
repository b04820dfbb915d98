"""
An ``.om`` on an Ascend NPU, through the vendor's module `aclruntime`.

The module holds Python's GIL through every call, cannot be interrupted, and may abort: deadlines, and the end of a
process that broke, are the business of whoever holds this process. A failed run leaks its inputs on the device, so
after an error from `infer` the process is to be replaced. All its versions call themselves 0.0.2: members are probed.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from time import perf_counter
from typing import Any

import numpy as np

from farm.errors import DataError, DeviceError, FarmError, HostError, JobError
from farm.leash import ROOT
from workers.backends import acl_codes
from workers.backends.acl_codes import Blame
from workers.backends.base import Array, Backend, Load, TensorSpec, Times

#: `aclruntime.dtype`, by value.
_DTYPES = {
    0: "float32", 1: "float16", 2: "int8", 3: "int32", 4: "uint8", 6: "int16", 7: "uint16", 8: "uint32", 9: "int64",
    10: "uint64", 11: "float64", 12: "bool",
}  # fmt: skip
_MEMBERS = ("InferenceSession", "session_options", "BaseTensor")
_MAX_BYTES, _MAX_DEPTH = 64 << 30, 32
_IMPORT_S = 60.0
_ANSWER = "farm: "
#: How much of what was printed during a call is looked at: the end, where the complaint is.
_SAID_BYTES = 1 << 16
#: An interval by the module's clock counts while that clock's step is not more of it than this.
_FIT = 0.01

#: The compiler names an output after the operator, the operator's output and, mostly, the graph's output.
_COMPILED = re.compile(r".+:\d+(?::(?P<tensor>.+))?")
_CODED = re.compile(r"\[(-?\d+)\]\[.*\]")
#: Why a model does not load, by CANN's words. Hosts may have different CANNs, a job's devices have one chip.
_LOAD_HINTS: tuple[tuple[re.Pattern[str], type[FarmError], str], ...] = (
    (re.compile(r"stream_list\.size\(\): 0"), JobError, "it was compiled for another chip: compile it for this one"),
    (re.compile(r"Invalid opp version"), HostError, "another version of CANN compiled it: use this one"),
)


class AclBackend(Backend):
    """One session of one model, static or with a dynamic batch, fed from where a batch lies."""

    def __init__(self, acl: Any, load: Load) -> None:
        self._acl, self._load = acl, load
        self._device = int(load.device.rpartition(":")[2])
        self._where = f"device {load.device}"
        self._stdout = _Stdout()
        self._pid = os.getpid()
        self._worked = False
        self._session: Any = None
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def infer(self, batch: Array, out: Array) -> Times:
        session = self._session
        if session is None or os.getpid() != self._pid:
            raise DeviceError(f"{self._where} is not open in this process: a session survives no fork")
        given = np.ascontiguousarray(batch)  # the module sees an address, no strides; the ring's are contiguous
        if given.nbytes != self._load.input.nbytes:
            raise JobError(f"{self._load.path} takes {self._load.input.nbytes} bytes, the batch has {given.nbytes}")
        self._clock.reset()
        ran = 0.0
        try:
            with self._stdout:
                began = perf_counter()
                feed = self._acl.BaseTensor(given.ctypes.data, given.nbytes)
                (answer,) = session.run([self._output], [feed])
                ran = perf_counter()
                answer.to_host()
                ended = perf_counter()
        except Exception as exc:  # what the module throws is of many classes
            raise self._failed(exc, running=ran == 0.0) from exc
        self._take(answer, out)
        self._worked = True
        return Times(*self._clock.split(1000 * (ran - began)), 1000 * (ended - ran))

    def close(self) -> None:
        session, self._session = self._session, None
        if session is not None and os.getpid() == self._pid:
            with suppress(Exception):  # it returns a code; whatever it does, we leave
                session.free_resource()
        self._stdout.close()

    def _open(self) -> None:
        acl, load = self._acl, self._load
        try:
            with self._stdout:
                self._session = acl.InferenceSession(load.path, self._device, acl.session_options())
        except Exception as exc:
            raise self._refused(exc) from exc
        _finalize_at_exit(self._session)
        try:
            with self._stdout:
                self._check_tensors()
        except FarmError:
            raise
        except Exception as exc:
            raise HostError(f"this aclruntime does not describe {load.path} as expected: {exc}") from exc
        self._clock = Clock(acl, self._session)

    def _check_tensors(self) -> None:
        """`JobError` unless the model has exactly the job's tensors, or has them after its batch size was set."""
        session, load = self._session, self._load
        inputs, outputs = session.get_inputs(), session.get_outputs()
        self._dynamic = len(inputs) == 1 and list(inputs[0].shape[:1]) == [-1]
        self._check("input", inputs, load.input)
        self._check("output", outputs, load.output)
        self._output = outputs[0].name
        self._largest = int(outputs[0].size)
        if self._dynamic:
            bs = load.input.shape[0]
            try:
                session.set_dynamic_batchsize(bs)
            except RuntimeError as exc:
                raise JobError(
                    f"{load.path} has no batch size {bs} ({_text(exc)}): compile the model with it among its sizes"
                ) from exc
        wanted = int(session.get_inputs()[0].realsize)
        if wanted != load.input.nbytes:
            raise JobError(
                f"{load.path} takes {wanted} bytes a batch, the job's have {load.input.nbytes}: "
                "compile the model for this input and batch size"
            )

    def _check(self, role: str, found: Sequence[Any], expected: TensorSpec) -> None:
        given = [_spec(desc, expected.name) for desc in found]
        shape = expected.shape
        if self._dynamic and len(given) == 1 and given[0].shape:  # an output may show its largest batch instead of -1
            shape = (given[0].shape[0], *shape[1:])
        if [(t.name, t.dtype, t.shape) for t in given] != [(expected.name, expected.dtype, shape)]:
            listing = ", ".join(map(str, given))
            raise JobError(
                f"{self._load.path} has {role} {listing}, the job needs {expected}: "
                "compile the model for this batch size"
            )

    def _take(self, answer: Any, out: Array) -> None:
        """Copy an output on the host into its place."""
        if answer.device >= 0:  # to look into the device's memory may abort the process
            raise DeviceError(f"{self._where} left an output of {self._load.path} on the device")
        try:
            host = np.frombuffer(answer, np.uint8)
        except (TypeError, ValueError, BufferError) as exc:
            raise DeviceError(f"{self._where} gave an output that cannot be read: {exc}") from exc
        if host.nbytes != out.nbytes and not (self._dynamic and out.nbytes < host.nbytes == self._largest):
            raise JobError(
                f"{self._load.path} answers with {host.nbytes} bytes, the job needs {self._load.output}, "
                f"which is {out.nbytes}: compile the model for this batch size"
            )
        out[...] = host[: out.nbytes].view(out.dtype).reshape(out.shape)

    def _refused(self, exc: Exception) -> FarmError:
        """Why there is no session."""
        text, said, path = _text(exc), self._stdout.said, self._load.path
        coded = _CODED.match(text)
        if isinstance(exc, TypeError):
            return HostError(f"this aclruntime does not open models as expected: {text}")
        if "check model path" in text:
            return HostError(f"cannot load {path}: aclruntime refuses the path, though it should not: {text}")
        if coded is None:
            return DeviceError(f"cannot open {self._where}: {text}")
        code = int(coded[1])
        if code == 107001:
            return DeviceError(f"{self._where} is not there ({text}): compare npu-smi and ASCEND_RT_VISIBLE_DEVICES")
        if code >= 100000:  # ACL's own, which shows only when the device is opened
            return DeviceError(f"cannot open {self._where}: {acl_codes.meaning(code)}")
        found = acl_codes.find(said)
        whom = acl_codes.blame(found) if found is not None else None
        detail = f"{text}{_complaint(said)}"
        if whom is Blame.MEMORY:
            return JobError(
                f"cannot load {path}: {self._where} has no memory for it at batch size {self._load.input.shape[0]}. "
                f"Compile it for a smaller one, or end what else uses the device. {detail}"
            )
        if found is not None and whom is not Blame.OURS:
            return DeviceError(f"{self._where} cannot load {path}: {acl_codes.meaning(found)}. {detail}")
        for words, error, hint in _LOAD_HINTS:
            if words.search(said):
                return error(f"cannot load {path}: {hint}. {detail}")
        return JobError(f"cannot load {path}: it is no model, or one for another chip or CANN. {detail}")

    def _failed(self, exc: Exception, *, running: bool) -> FarmError:
        """Whose fault a failed run is."""
        text, said = _text(exc), self._stdout.said
        code = acl_codes.find(said)
        if code is None and running and re.search(r"malloc device memory|memory allocation fail", text):
            code = 207001
        if code is None:
            return DeviceError(f"{self._where} failed to run {self._load.path}: {text}{_complaint(said)}")
        reason = f"{self._where} failed to run {self._load.path}: {acl_codes.meaning(code)}. {text}{_complaint(said)}"
        kinds: dict[Blame, type[FarmError]] = {
            Blame.BATCH: DataError,
            Blame.OURS: JobError,
            # What fitted once would fit now, but for somebody else on the device.
            Blame.MEMORY: DeviceError if self._worked else JobError,
        }
        return kinds.get(acl_codes.blame(code), DeviceError)(reason)


class Clock:
    """
    The module's own times of a run where they are fit to be used, ours where they are not.

    Its intervals are of float32 wall clock times, whose step grows with the session's age: 1 ms after five hours.
    Its lists grow for ever unless they are reset, and have other names in other versions.
    """

    def __init__(self, acl: Any, session: Any) -> None:
        self._summary = _member(session, "sumary", "summary")
        self._reset = _member(session, "reset_sumaryinfo", "reset_summaryinfo")
        self._copies = acl.MemorySummary() if hasattr(acl, "MemorySummary") else None
        self._overhead_ms: float | None = None

    def reset(self) -> None:
        with suppress(Exception):  # without times there is work to be done all the same
            if self._reset is not None:
                self._reset()
            if self._copies is not None:
                self._copies.reset()

    def split(self, ran_ms: float) -> tuple[float, float]:
        """What of a run's time, measured from outside, was copying and what computing. The rest is its overhead."""
        copied, computed = self._copied(ran_ms), self._computed(ran_ms)
        if computed is None:  # as an older clock would have it, so that a device does not seem slower from then on
            h2d = copied or 0.0
            return h2d, max(0.0, ran_ms - h2d - (self._overhead_ms or 0.0))
        if copied is None:
            return max(0.0, ran_ms - computed), computed
        overhead = max(0.0, ran_ms - copied - computed)
        if self._overhead_ms is None:
            self._overhead_ms = overhead
        self._overhead_ms += (overhead - self._overhead_ms) / 8
        return copied, computed

    def _copied(self, ran_ms: float) -> float | None:
        with suppress(Exception):
            if self._copies is not None and (times := self._copies.H2D_time_list):
                copied = float(sum(times))
                return copied if 0 <= copied <= ran_ms else None
        return None

    def _computed(self, ran_ms: float) -> float | None:
        with suppress(Exception):
            if self._summary is not None and self._reset is not None and (times := self._summary().exec_time_list):
                return interval(times[-1], ran_ms)
        return None


class _Stdout:
    """
    What is printed on descriptor 1 while this is entered, by C or by anybody, and hands it on afterwards.

    Into a file in memory, not a pipe: nobody could empty a pipe while the GIL is held, and a full one would hang.
    """

    def __init__(self) -> None:
        self._file = os.memfd_create("farm-acl-stdout", os.MFD_CLOEXEC)
        self._libc = ctypes.CDLL(None)
        self._before = -1
        self.said = ""

    def __enter__(self) -> None:
        self.said = ""
        self._libc.fflush(None)  # what was printed before is not ours
        self._before = os.dup(1)
        os.dup2(self._file, 1)

    def __exit__(self, *_: object) -> None:
        self._libc.fflush(None)  # C keeps what it prints until its buffer is full, unless to a terminal
        os.dup2(self._before, 1)
        os.close(self._before)
        size = os.fstat(self._file).st_size
        if size:
            data = os.pread(self._file, _SAID_BYTES, max(0, size - _SAID_BYTES))
            self.said = data.decode(errors="replace")
            os.ftruncate(self._file, 0)
            os.lseek(self._file, 0, os.SEEK_SET)
            with suppress(OSError):  # nobody may listen
                os.write(1, data)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def open_backend(load: Load) -> Backend:
    _check_file(load.path)
    return AclBackend(_module(), load)


def check_host(path: str) -> None:
    """`HostError` for what would keep any device of this host from loading this file."""
    _check_file(path)
    module_file()


def module_file() -> str:
    """Where the vendor's module lies that a device process would import; tried apart, for an import may abort."""
    command = [sys.executable, "-m", "farm.leash", str(os.getpid()), sys.executable, "-m", "workers.backends.acl"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_IMPORT_S, check=False, cwd=ROOT
        )
    except subprocess.TimeoutExpired:
        raise HostError(f"importing aclruntime does not end within {_IMPORT_S:g} s: see to the driver") from None
    lines = done.stdout.decode(errors="replace").splitlines()
    said = [
        line.removeprefix(_ANSWER) for line in lines if line.startswith(_ANSWER)
    ]  # the module may say something, too
    if said and done.returncode == 0:
        return said[0]
    raise HostError(said[0] if said else f"importing aclruntime ended the process ({done.returncode})")


def _check_file(path: str) -> None:
    """The module's own rules for a model's file, of which it says no more than "please check model path"."""
    try:
        status = os.lstat(path)
    except OSError as exc:
        raise HostError(f"cannot load {path}: {exc.strerror}") from exc
    depth = len([part for part in path.split("/") if part])
    rules = (
        (
            not stat.S_ISLNK(status.st_mode),
            "it is a symbolic link, which aclruntime refuses: use the file itself",
        ),
        (stat.S_ISREG(status.st_mode), "it is no regular file"),
        (path.endswith(".om"), "its name does not end in .om, which aclruntime wants"),
        (not status.st_mode & 0o022, f"group or others may write to it, which aclruntime refuses: chmod go-w {path}"),
        (os.access(path, os.R_OK), f"this user may not read it: chmod u+r {path}, or change its owner"),
        (status.st_size <= _MAX_BYTES, f"it has {status.st_size} bytes, aclruntime takes 64 GiB at most"),
        (
            re.fullmatch(r"[A-Za-z0-9_./-]+", path) is not None,
            "aclruntime takes only letters, digits, '_', '.', '/' and '-' in a path: move it, see FARM_DATA",
        ),
        (depth <= _MAX_DEPTH, f"it lies {depth} levels deep, aclruntime takes {_MAX_DEPTH}: move it, see FARM_DATA"),
    )
    for kept, broken in rules:
        if not kept:
            raise HostError(f"cannot load {path}: {broken}")


def _module() -> Any:
    try:
        acl = import_module("aclruntime")
    except Exception as exc:  # its libraries may be missing, or unfit, in many ways
        raise HostError(
            f"cannot import aclruntime: {exc}. Install the vendor's wheel and source CANN's set_env.sh"
        ) from exc
    missing = [name for name in _MEMBERS if not hasattr(acl, name)]
    if missing:
        where = getattr(acl, "__file__", None) or "aclruntime"
        raise HostError(f"{where} has no {', '.join(missing)}: it is not the vendor's aclruntime")
    return acl


#: The session opened last takes the module down when the process ends; not before, for ACL never comes up twice.
_last: list[tuple[int, Any]] = []


def _finalize_at_exit(session: Any) -> None:
    if not _last:
        atexit.register(_finalize)
    _last[:] = [(os.getpid(), session)]


def _finalize() -> None:
    pid, session = _last.pop()
    if pid == os.getpid():
        with suppress(Exception):
            session.finalize()  # of the class in some versions, of the instance in others


def interval(entry: Any, limit_ms: float) -> float | None:
    """The length of an entry of `exec_time_list` in ms: a duration, or start and end. None if unfit to be used."""
    if not isinstance(entry, (tuple, list)):
        return float(entry) if 0 < float(entry) <= limit_ms else None
    start, end = map(float, entry)
    step = float(np.spacing(np.float32(max(abs(start), abs(end)))))
    return end - start if 0 < end - start <= limit_ms + step and step <= _FIT * (end - start) else None


def _spec(desc: Any, expected: str) -> TensorSpec:
    """A tensor of the model. `expected` stands in for a name of which the compiler kept nothing."""
    value = int(getattr(desc.datatype, "value", desc.datatype))
    compiled = _COMPILED.fullmatch(desc.name)
    name = desc.name if compiled is None else compiled["tensor"] or expected
    return TensorSpec(name=name, dtype=_DTYPES.get(value, f"type {value}"), shape=tuple(map(int, desc.shape)))


def _member(thing: Any, *names: str) -> Callable[[], Any] | None:
    """The first of these methods that there is."""
    found = [getattr(thing, name) for name in names if hasattr(thing, name)]
    return found[0] if found else None


def _text(exc: Exception) -> str:
    return str(exc).strip() or type(exc).__name__


def _complaint(said: str) -> str:
    """CANN's complaint, for the end of a sentence."""
    lines = [line.strip() for line in said.splitlines() if line.strip() and not line.startswith("[INFO]")]
    return f"; CANN: {' '.join(lines)[:400]}" if lines else ""


def _main() -> None:
    """What `module_file` has run. It ends before the module is taken down, which is another matter."""
    try:
        code, said = 0, getattr(_module(), "__file__", None) or "aclruntime"
    except HostError as exc:
        code, said = 1, " ".join(str(exc).split())
    sys.stdout.write(f"\n{_ANSWER}{said}\n")
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    _main()
