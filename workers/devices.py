"""Which devices this host has, and the lock that keeps two farms off one of them."""

from __future__ import annotations

import fcntl
import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TextIO

from farm.errors import UsageError
from farm.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalDevice:
    """A device of this host."""

    host: str
    index: int
    soc: str  #: "cpu", the chip's name, or "simulated" and the chip's name
    backends: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.host}:{self.index}"


def discover(settings: Settings) -> list[LocalDevice]:
    """This host's devices: those that it shall simulate, or its CPU slots, one core each."""
    if settings.simulate:
        count, _, chip = settings.simulate.rpartition("x")
        return [
            LocalDevice(host=settings.host_name, index=index, soc=f"simulated {chip}", backends=("simulated",))
            for index in range(int(count or 1))
        ]
    return [
        LocalDevice(host=settings.host_name, index=index, soc="cpu", backends=("ort", "simulated"))
        for index in range(settings.cpu_slots)
    ]


def find(settings: Settings, name: str) -> LocalDevice:
    """The local device of that name; `UsageError` lists those there are."""
    found = {device.name: device for device in discover(settings)}
    if name not in found:
        raise UsageError(f"no device {name} here: this host has {', '.join(found)}")
    return found[name]


def lock(device: LocalDevice, run_dir: Path) -> TextIO:
    """
    Take a device for this process, until the file returned is closed or the process ends.

    A CPU slot belongs to a farm. `UsageError` says who has it.
    """
    path = run_dir / f"device-{device.host}-{device.index}.lock"
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise UsageError(f"device {device.name} is in use by process {holder} ({path})") from exc
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def cpu_model() -> str:
    """What the CPU calls itself."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def kind_of(device: LocalDevice) -> str:
    """Devices of one kind give the same bits: of CPUs those of one model, with one onnxruntime."""
    return f"{device.soc} {cpu_model()} onnxruntime {version('onnxruntime')}"


def machine_id() -> str | None:
    """Tells this machine, since it was started, from all others; None where the kernel does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
