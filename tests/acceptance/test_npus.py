"""A host with NPUs, as its user meets it: a stand-in for `npu-smi` on PATH, another for the vendor's module."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from farm.settings import Settings
from tasks.app import make_app, worker_name
from tests import fake_acl
from tests.acceptance.conftest import Farm, wait_for
from tests.datasets import expected_om_digest, write_bins, write_tiny_om
from tests.fake_npu_smi import P310, SOUND, answering
from workers import broker
from workers.npu_smi import Info

COUNT = 24


@pytest.fixture
def npus(farm: Farm, tmp_path: Path) -> Farm:
    """A Duo of two sound chips, and a card in Alarm. What is used of cards of these numbers is nobody else's."""
    card = 32768 + os.getpid() % 32768
    sick = replace(SOUND, card_id=card + 1, chip_id=0, logic_id=2, health_text="Alarm")
    chips = [replace(SOUND, card_id=card, chip_id=number, logic_id=number) for number in range(2)]
    told = Info(version="24.1.0", driver="24.1.0", chips=(*chips, sick), processes=(), idle_cards=(card, card + 1))
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    answering(bin_dir, {"info": P310.draw(told)})
    farm.env |= {
        "FARM_CPU_SLOTS": "",
        "PATH": f"{bin_dir}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(fake_acl.FOLDER), os.environ.get("PYTHONPATH")])),
        "FAKE_ACL": json.dumps({"devices": 3}),
    }
    return farm


def test_a_job_runs_on_all_sound_npus_and_a_run_that_holds_the_gil_keeps_no_worker_from_living(
    npus: Farm, tmp_path: Path
) -> None:
    data, gate, shut = npus.home / "data", tmp_path / "gate", tmp_path / "shut"
    os.mkfifo(gate)
    write_bins(data, COUNT)
    write_tiny_om(data, 4, faults=[{"kind": "gate", "path": str(gate), "once": str(shut)}])
    npus.env["FARM_HEARTBEAT_S"] = "0.2"

    dry = npus.run("submit", "lvvit", "--bs", "4", "--dry-run").stdout
    command = npus.start("submit", "lvvit", "--bs", "4", "--json")
    wait_for(shut.exists, what="a device runs, its GIL held")
    beats: dict[str, set[float]] = {"localhost:0": set(), "localhost:1": set()}
    wait_for(lambda: _heard(npus, beats), what="both beat, again and again")
    names = [worker_name(f"localhost:{index}") for index in range(2)]
    with make_app(broker.url(Settings(home=npus.home))).connection() as link:
        control = make_app(broker.url(Settings(home=npus.home))).control
        wait_for(
            lambda: {name for said in control.ping(destination=names, connection=link) for name in said} == set(names),
            what="its Celery worker answers",
        )
        assert _heartbeats(npus, link, set(names)) == set(names), (
            "its Celery worker's events go on, as Flower hears them"
        )
    os.close(os.open(gate, os.O_WRONLY))
    stdout, stderr = command.communicate(timeout=60)

    assert command.returncode == 0, stderr + npus.logs()
    report = json.loads(stdout)
    assert (report["state"], report["backend"], report["simulated"]) == ("done", "acl", False)
    assert report["digest"] == expected_om_digest(data, COUNT)
    # The one that was held up may have lost its shard to the other.
    assert npus.sql("SELECT DISTINCT device FROM attempt ORDER BY 1") == [("localhost:0",), ("localhost:1",)]
    assert "on 2 devices (localhost:0, localhost:1)" in dry
    assert "not used: localhost:2: its health is Alarm" in dry
    listed = {line["device"]: line for line in npus.json("devices")}
    assert [listed[f"localhost:{index}"]["state"] for index in range(3)] == ["gone", "gone", "not used"]
    assert (listed["localhost:0"]["health"], listed["localhost:0"]["temperature_c"]) == ("OK", 41)
    assert "localhost:2 is not used: its health is Alarm" in npus.run("devices").stdout


def test_a_host_without_the_vendors_module_is_skipped_and_says_what_is_missing(npus: Farm) -> None:
    npus.env["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    write_bins(npus.home / "data", COUNT)
    write_tiny_om(npus.home / "data", 4)

    report = npus.submit("--bs", "4", code=1)

    assert report["state"] == "failed"
    assert "no host can do it; localhost: cannot import aclruntime" in report["error"]
    assert "failed" not in report["attempts"], "it is no device's fault"


def test_a_farm_of_sick_npus_comes_up_only_if_its_user_insists_and_then_says_so(npus: Farm) -> None:
    write_bins(npus.home / "data", COUNT)
    write_tiny_om(npus.home / "data", 4)
    npus.run("submit", "lvvit", "--bs", "4", "--no-wait")
    folder = Path(npus.env["PATH"].partition(os.pathsep)[0])
    tool, drawn = folder / "npu-smi", folder / "answers" / "info"
    drawn.write_text(drawn.read_text().replace("| OK   ", "| Alarm"))

    refused = npus.run("up", code=1).stderr
    quick = tool.read_text()
    tool.write_text(quick.replace("cat", "sleep 1; cat"))  # meanwhile a farm seems to be up
    waited = npus.run("wait", "1", code=1).stderr
    tool.write_text(quick)
    npus.run("up", "--force")
    again = npus.run("up", "--force", code=2).stderr
    shown = npus.run("devices").stdout
    (info,) = npus.sql("SELECT info FROM device WHERE idx = 1")[0]
    npus.run("down")

    assert "no NPU of this host can be used: localhost:0: its health is Alarm" in refused
    assert "no NPU of this host can be used" in waited
    assert "is up already" in again
    assert "localhost:1 works although its health is Alarm" in shown
    assert (json.loads(info)["forced"], json.loads(info)["at_start"]["health"]) == ("its health is Alarm", "Alarm")


def _heartbeats(farm: Farm, link: Any, names: set[str]) -> set[str]:
    """Which of these Celery workers were heard of, in one go: where two beat at once, neither must be missed."""
    heard: set[str] = set()

    def note(event: dict[str, Any]) -> None:
        heard.add(event["hostname"])
        receiver.should_stop = heard >= names

    app = make_app(broker.url(Settings(home=farm.home)))
    receiver = app.events.Receiver(link, handlers={"worker-heartbeat": note})
    with suppress(TimeoutError):
        receiver.capture(limit=40, timeout=10)
    return heard & names


def _heard(farm: Farm, beats: dict[str, set[float]]) -> bool:
    for name, heartbeat in farm.sql("SELECT name, heartbeat FROM device WHERE idx < 2"):
        beats[name].add(heartbeat)
    return min(map(len, beats.values())) > 3
