"""
Which devices this host has, which of them are better left alone, and the locks that keep two farms off one of them.

A host has NPUs where the driver's `npu-smi` is installed, and CPU slots where it is not. What the tool cannot tell is
an error: a card that is not there is one thing, a card that nobody can see is another.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import platform
import re
import socket
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import psutil
from platformdirs import user_data_path

from farm.errors import DeviceError, UsageError
from farm.settings import Settings
from workers import npu_smi
from workers.npu_smi import Chip, Health, Info, Process

#: Healths with which a card is used. A warning is for its owner; the card works.
SOUND = (Health.OK, Health.WARNING)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalDevice:
    """A device of this host."""

    host: str
    index: int  #: of an NPU: its number for ACL as this process would open it; -1 for one that has none
    soc: str  #: "cpu", the chip's name, or "simulated" and the chip's name
    backends: tuple[str, ...]
    place: str = ""  #: of an NPU: card and chip, "1.0", whatever number this process has for it
    unusable: str = ""  #: why it is better left alone
    info: Mapping[str, Any] = field(default_factory=dict)  #: of an NPU: how it is, and what drives it

    @property
    def name(self) -> str:
        return f"{self.host}:{self.index if self.index >= 0 else f'npu{self.place}'}"


def discover(settings: Settings) -> list[LocalDevice]:
    """
    This host's devices, those that are better left alone, too: its NPUs, or its CPU slots, one core each; or
    those that it shall simulate.

    `DeviceError` where there is an `npu-smi` and it cannot tell.
    """
    if settings.simulate:
        count, _, chip = settings.simulate.rpartition("x")
        return [
            LocalDevice(host=settings.host_name, index=index, soc=f"simulated {chip}", backends=("simulated",))
            for index in range(int(count or 1))
        ]
    if is_npu_host(settings):
        return npus(settings, _told())
    return [
        LocalDevice(host=settings.host_name, index=index, soc="cpu", backends=("ort", "simulated"))
        for index in range(settings.cpu_slots)
    ]


def is_npu_host(settings: Settings) -> bool:
    """Whether the devices are NPUs. Whoever says how many CPU slots there shall be wants those."""
    return not settings.simulate and "cpu_slots" not in settings.model_fields_set and npu_smi.is_installed()


@cache
def _told() -> Info:
    """What `npu-smi` says: asked once a process, for it takes a second or two."""
    try:
        return npu_smi.read_info()
    except DeviceError as exc:
        raise DeviceError(f"{exc}. FARM_CPU_SLOTS=N has this host serve N of its cores instead") from exc


def npus(settings: Settings, told: Info) -> list[LocalDevice]:
    """The NPUs that this process could open, and half chips, of which nobody knows their number."""
    by_logic = {chip.logic_id: chip for chip in told.chips if chip.logic_id is not None}
    numbers = npu_smi.visible(os.environ.get(npu_smi.VISIBLE), by_logic)
    found = [_npu(settings, told, by_logic[logic_id], number) for number, logic_id in numbers.items()]
    return found + [_npu(settings, told, chip, -1) for chip in told.chips if chip.logic_id is None]


def _npu(settings: Settings, told: Info, chip: Chip, number: int) -> LocalDevice:
    foreign = [each for each in told.processes_on(chip) or () if not _is_ours(each.pid, settings)]
    place = f"{chip.card_id}.{chip.chip_id}" if chip.is_whole else f"logic{chip.logic_id}"
    holder = holder_of(place)
    reasons = [*_why_not(chip, foreign)]
    if holder and not _is_ours(holder, settings):
        reasons.append(f"process {holder}, a worker of another farm, has it")
    return LocalDevice(
        host=settings.host_name,
        index=number,
        soc=chip.soc or "unknown",
        backends=("acl",),
        place=place,
        unusable="; ".join(reasons),
        info={
            "health": chip.health.value,
            "temperature_c": chip.temperature_c,
            "memory_used_mb": chip.memory_used_mb,
            "memory_total_mb": chip.memory_total_mb,
            "foreign": [{"pid": each.pid, "name": each.name, "memory_mb": each.memory_mb} for each in foreign],
            "driver": told.driver,
            "cann": cann_version(),
        },
    )


def _why_not(chip: Chip, foreign: Sequence[Process]) -> Iterator[str]:
    if not chip.is_whole or chip.logic_id is None:
        yield "npu-smi prints only half of it"
    if chip.health not in SOUND:
        said = "" if chip.health_text in (None, chip.health.value) else f", though npu-smi says {chip.health_text}"
        yield f"its health is {chip.health.value}{said}"
    for process in foreign:
        yield f"process {process.pid} ({process.name or 'no name'}), not of this farm, holds {process.memory_mb} MB"


def _is_ours(pid: int, settings: Settings) -> bool:
    """
    Whether a process that has a card is this farm's, or none any more.

    A number that nobody has here is one that has ended since, or that of another container's, whose cards are not ours.
    """
    try:
        process = psutil.Process(pid)
        home = process.environ().get("FARM_HOME") or user_data_path("farm")
        is_farms = not {"workers.device_process", "tasks.worker"}.isdisjoint(process.cmdline())
        return is_farms and Path(home).expanduser().absolute() == settings.home
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, OSError):  # another user's
        return False


def usable(settings: Settings, found: Iterable[LocalDevice]) -> list[LocalDevice]:
    """Those to serve: the sound and free ones, or all that can be opened where the user insists (`FARM_FORCE`)."""
    return [each for each in found if each.index >= 0 and (settings.force or not each.unusable)]


def serving(settings: Settings) -> list[LocalDevice]:
    """This host's devices to serve; a warning for each that is not, or all the same. `DeviceError` if there is none."""
    found = discover(settings)
    chosen = usable(settings, found)
    for each in found:
        if each.unusable:
            log.warning("%s is %s: %s", each.name, "used all the same" if each in chosen else "not used", each.unusable)
    if not chosen:
        because = "; ".join(f"{each.name}: {each.unusable}" for each in found)
        raise DeviceError(f"no NPU of this host can be used: {because or none_visible()}. See farm devices")
    return chosen


