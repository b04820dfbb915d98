"""docs/contract.md is what scripts rely on, so it may not drift from the code."""

from __future__ import annotations

import re
from pathlib import Path

from farm import jobs
from farm.cli import app
from farm.settings import Settings

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "contract.md").read_text()


def commands() -> set[str]:
    there = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    return there | {group.name for group in app.registered_groups if group.name}


def test_the_commands_named_are_the_commands_there_are() -> None:
    listed = re.search(r"## Commands\n\n`([a-z ]+)`", PAGE)
    assert listed is not None
    assert set(listed[1].split()) == commands()


def test_every_setting_is_named() -> None:
    missing = [name for name in Settings.model_fields if f"FARM_{name.upper()}" not in PAGE]
    assert missing == []


def test_every_setting_named_exists() -> None:
    named = set(re.findall(r"FARM_([A-Z_]+)", PAGE))
    assert named == {name.upper() for name in Settings.model_fields}


def test_every_state_is_named() -> None:
    for states in (jobs.JobState, jobs.ShardState, jobs.AttemptState, jobs.DeviceState, jobs.Failure, jobs.Verdict):
        for state in states:
            assert re.search(rf"\b{state.value}\b", PAGE), state


def test_the_readme_types_only_commands_there_are() -> None:
    typed = set(re.findall(r"^ +farm ([a-z]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert typed - {"submit"} <= commands()
    assert "submit" in typed
