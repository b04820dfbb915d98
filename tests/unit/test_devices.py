"""Which devices a host has, which are left alone, and who has one of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from db import devices as stored
from db.engine import open_database
from farm.artifacts import Artifact
from farm.errors import DeviceError, UsageError
from farm.reports import doctor
from farm.reports.status import how_it_is, show_devices
from farm.settings import Settings, load_settings
from tasks import host
from tasks.submission import Request, plan
from tests import fake_acl, fake_npu_smi
from tests.contract.conftest import Fleet
from tests.datasets import write_bins, write_tiny_om
from tests.fake_npu_smi import P310, answering, install
from tests.integration.test_pipeline import eventually
from workers import devices, npu_smi, supervisor
from workers.devices import LocalDevice, discover, holder_of, kind_of, lock, npus, serving, usable
from workers.npu_smi import Chip, Info, Process

ROOT = Path(__file__).parents[2]
#: Of cards that nobody else tests with at this moment.
CARD = 65536 + os.getpid()

SOUND = replace(fake_npu_smi.SOUND, card_id=CARD, chip_id=0, logic_id=0)
TWO = (SOUND, replace(SOUND, chip_id=1, logic_id=1))

Machine = Callable[..., Path]


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No `npu-smi` anywhere, nothing configured, nothing remembered."""
    for name in [name for name in os.environ if name.startswith(("FARM_", "ASCEND_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FARM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(npu_smi, "USUAL_PLACES", ())
    devices._told.cache_clear()
    yield
    devices._told.cache_clear()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """A host with these chips and processes; the answer is the folder of its `npu-smi`."""

    def have(*chips: Chip, processes: tuple[Process, ...] = ()) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir()
        answering(folder, {"info": P310.draw(told(*chips, processes=processes))})
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        return folder

    return have


def told(*chips: Chip, processes: tuple[Process, ...] = ()) -> Info:
    idle = {chip.card_id for chip in chips if chip.card_id is not None} - {each.card_id for each in processes}
    return Info(
        version="24.1.0", driver="24.1.rc2", chips=chips, processes=processes, idle_cards=tuple(filter(None, idle))
    )


def found(*chips: Chip, processes: tuple[Process, ...] = ()) -> list[LocalDevice]:
    return npus(load_settings(), told(*chips, processes=processes))


def npu(number: int = 0, place: str = "") -> LocalDevice:
    return LocalDevice(
        host="h", index=number, soc="Ascend310P3", backends=("acl",), place=place or f"{CARD}.{number}"
    )  # fmt: skip


# -- which there are ---------------------------------------------------------------------------------------------


def test_a_host_without_npu_smi_has_its_cpu_slots() -> None:
    settings = Settings()

    assert [(d.name, d.soc, d.backends) for d in discover(settings)] == [
        (f"localhost:{number}", "cpu", ("ort", "simulated")) for number in range(settings.cpu_slots)
    ]


def test_a_host_with_npu_smi_has_its_chips_and_what_is_known_of_them(machine: Machine) -> None:
    machine(*TWO)

    (first, second) = discover(load_settings())

    assert (first.name, first.soc, first.backends, first.unusable) == ("localhost:0", "Ascend310P3", ("acl",), "")
    assert (second.name, second.place) == ("localhost:1", f"{CARD}.1")
    assert first.info == {
        "health": "OK",
        "temperature_c": 41,
        "memory_used_mb": 1621,
        "memory_total_mb": 44280,
        "foreign": [],
        "driver": "24.1.rc2",
        "cann": None,
    }


def test_a_chips_number_is_the_one_that_acl_has_for_it_here(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(*TWO, replace(SOUND, card_id=CARD + 1, logic_id=2))
    monkeypatch.setenv(npu_smi.VISIBLE, "1,2")

    assert [(d.index, d.place) for d in discover(load_settings())] == [(0, f"{CARD}.1"), (1, f"{CARD + 1}.0")]


def test_who_says_how_many_cpu_slots_there_are_gets_them(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(SOUND)
    monkeypatch.setenv("FARM_CPU_SLOTS", "3")

    assert [d.soc for d in discover(load_settings())] == ["cpu"] * 3


def test_npu_smi_that_cannot_tell_is_an_error_and_no_reason_to_use_cpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(tmp_path, "echo 'dcmi module initialize failed. ret is -8005'; exit 187")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    with pytest.raises(DeviceError, match=r"-8005.* does not mean that there are no NPUs.*FARM_CPU_SLOTS=N"):
        discover(load_settings())


def test_npu_smi_is_asked_once_a_process(machine: Machine) -> None:
    folder = machine(*TWO)

    before = discover(load_settings())
    (folder / "npu-smi").write_text("#!/bin/sh\nexit 1\n")

    assert discover(load_settings()) == before


# -- which are left alone ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"health_text": "OK"}, ""),
        ({"health_text": "Warning"}, ""),
        ({"health_text": "Alarm"}, "its health is Alarm"),
        ({"health_text": "Critical"}, "its health is Critical"),
        ({"health_text": "UNKNOWN"}, "its health is UNKNOWN"),
        ({"memory_total_mb": 0}, "its health is UNKNOWN, though npu-smi says OK"),
    ],
)
def test_a_sick_chip_is_left_alone(change: dict[str, Any], why: str) -> None:
    (device,) = found(replace(SOUND, **change))

    assert device.unusable == why
    assert usable(load_settings(), [device]) == ([] if why else [device])


@contextmanager
def process(home: Path | None = None) -> Iterator[int]:
    """A process that holds a card: somebody's, or, with a farm's home, what a device process looks like."""
    script = "import time; print(flush=True); time.sleep(600)"
    environment = {**os.environ, "FARM_HOME": str(home)} if home else None
    arguments = ["-c", script, "workers.device_process"] if home else ["-c", script]
    with subprocess.Popen([sys.executable, *arguments], env=environment, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        try:
            yield child.pid
        finally:
            child.kill()


def holding(pid: int) -> LocalDevice:
    """The first of two chips, on which a process holds memory."""
    there = Process(card_id=CARD, chip_id=0, pid=pid, name="python", memory_mb=14513)
    first, second = found(*TWO, processes=(there,))
    assert (second.unusable, second.info["foreign"]) == ("", [])
    return first


def test_a_chip_that_somebody_else_uses_is_left_alone_and_says_who() -> None:
    with process() as pid:
        device = holding(pid)

    assert device.unusable == f"process {pid} (python), not of this farm, holds 14513 MB"
    assert device.info["foreign"] == [{"pid": pid, "name": "python", "memory_mb": 14513}]


def test_a_chip_that_another_farm_uses_is_left_alone(tmp_path: Path) -> None:
    with process(tmp_path / "another") as pid:
        assert f"process {pid} " in holding(pid).unusable


def test_a_chip_that_this_farm_uses_is_its_own(tmp_path: Path) -> None:
    with process(tmp_path / "home") as pid:
        assert holding(pid).unusable == ""


def test_a_process_that_has_ended_meanwhile_keeps_no_chip() -> None:
    with process() as pid:
        pass

    assert holding(pid).unusable == ""


def test_a_chip_that_a_worker_of_another_farm_has_is_left_alone() -> None:
    with locked(npu()) as pid:
        assert found(SOUND)[0].unusable == f"process {pid}, a worker of another farm, has it"


def test_half_chips_are_listed_and_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARM_FORCE", "1")
    first_line = Chip(card_id=CARD, name="310P3", health_text="OK", temperature_c=41)

    (device,) = half = found(first_line)

    assert device.name.startswith("localhost:npu")
    assert "npu-smi prints only half of it" in device.unusable
    assert usable(load_settings(), half) == []


def test_a_chip_without_its_health_is_left_alone_under_its_number() -> None:
    (device,) = found(replace(SOUND, card_id=None, name=None, health_text=None, temperature_c=None))

    assert device.name == "localhost:0"
    assert device.unusable == "npu-smi prints only half of it; its health is UNKNOWN"


def test_who_insists_gets_sick_chips_too_with_a_warning(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine(SOUND, replace(TWO[1], health_text="Alarm"))
    assert [d.name for d in serving(load_settings())] == ["localhost:0"]
    assert "localhost:1 is not used: its health is Alarm" in caplog.text

    monkeypatch.setenv("FARM_FORCE", "1")

    assert [d.name for d in serving(load_settings())] == ["localhost:0", "localhost:1"]
    assert "localhost:1 is used all the same: its health is Alarm" in caplog.text


def test_a_host_of_which_no_chip_can_be_used_says_why(machine: Machine) -> None:
    machine(replace(SOUND, health_text="Critical"))

    with pytest.raises(DeviceError, match="no NPU of this host can be used: localhost:0: its health is Critical"):
        serving(load_settings())


def test_a_host_of_which_no_chip_is_visible_says_so(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(SOUND)
    monkeypatch.setenv(npu_smi.VISIBLE, "")

    with pytest.raises(DeviceError, match="ASCEND_RT_VISIBLE_DEVICES= names none of them"):
        serving(load_settings())


# -- who has one -------------------------------------------------------------------------------------------------


@contextmanager
def locked(device: LocalDevice) -> Iterator[int]:
    """Another process has the device, in a home of its own."""
    script = (
        "import json, sys, time; from pathlib import Path; from workers.devices import LocalDevice, lock; "
        "held = lock(LocalDevice(**json.loads(sys.argv[1])), Path('/nowhere')); print(flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", script, json.dumps(asdict(device))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"\n"
        try:
            yield child.pid
        finally:
            child.kill()


def test_a_chip_serves_one_farm_and_the_other_hears_which_process_has_it(tmp_path: Path) -> None:
    with locked(npu()) as pid:
        for _ in range(2):  # asking changes nothing
            with pytest.raises(UsageError, match=rf"device h:0 \(NPU {CARD}\.0\) is in use by process {pid}:"):
                lock(npu(), tmp_path)


def test_another_number_for_a_chip_is_the_same_chip(tmp_path: Path) -> None:
    with locked(npu(0)), pytest.raises(UsageError, match=r"device h:7 .* is in use"):
        lock(npu(7, place=f"{CARD}.0"), tmp_path)


def test_other_chips_are_not_concerned(tmp_path: Path) -> None:
    with locked(npu(0)):
        lock(npu(1), tmp_path).close()


def test_a_chip_is_free_when_its_process_was_killed(tmp_path: Path) -> None:
    with locked(npu()) as pid:
        os.kill(pid, signal.SIGKILL)
        assert eventually(lambda: holder_of(f"{CARD}.0") is None)
        lock(npu(), tmp_path).close()


def test_a_chip_is_free_when_it_was_given_back(tmp_path: Path) -> None:
    lock(npu(), tmp_path).close()

    with closing(lock(npu(), tmp_path)):
        assert holder_of(f"{CARD}.0") == os.getpid()
    assert holder_of(f"{CARD}.0") is None


def test_a_cpu_slot_belongs_to_its_farm_alone(tmp_path: Path) -> None:
    slot = LocalDevice(host="h", index=0, soc="cpu", backends=("ort",))
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()

    taken = pytest.raises(UsageError, match=rf"in use by process {os.getpid()}")
    with closing(lock(slot, one)), closing(lock(slot, other)), taken:
        lock(slot, one)


# -- kinds and versions ------------------------------------------------------------------------------------------


def test_chips_are_of_a_kind_that_share_driver_and_cann(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "x86_64-linux").mkdir()
    (tmp_path / "x86_64-linux" / "ascend_toolkit_install.info").write_text("package_name=x\nversion=8.0.RC3\narch=y\n")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))

    assert kind_of(found(SOUND)[0]) == "Ascend310P3 driver 24.1.rc2 CANN 8.0.RC3"


# -- jobs --------------------------------------------------------------------------------------------------------


def planned(monkeypatch: pytest.MonkeyPatch, soc: str) -> Any:
    settings = load_settings()
    settings.home.mkdir()
    write_bins(settings.data_dir, 8)
    write_tiny_om(settings.data_dir, 4, soc=soc)
    with closing(open_database(settings)) as database:
        return plan(settings, database, Request(model="lvvit", bs=4))


def test_a_job_is_for_the_chips_it_was_compiled_for(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(SOUND, replace(TWO[1], name="310P1"))

    assert planned(monkeypatch, "Ascend310P3").device_names == ("localhost:0",)


def test_a_job_for_another_chip_is_refused_with_the_chips_there_are(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(SOUND, replace(TWO[1], health_text="Alarm"))
    there = r"localhost:0 \(Ascend310P3: acl\), localhost:1 \(its health is Alarm\)"

    with pytest.raises(UsageError, match=f"no device serves backend acl for Ascend310P: the farm knows {there}"):
        planned(monkeypatch, "Ascend310P")


def test_what_is_not_used_is_in_the_plan(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(SOUND, replace(TWO[1], health_text="Alarm"))

    there = planned(monkeypatch, "Ascend310P3")

    assert there.device_names == ("localhost:0",)
    assert there.as_json()["unused"] == {"localhost:1": "its health is Alarm"}


@pytest.mark.parametrize(
    ("backend", "soc", "runs"),
    [
        ("acl", "Ascend310P3", True),
        ("acl", "Ascend310P", False),
        ("acl", "ascend310p3", False),
        ("ort", "Ascend310P3", False),
    ],
)
def test_an_artifact_runs_on_its_backend_and_chip_to_the_letter(
    tmp_path: Path, backend: str, soc: str, runs: bool
) -> None:
    artifact: Artifact = write_tiny_om(tmp_path, 1)

    assert artifact.runs_on([backend], soc) is runs
    anywhere = artifact.model_copy(update={"backend": "simulated", "soc": "cpu"})
    assert anywhere.runs_on(["simulated"], soc)
    assert not anywhere.model_copy(update={"soc": "simulated 310P3"}).runs_on(["simulated"], "cpu")


# -- watched -----------------------------------------------------------------------------------------------------


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[host.Workers]:
    """The workers of one sound chip, which do nothing."""
    monkeypatch.setattr(host, "_command", lambda *_: ["/bin/sleep", "600"])
    settings = load_settings()
    settings.log_dir.mkdir(parents=True)
    workers = host.Workers(settings, [npu(0)])
    yield workers
    supervisor.stop(workers.children, 0.0)


def names(workers: host.Workers) -> list[str]:
    return [child.name for child in workers.children if child.pid]


def test_a_chip_that_has_become_usable_gets_its_worker(children: host.Workers) -> None:
    sick = replace(npu(1), unusable="its health is Alarm")
    children._news = [npu(0), sick]
    children.watch()
    assert names(children) == ["h:0"]

    children._news = [npu(0), npu(1)]
    children.watch()

    assert names(children) == ["h:0", "h:1"]


def test_a_chip_that_its_user_did_not_name_gets_none(children: host.Workers) -> None:
    children._wanted = lambda device: device.index == 0
    children._news = [npu(0), npu(1)]
    children.watch()

    assert names(children) == ["h:0"]


def test_the_worker_of_a_chip_that_has_become_sick_goes_on_and_is_not_started_again(children: host.Workers) -> None:
    children.watch()
    children._news = [replace(npu(0), unusable="its health is Alarm")]
    children.watch()
    assert names(children) == ["h:0"]

    children.children[0].terminate()
    assert eventually(lambda: children.children[0].pid is None)
    watch_twice(children)
    assert names(children) == []

    children._news = [npu(0)]
    watch_twice(children)
    assert names(children) == ["h:0"]


def watch_twice(workers: host.Workers) -> None:
    """The first look finds that a child has ended, the second one starts it, for its back-off is over."""
    workers.watch()
    workers.children[0]._next_start = 0.0
    workers.watch()


def test_how_chips_are_goes_into_the_database_now_and_then(
    machine: Machine, children: host.Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = machine(SOUND)
    monkeypatch.setattr(host, "LOOK_S", 0.01)
    with closing(open_database(load_settings())) as database:
        Fleet(database).worker(host="localhost")
        children.watch()

        def info() -> Mapping[str, Any]:
            with database.read() as conn:
                (device,) = stored.everything(conn)
            return device.info

        assert eventually(lambda: info().get("temperature_c") == 41)
        (folder / "answers" / "info").write_text(P310.draw(told(replace(SOUND, temperature_c=97, health_text="Alarm"))))
        assert eventually(lambda: info().get("temperature_c") == 97)
        assert info()["unusable"] == "its health is Alarm"
        assert "machine" in info(), "what was there stays"


# -- shown -------------------------------------------------------------------------------------------------------


def line_of(device: LocalDevice, state: str) -> dict[str, Any]:
    return {
        **dict.fromkeys(("age_s", "heard_s_ago", "canary")),
        "device": device.name,
        "state": state,
        "soc": device.soc,
        "backends": ["acl"],
        "strikes": 0,
        "reason": "",
        **how_it_is({**device.info, "unusable": device.unusable}),
    }


def test_a_listing_shows_health_temperature_memory_and_why_a_chip_is_not_used(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sound, sick = found(SOUND, replace(TWO[1], health_text="Alarm"))

    show_devices([line_of(sound, "up"), line_of(sick, "not used")], Console(width=200))

    heads, first, second, why = capsys.readouterr().out.splitlines()
    assert heads.split()[-3:] == ["health", "°C", "memory"]
    assert first.split()[-6:] == ["OK", "41", "1621", "of", "44280", "MB"]
    assert second.split()[-6] == "Alarm"
    assert why == "localhost:1 is not used: its health is Alarm"


def findings() -> dict[str, tuple[bool, str]]:
    return {each.what: (each.ok, each.text) for each in doctor._devices(load_settings())}


def test_doctor_says_of_a_host_without_npu_smi_that_it_has_cpu_slots() -> None:
    assert findings() == {"devices": (True, f"no npu-smi: {Settings().cpu_slots} CPU slots")}


def test_doctor_looks_at_each_chip_at_cann_and_at_the_module(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine(SOUND, replace(TWO[1], health_text="Alarm"))
    monkeypatch.setenv("PYTHONPATH", str(fake_acl.FOLDER))
    monkeypatch.setattr(doctor, "CANN", (tmp_path,))
    (tmp_path / "set_env.sh").touch()

    said = findings()

    assert said["NPUs"] == (
        True,
        "npu-smi answers, driver 24.1.rc2; 2 can be opened here, ASCEND_RT_VISIBLE_DEVICES is not set",
    )
    assert said["localhost:0"] == (True, "Ascend310P3, health OK, 41 °C, 1621 of 44280 MB in use")
    assert said["localhost:1"][0] is False
    assert said["localhost:1"][1].endswith("not used: its health is Alarm")
    assert said["CANN"] == (
        False,
        f"the environment of CANN is not there, ASCEND_HOME_PATH is not set: source {tmp_path / 'set_env.sh'}",
    )
    assert said["aclruntime"] == (True, str(fake_acl.FOLDER / "aclruntime.py"))


def test_doctor_finds_cann_once_its_environment_is_there(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine(SOUND)
    (tmp_path / "libascendcl.so").touch()
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/nowhere:{tmp_path}")

    ok, text = findings()["CANN"]

    assert ok
    assert str(tmp_path / "libascendcl.so") in text


def test_doctor_says_that_npu_smi_cannot_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(tmp_path, "echo 'Failed to get device type.'; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    ok, text = findings()["NPUs"]

    assert not ok
    assert "Failed to get device type." in text
