"""The devices' one seam: `base.Backend`, and a plain table of what implements it."""

from __future__ import annotations

from importlib import import_module

from farm.errors import JobError
from workers.backends.base import Backend, Load

BACKENDS = {
    "acl": "workers.backends.acl",
    "ort": "workers.backends.ort",
    "simulated": "workers.backends.simulated",
}


def open_backend(load: Load) -> Backend:
    """
    Load a model on a device.

    `JobError` if no device of this kind can, `HostError` if none of this host, `DeviceError` if this one cannot.
    """
    if load.backend not in BACKENDS:
        raise JobError(f"unknown backend {load.backend!r}: this worker has {', '.join(BACKENDS)}")
    backend: Backend = import_module(BACKENDS[load.backend]).open_backend(load)
    return backend


def check_host(load: Load) -> None:
    """`HostError` for what would keep any device of this host from loading a model, as far as can be seen."""
    if load.backend == "acl":
        from workers.backends import acl

        acl.check_host(load.path)
