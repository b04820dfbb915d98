"""Everything that can be configured, from ``FARM_*`` in the environment. Nothing configured is a working farm."""

from __future__ import annotations

import os
import re
import socket
import tempfile
from functools import cached_property
from pathlib import Path

from platformdirs import user_data_path
from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from farm.errors import StorageError, UsageError


class Settings(BaseSettings):
    """One process's settings; hand it down, never read the environment elsewhere."""

    model_config = SettingsConfigDict(env_prefix="FARM_", env_ignore_empty=True, frozen=True, extra="ignore")

    home: Path = Field(default_factory=lambda: user_data_path("farm"))  #: state: database, run/, log/
    data: Path | None = None  #: bins and artifacts; `data_dir` says where when unset
    host: str = ""  #: stable name of this machine in the farm; `host_name` says which when unset
    broker_url: str = ""  #: empty: the embedded broker
    database_url: str = ""  #: empty: SQLite in `home`
    cpu_slots: int = Field(default_factory=lambda: len(os.sched_getaffinity(0)), ge=1, le=256)
    simulate: str = ""  #: devices that are none instead of this host's own, e.g. 8x310P3
    force: bool = False  #: use NPUs that are not sound, or that others use, all the same
    simulated: str = "{}"  #: what the simulated backend does, as JSON (`workers.backends.simulated`)
    heartbeat_s: float = Field(default=2.0, gt=0)
    lease_s: float = Field(default=30.0, gt=0)  #: a device not heard of for so long loses its shards
    deadline_s: float = Field(default=15.0, gt=0)  #: the least time a batch gets before its device process is killed
    shard_s: float = Field(default=2.0, gt=0)  #: work in a shard
    flower_auth: SecretStr = SecretStr("")  #: USER:PASSWORD that `farm flower` asks for
    probe_s: float = Field(default=10.0, gt=0)  #: between looks at what keeps a device or host from working
    clock_offset_s: float = 0.0  #: what this host's clock is off by: for tests

    @field_validator("host")
    @classmethod
    def _host_fits_in_a_queue_name(cls, value: str) -> str:
        if value and not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,62})", value):
            raise ValueError("a host name has 1 to 63 letters, digits, '.', '_' or '-'")
        return value

    @field_validator("simulate")
    @classmethod
    def _known_chip(cls, value: str) -> str:
        if value and not re.fullmatch(r"([1-9]\d?x)?310P3", value):
            raise ValueError("expected how many of which chip, e.g. 8x310P3; there are figures of a 310P3 only")
        return value

    @field_validator("home", "data")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return value and value.expanduser().absolute()

    @field_validator("database_url")
    @classmethod
    def _sqlite_by_absolute_path(cls, value: str) -> str:
        if re.match(r"sqlite[+\w]*:///?(?!/)", value):
            raise ValueError("SQLite needs an absolute path here: sqlite:////path/to/farm.db")
        return value

    @field_validator("lease_s")
    @classmethod
    def _lease_outlasts_a_missed_heartbeat(cls, value: float, info: ValidationInfo) -> float:
        if value < 2 * info.data.get("heartbeat_s", 0):
            raise ValueError("a lease is at least two heartbeats (FARM_HEARTBEAT_S)")
        return value

    @cached_property
    def data_dir(self) -> Path:
        return self.data or self.home / "data"

    @cached_property
    def host_name(self) -> str:
        """A farm of one machine calls it localhost; one of several needs their names."""
        return self.host or ("localhost" if self.is_embedded else socket.gethostname())

    @property
    def run_dir(self) -> Path:
        return self.home / "run"

    @property
    def log_dir(self) -> Path:
        return self.home / "log"

    @property
    def is_embedded(self) -> bool:
        """Whether the farm brings its own broker."""
        return not self.broker_url


def load_settings() -> Settings:
    """Settings of this process; `UsageError` names the variable that does not fit."""
    try:
        return Settings()
    except ValidationError as exc:
        problems = "; ".join(f"FARM_{'_'.join(map(str, e['loc'])).upper()}: {e['msg']}" for e in exc.errors())
        raise UsageError(f"the environment does not make a configuration: {problems}") from exc


def make_home(settings: Settings) -> None:
    """The farm's own directories, private (0700); `StorageError` with what to do when they cannot be."""
    for directory in (settings.home, settings.run_dir, settings.log_dir):
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=directory).close()
        except OSError as exc:
            raise StorageError(
                f"cannot write in {directory}: {exc.strerror}. Set FARM_HOME to a directory of yours."
            ) from exc
