"""What never gets loaded where it is not needed: every process of a farm of 64 devices would pay for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

#: For pictures, models, other people's databases and compilers: a few commands and backends each.
_HEAVY = {"PIL", "alembic", "cv2", "flower", "numba", "onnx", "onnxruntime", "prettytable", "psycopg", "scipy", "torch"}
_SHOWS = {"rich", "typer"}
_QUEUE = {"celery", "kombu", "redis"}
_DATABASE = {"sqlalchemy", "sqlite3"}
_COMMAND = "import sys; sys.argv[1:] = [{!r}]; from farm import cli; assert cli.run() == 0"


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        pytest.param(
            _COMMAND.format("--help"), _HEAVY | _QUEUE | _DATABASE | {"numpy", "psutil", "pydantic"}, id="farm --help"
        ),
        pytest.param(_COMMAND.format("status"), _HEAVY | _QUEUE | {"numpy", "psutil"}, id="farm status"),
        pytest.param(
            "import tasks.local_host, tasks.coordinator", _HEAVY | _SHOWS | {"numpy"}, id="a local farm's host"
        ),
        pytest.param(
            "import tasks.worker, tasks.shards, celery.apps.worker, kombu.transport.redis",
            _HEAVY | _SHOWS,
            id="a worker",
        ),
        pytest.param(
            "import workers.device_process, workers.ring, workers.backends.acl",
            _HEAVY | _SHOWS | _QUEUE | _DATABASE | {"asyncio", "psutil", "pydantic"},
            id="an NPU's device process",
        ),
        pytest.param(
            "import workers.device_process, workers.ring, workers.backends.simulated",
            _HEAVY | _SHOWS | _QUEUE | _DATABASE | {"asyncio", "psutil"},
            id="a simulated device's process",
        ),
    ],
)
def test_a_process_loads_nothing_that_it_does_not_need(tmp_path: Path, code: str, unwanted: set[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print('loaded', *sorted({unwanted!r} & set(sys.modules)))"],
        env={name: value for name, value in os.environ.items() if not name.startswith("FARM_")}
        | {"FARM_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.stdout.splitlines()[-1:] == ["loaded"], done.stdout + done.stderr