def none_visible() -> str:
    """What to say of a host whose NPUs this process does not see."""
    return f"{npu_smi.VISIBLE}={os.environ.get(npu_smi.VISIBLE, '')} names none of them"


def find(settings: Settings, name: str) -> LocalDevice:
    """The local device of that name; `UsageError` lists those there are."""
    found = {device.name: device for device in serving(settings)}
    if name not in found:
        raise UsageError(f"no device {name} here: this host has {', '.join(found)}")
    return found[name]


def lock(device: LocalDevice, run_dir: Path) -> TextIO | socket.socket:
    """
    Take a device for this process, until what is returned is closed or the process ends.

    A CPU slot belongs to a farm, an NPU to the host. `UsageError` says who has it.
    """
    return _lock_chip(device) if device.place else _lock_slot(device, run_dir)


def _lock_slot(device: LocalDevice, run_dir: Path) -> TextIO:
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


def _lock_chip(device: LocalDevice) -> socket.socket:
    """
    A name that one process of the host can have, of all users' and all farms'; the kernel drops it with its process.

    It is a socket's in the abstract namespace, no file: no directory is writable for all users everywhere (/run/lock)
    and the same for them (/tmp of a systemd unit), and here nothing can be left behind, planted or forged.
    """
    held = _Held(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        held.bind(_address(device.place))
        held.listen()
    except OSError as exc:
        held.close()
        if exc.errno != errno.EADDRINUSE:
            raise DeviceError(f"cannot lock device {device.name}: {exc.strerror}") from exc
        holder = holder_of(device.place)
        who = f"process {holder}" if holder else "a process of another container, or one that ends just now"
        raise UsageError(
            f"device {device.name} (NPU {device.place}) is in use by {who}: a card serves one farm"
        ) from exc
    held.serve()
    return held


class _Held(socket.socket):
    """Whoever calls here has all it wants from the kernel: which process it called."""

    _thread: threading.Thread | None = None

    def serve(self) -> None:
        self._thread = threading.Thread(target=self._hang_up, daemon=True)
        self._thread.start()

    def _hang_up(self) -> None:
        with suppress(OSError):  # closed
            while True:
                self.accept()[0].close()

    def close(self) -> None:
        with suppress(OSError):
            self.shutdown(socket.SHUT_RDWR)
        super().close()
        if self._thread is not None:
            self._thread.join()  # as long as it is in `accept`, the kernel keeps the name


def holder_of(place: str) -> int | None:
    """The process that has an NPU locked; None if there is none, or none that can be seen from here."""
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
        caller.settimeout(1.0)
        caller.connect(_address(place))
        pid, _, _ = struct.unpack("3i", caller.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return pid or None
    return None


def _address(place: str) -> str:
    return f"\0farm-npu-{place}"


def cann_version() -> str | None:
    """That of the CANN whose `set_env.sh` was sourced, by the file that its installer leaves; None if there is none."""
    home = os.environ.get("ASCEND_HOME_PATH")
    for path in sorted(Path(home).glob("*/ascend_*_install.info")) if home else ():
        with suppress(OSError, UnicodeDecodeError):
            if said := re.search(r"^version=(\S+)", path.read_text(), re.MULTILINE):
                return said[1]
    return None


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
    """Devices of one kind give the same bits: CPUs of a model with one onnxruntime, chips with one driver and CANN."""
    if device.place:
        return f"{device.soc} driver {device.info.get('driver')} CANN {device.info.get('cann')}"
    return f"{device.soc} {cpu_model()} onnxruntime {version('onnxruntime')}"


def machine_id() -> str | None:
    """Tells this machine, since it was started, from all others; None where the kernel does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
