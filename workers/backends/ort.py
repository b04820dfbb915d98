"""An ``.onnx`` through onnxruntime on one CPU core: laptops, CI, and the yardstick for other backends."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

import onnxruntime

from farm.errors import DeviceError, HostError, JobError
from workers.backends.base import Array, Backend, Load, TensorSpec, Times

_NUMPY_NAMES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(uint8)": "uint8"}


class OrtBackend(Backend):
    """One session, one thread, tensors bound in place."""

    def __init__(self, load: Load) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if not Path(load.path).is_file():
            raise HostError(f"onnxruntime cannot load {load.path}: there is no such file")
        try:
            self._session = onnxruntime.InferenceSession(load.path, options, providers=["CPUExecutionProvider"])
        except Exception as exc:  # onnxruntime's errors share no base class
            raise JobError(f"onnxruntime cannot load {load.path}: {str(exc)[:300]}") from exc
        self._check(load.path, "input", self._session.get_inputs(), load.input)
        self._check(load.path, "output", self._session.get_outputs(), load.output)
        self._binding = self._session.io_binding()
        self._load = load

    def infer(self, batch: Array, out: Array) -> Times:
        began = perf_counter()
        bind, given, wanted = self._binding, self._load.input, self._load.output
        bind.bind_input(given.name, "cpu", 0, batch.dtype.type, given.shape, batch.ctypes.data)
        bind.bind_output(wanted.name, "cpu", 0, out.dtype.type, wanted.shape, out.ctypes.data)
        try:
            self._session.run_with_iobinding(bind)
        except Exception as exc:
            raise DeviceError(f"onnxruntime failed to run {self._load.path}: {str(exc)[:300]}") from exc
        return Times(0.0, 1000 * (perf_counter() - began), 0.0)  # host and device memory are one

    @staticmethod
    def _check(path: str, role: str, found: list[Any], expected: TensorSpec) -> None:
        given = [TensorSpec(name=t.name, dtype=_NUMPY_NAMES.get(t.type, t.type), shape=tuple(t.shape)) for t in found]
        if given != [expected]:
            listing = ", ".join(map(str, given))
            raise JobError(
                f"{path} has {role} {listing}, the job needs {expected}: export the model for this batch size"
            )


def open_backend(load: Load) -> Backend:
    return OrtBackend(load)
