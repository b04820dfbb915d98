import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from farm.errors import StorageError, UsageError
from farm.settings import Settings, load_settings, make_home

#: Settings with these variables in the environment, e.g. ``configured(HOST="x")`` for ``FARM_HOST=x``.
Configured = Callable[..., Settings]


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Configured:
    for name in [name for name in os.environ if name.startswith("FARM_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))

    def configure(**variables: str) -> Settings:
        for name, value in variables.items():
            monkeypatch.setenv(f"FARM_{name}", value)
        return load_settings()

    return configure


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_unconfigured_the_home_is_the_users_data_directory(configured: Configured, tmp_path: Path) -> None:
    assert configured().home == tmp_path / ".local/share/farm"


def test_unconfigured_the_data_lies_in_the_home(configured: Configured) -> None:
    assert configured(HOME="/somewhere").data_dir == Path("/somewhere/data")


def test_the_data_may_lie_elsewhere(configured: Configured) -> None:
    assert configured(HOME="/somewhere", DATA="/elsewhere").data_dir == Path("/elsewhere")


def test_state_and_logs_lie_in_the_home(configured: Configured) -> None:
    settings = configured(HOME="/somewhere")

    assert (settings.run_dir, settings.log_dir) == (Path("/somewhere/run"), Path("/somewhere/log"))


@pytest.mark.parametrize("variable", ["HOME", "DATA"])
def test_a_relative_directory_is_one_of_the_current_directory(
    configured: Configured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    monkeypatch.chdir(tmp_path)

    settings = configured(**{variable: "here"})
    monkeypatch.chdir("/")

    assert getattr(settings, variable.lower()) == tmp_path / "here"


def test_a_tilde_is_the_users_home(configured: Configured, tmp_path: Path) -> None:
    assert configured(HOME="~/farm").home == tmp_path / "farm"


def test_unconfigured_there_is_a_cpu_slot_for_each_core_of_this_process(configured: Configured) -> None:
    assert configured().cpu_slots == len(os.sched_getaffinity(0))


def test_unconfigured_the_farm_is_embedded(configured: Configured) -> None:
    assert configured().is_embedded


def test_a_farm_with_a_broker_of_its_own_is_not_embedded(configured: Configured) -> None:
    assert not configured(BROKER_URL="redis://broker").is_embedded


def test_a_farm_of_one_machine_calls_it_localhost(configured: Configured) -> None:
    assert configured().host_name == "localhost"


def test_a_farm_of_several_machines_calls_them_by_name(configured: Configured) -> None:
    assert configured(BROKER_URL="redis://broker").host_name == socket.gethostname()


@pytest.mark.parametrize("broker", ["", "redis://broker"])
def test_a_configured_host_name_is_taken(configured: Configured, broker: str) -> None:
    assert configured(HOST="npu-7", BROKER_URL=broker).host_name == "npu-7"


@pytest.mark.parametrize("host", ["a", "A-1", "node_7.rack", "9", "x" * 63])
def test_a_host_name_that_fits_in_a_queue_name_is_taken(configured: Configured, host: str) -> None:
    assert configured(HOST=host).host == host


@pytest.mark.parametrize("host", ["-a", ".a", "a:1", "a b", "a/b", "a\n", "ä", "x" * 64])
def test_a_host_name_that_does_not_fit_is_refused(configured: Configured, host: str) -> None:
    with pytest.raises(UsageError, match=r"FARM_HOST: .*1 to 63 letters"):
        configured(HOST=host)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("CPU_SLOTS", "0"),
        ("CPU_SLOTS", "257"),
        ("CPU_SLOTS", "two"),
        ("HEARTBEAT_S", "0"),
        ("LEASE_S", "-1"),
        ("LEASE_S", "nan"),
        ("DEADLINE_S", "0"),
        ("SHARD_S", "soon"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_its_variables_name(
    configured: Configured, variable: str, value: str
) -> None:
    with pytest.raises(UsageError, match=f"FARM_{variable}: "):
        configured(**{variable: value})


def test_every_value_that_makes_no_sense_is_named(configured: Configured) -> None:
    with pytest.raises(UsageError, match=r"FARM_CPU_SLOTS: .*; FARM_LEASE_S: "):
        configured(CPU_SLOTS="0", LEASE_S="0")


def test_a_variable_nobody_knows_is_ignored(configured: Configured) -> None:
    assert configured(COFFEE="black").is_embedded


def test_settings_do_not_change(configured: Configured) -> None:
    settings = configured()

    with pytest.raises(ValidationError, match="frozen"):
        settings.lease_s = 1.0


def test_a_home_is_made_with_all_above_it(configured: Configured, tmp_path: Path) -> None:
    settings = configured(HOME=str(tmp_path / "a/b"))

    make_home(settings)

    assert settings.run_dir.is_dir()
    assert settings.log_dir.is_dir()


@pytest.mark.parametrize("directory", ["home", "run_dir", "log_dir"])
def test_a_new_homes_directories_are_private(configured: Configured, tmp_path: Path, directory: str) -> None:
    settings = configured(HOME=str(tmp_path / "farm"))

    make_home(settings)

    assert mode_of(getattr(settings, directory)) == 0o700


def test_a_home_that_is_there_keeps_what_it_holds(configured: Configured, tmp_path: Path) -> None:
    settings = configured(HOME=str(tmp_path / "farm"))
    make_home(settings)
    (settings.run_dir / "x").write_text("kept")

    make_home(settings)

    assert sorted(path.name for path in settings.home.rglob("*")) == ["log", "run", "x"]


def test_a_home_that_is_a_file_is_a_storage_error_that_says_what_to_set(configured: Configured, tmp_path: Path) -> None:
    (tmp_path / "farm").write_text("")

    with pytest.raises(StorageError, match=f"cannot write in {tmp_path}/farm: File exists.* Set FARM_HOME"):
        make_home(configured(HOME=str(tmp_path / "farm")))


def test_a_home_where_none_can_be_made_is_a_storage_error_that_says_what_to_set(configured: Configured) -> None:
    with pytest.raises(StorageError, match=r"cannot write in /proc/farm: .* Set FARM_HOME"):
        make_home(configured(HOME="/proc/farm"))


def test_an_empty_variable_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARM_HOME", "")

    assert load_settings().home != Path.cwd()


@pytest.mark.parametrize("url", ["sqlite:///farm.db", "sqlite+pysqlite:///farm.db", "sqlite://"])
def test_a_relative_sqlite_database_is_refused(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("FARM_DATABASE_URL", url)

    with pytest.raises(UsageError, match=r"FARM_DATABASE_URL: .*absolute path"):
        load_settings()


def test_a_lease_shorter_than_two_heartbeats_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARM_HEARTBEAT_S", "2")
    monkeypatch.setenv("FARM_LEASE_S", "3")

    with pytest.raises(UsageError, match=r"FARM_LEASE_S: .*two heartbeats"):
        load_settings()
