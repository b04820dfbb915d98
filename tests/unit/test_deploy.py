"""
deploy/ against what it deploys: commands, settings, times, users.

Linters that are installed are asked as well (hadolint, systemd-analyze); the checks of our own run in any case.
"""

from __future__ import annotations

import configparser
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
import typer
from redis.backoff import NoBackoff
from redis.retry import Retry
from ruamel.yaml import YAML

from farm.cli import app
from farm.cli.flower import AUTH
from farm.settings import Settings, load_settings
from tasks.host import GRACE_S
from tests.servers import ACL, Postgres, free_port
from workers.broker import server_binary

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE = sorted(path.name for path in DEPLOY.glob("compose*.yaml"))
UNITS = sorted(path.name for path in (DEPLOY / "systemd").glob("*.service"))
DOCKERFILES = ["Dockerfile", "Dockerfile.ascend"]
README = (DEPLOY / "README.md").read_text()
PYPROJECT = (ROOT / "pyproject.toml").read_text()

#: For tests, and for nobody's farm.
NOT_FOR_USERS = {"FARM_CLOCK_OFFSET_S"}
SETTINGS = {f"FARM_{name.upper()}" for name in Settings.model_fields} - NOT_FOR_USERS
#: Read by commands themselves, so that they are seen in no process list or work for all of them.
OF_COMMANDS = {AUTH, "FARM_DEBUG"}


def text(name: str) -> str:
    return (DEPLOY / name).read_text()


def services(name: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = YAML(typ="safe").load(text(name))["services"]
    return found


def whole_services() -> Iterator[tuple[str, dict[str, Any]]]:
    """Those that are not a layer on top of another file."""
    for name in ("compose.yaml", "compose.worker.yaml"):
        for service, content in services(name).items():
            yield f"{name}: {service}", content


def check_command(words: list[str]) -> None:
    """Parse a farm command as farm would, without running it."""
    command: Any = typer.main.get_command(app)
    parent = None
    while True:
        context = command.make_context(command.name, list(words), parent=parent)
        if not hasattr(command, "resolve_command"):
            return
        words = [*context._protected_args, *context.args]
        if not words:  # a group that does something when called plain
            assert command.invoke_without_command
            return
        _, command, words = command.resolve_command(context, words)
        parent = context


def variables(env_file: str) -> dict[str, tuple[str, bool]]:
    """Of an example: name to value, and whether it is commented out."""
    lines = re.findall(r"^(#?)([A-Z_]+)=(.*)$", text(env_file), re.MULTILINE)
    assert len(lines) == len({name for _, name, _ in lines}), "one is there twice"
    return {name: (value, mark == "#") for mark, name, value in lines}


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string((DEPLOY / "systemd" / name).read_text())
    return parser


def seconds(span: str) -> float:
    number, of = re.fullmatch(r"(\d+)(s|m|)", span).groups()  # type: ignore[union-attr]
    return int(number) * {"m": 60, "s": 1, "": 1}[of]


# -- compose


@pytest.mark.parametrize("name", COMPOSE)
def test_compose_files_fit_the_compose_specification(name: str) -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(DEPLOY / name)]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_containers_of_the_farm_run_is_a_command_of_the_farm() -> None:
    ours = {where: service for where, service in whole_services() if service["image"].startswith("farm")}
    commands = [service["command"] for service in ours.values() if "command" in service]
    for words in commands:
        check_command(words)
    assert {words[0] for words in commands} == {"coordinator", "flower", "worker"}


def test_compose_asks_for_no_variable_that_its_example_lacks() -> None:
    asked: dict[str, set[str]] = {}
    for name in COMPOSE:
        asked.setdefault("farm" if name == "compose.worker.yaml" else "compose", set()).update(
            re.findall(r"(?<!\$)\$\{([A-Z_]+)(?=:\?)", text(name))
        )
    assert asked["compose"] == set(variables("compose.env.example"))
    assert asked["farm"] <= {name for name, (_, commented) in variables("farm.env.example").items() if not commented}


def test_every_variable_of_compose_either_must_be_set_or_has_a_default() -> None:
    for name in COMPOSE:
        for found in re.findall(r"(?<!\$)\$(?!\$)[^ \"]*", text(name)):
            assert re.match(r"\$\{[A-Z_]+:[?-]", found), f"{name}: {found}"


def test_containers_get_no_setting_that_there_is_not() -> None:
    for where, service in whole_services():
        given = {name for name in service.get("environment", {}) if name.startswith("FARM_")}
        assert given <= SETTINGS | OF_COMMANDS, where


def test_containers_have_no_privileges() -> None:
    for where, service in whole_services():
        assert service["cap_drop"] == ["ALL"], where
        assert service["security_opt"] == ["no-new-privileges:true"], where
        assert not {"privileged", "cap_add", "pid", "ipc", "network_mode"} & set(service), where
        assert "docker.sock" not in str(service), where
        if not service["image"].startswith("farm"):  # ours have their user in the image
            assert service["user"] not in ("root", "0"), where


def test_services_come_back_and_say_how_they_are() -> None:
    for where, service in whole_services():
        if service.get("profiles") != ["tools"]:
            assert service["restart"] == "unless-stopped", where
            assert service["healthcheck"]["test"], where


def test_nothing_is_published_but_flower_on_loopback_unless_asked_for() -> None:
    published = [port for _, service in whole_services() for port in service.get("ports", [])]
    assert published == ["127.0.0.1:5555:5555"]
    for name in ("compose.publish.yaml", "compose.tls.yaml"):
        for service in services(name).values():
            assert all(port.startswith("${HEAD_ADDRESS:?") for port in service["ports"])


def test_a_command_that_a_layer_replaces_keeps_what_the_first_file_asked_for() -> None:
    before, after = (services(name)["postgres"]["command"] for name in ("compose.yaml", "compose.tls.yaml"))
    assert after[: len(before)] == before


def test_volumes_are_declared_or_lie_in_the_repository() -> None:
    for name in COMPOSE:
        declared = YAML(typ="safe").load(text(name)).get("volumes", {})
        for service in services(name).values():
            for source in (volume.split(":")[0] for volume in service.get("volumes", [])):
                if source.startswith("./") and source != "./tls":  # which the README makes
                    assert (DEPLOY / source).is_file(), source
                elif re.match(r"\w", source):
                    assert source in declared, source


def test_workers_are_given_longer_to_stop_than_they_give_their_shards() -> None:
    graces = [seconds(s["stop_grace_period"]) for where, s in whole_services() if ": worker-" in where]
    graces += [seconds(unit("farm-worker@.service")["Service"]["TimeoutStopSec"])]
    assert len(graces) == 4
    assert min(graces) >= GRACE_S + 10


def test_the_ascend_worker_has_the_nodes_and_mounts_that_cann_wants() -> None:
    worker = services("compose.worker.yaml")["worker-ascend"]
    assert {"/dev/davinci0", "/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc"} == set(worker["devices"])
    for path in (
        "/usr/local/Ascend/driver",
        "/usr/local/dcmi",
        "/usr/local/bin/npu-smi",
        "/etc/ascend_install.info",
    ):
        assert f"{path}:{path}:ro" in worker["volumes"]


# -- secrets


@pytest.mark.parametrize("path", sorted(p for p in DEPLOY.rglob("*") if p.is_file() and p.name != ".env"), ids=str)
def test_no_file_holds_a_password(path: Path) -> None:
    content = path.read_text()
    in_urls = re.findall(r"://\w*:([^@\s\"]+)@", content)
    assert [p for p in in_urls if p != "PASSWORD" and not re.match(r"\$\{[A-Z_]+:\?", p)] == []
    assigned = re.findall(r"(?m)^\s*-?\s*(?:ARG |ENV )?\w*(?:PASSWORD|AUTH|SECRET|TOKEN)\w*\s*[=:] *(\S.*)$", content)
    assert [value for value in assigned if not re.match(r"\"?\$\{?[A-Z_]+", value)] == []


def test_files_with_passwords_are_never_committed() -> None:
    assert {".env", "tls/"} <= set(text(".gitignore").split())


# -- servers


def at(port: int, **login: str) -> redis.Redis:
    """A client that tries once."""
    return redis.Redis(port=port, retry=Retry(NoBackoff(), 0), protocol=2, **login)  # type: ignore[arg-type]


@pytest.fixture
def broker_of_compose(tmp_path: Path) -> Iterator[int]:
    """What compose.yaml runs as the broker, its paths below `tmp_path`. The port."""
    (tmp_path / "data").mkdir()
    (tmp_path / "valkey-server").symlink_to(server_binary())
    shell, flags, script = services("compose.yaml")["redis"]["command"]
    for path, here in {"/tmp": tmp_path, "/data": tmp_path / "data", "/etc/farm": DEPLOY}.items():
        script = re.sub(rf"(?<= ){path}\b", str(here), script)
    port = free_port()
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "BROKER_PASSWORD": "opensesame",
        "BROKER_TLS": f"--bind 127.0.0.1 --port {port}",
    }
    leash = [sys.executable, "-m", "farm.leash", str(os.getpid()), shutil.which(shell) or shell, flags]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen([*leash, script.replace("$$", "$")], env=env, stdout=log, stderr=log, cwd=ROOT)
    try:
        while True:
            with at(port, username="farm", password="opensesame") as client, suppress(redis.ConnectionError):
                client.ping()
                break
            assert server.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        yield port
    finally:
        server.terminate()
        server.wait(30)


def test_the_broker_of_compose_knows_one_user_who_may_do_little(broker_of_compose: int, tmp_path: Path) -> None:
    with at(broker_of_compose) as nobody, pytest.raises(redis.AuthenticationError):
        nobody.ping()
    with at(broker_of_compose, username="farm", password="opensesame") as farm:
        assert farm.set("farm:here", "1")
        for command in (["CONFIG", "GET", "*"], ["FLUSHALL"], ["KEYS", "*"], ["GET", "theirs"], ["ACL", "LIST"]):
            with pytest.raises(redis.exceptions.NoPermissionError):
                farm.execute_command(*command)

    users = tmp_path / "users.acl"
    assert hashlib.sha256(b"opensesame").hexdigest() in users.read_text()
    assert "opensesame" not in users.read_text()
    assert users.stat().st_mode & 0o077 == 0
    assert (tmp_path / "data" / "appendonlydir").is_dir()


def test_the_farm_may_do_at_the_broker_what_it_may_do_in_the_tests() -> None:
    assert text("redis-users.acl") == f"user default off\nuser farm on #PASSWORD_SHA256 {ACL}\n"


def test_the_database_of_compose_belongs_to_a_role_that_owns_nothing_else(postgres: Postgres, tmp_path: Path) -> None:
    script = tmp_path / "init.sh"
    script.write_text(text("postgres-init.sh").replace("farm", "deployed"))  # a farm is there already
    env = {
        "PATH": f"{postgres.bin}:{os.environ['PATH']}",
        "PGHOST": str(postgres.directory),
        "PGPORT": str(postgres.port),
        "DATABASE_PASSWORD": "it's",
    }
    try:
        subprocess.run(["sh", script], env=env, check=True, capture_output=True)
        where: dict[str, Any] = {
            "host": postgres.address,
            "port": postgres.port,
            "user": "deployed",
            "password": "it's",
        }
        with psycopg.connect(**where, dbname="deployed") as conn:
            conn.execute("CREATE TABLE mine (id int)")
        rights = "SELECT rolsuper, rolcreatedb, rolcreaterole FROM pg_roles WHERE rolname = 'deployed'"
        assert postgres.execute(rights) == [(False, False, False)]
        with pytest.raises(psycopg.OperationalError, match="permission denied"):  # others', that is
            psycopg.connect(**{**where, "user": "farm", "password": postgres.password}, dbname="deployed")
    finally:
        postgres.drop_database("deployed")
        postgres.execute("DROP ROLE IF EXISTS deployed")


# -- units


@pytest.mark.parametrize("name", UNITS)
def test_units_run_commands_of_the_farm(name: str) -> None:
    program, *words = shlex.split(unit(name)["Service"]["ExecStart"].replace("%I", "all"))
    assert program == "/opt/farm/bin/farm"
    check_command(words)
    assert words[0] in name


@pytest.mark.parametrize("name", UNITS)
def test_units_are_restarted_for_ever_and_run_as_nobody_in_particular(name: str) -> None:
    parsed = unit(name)
    service = parsed["Service"]
    assert (service["Restart"], parsed["Unit"]["StartLimitIntervalSec"]) == ("always", "0")
    assert (service["User"], service["NoNewPrivileges"], service["ProtectSystem"]) == ("farm", "yes", "strict")
    assert service["EnvironmentFile"] == "/etc/farm/farm.env"
    assert f"/var/lib/{service['StateDirectory']}" == variables("farm.env.example")["FARM_HOME"][0]
    assert parsed["Install"]["WantedBy"] == "multi-user.target"


def test_the_workers_unit_tells_its_supervisor_alone_and_hides_no_device() -> None:
    service = unit("farm-worker@.service")["Service"]
    assert (service["KillMode"], service["KillSignal"], service["OOMPolicy"]) == ("mixed", "SIGTERM", "continue")
    # ProtectClock allows one device, which forbids all others; numba writes machine code.
    assert not {"PrivateDevices", "DevicePolicy", "DeviceAllow", "ProtectClock", "MemoryDenyWriteExecute"} & set(
        service
    )


def test_systemd_understands_the_units(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        return  # what the farm needs of them is checked above
    drop_in = tmp_path / "farm-worker@.service.d"
    drop_in.mkdir()
    shutil.copy(DEPLOY / "systemd" / "ascend.conf", drop_in)
    for name in UNITS:
        content = (DEPLOY / "systemd" / name).read_text().replace("/opt/farm/bin/farm", sys.executable)
        (tmp_path / name).write_text(content)
        verify = ["systemd-analyze", "verify", "--man=no", str(tmp_path / name)]
        env = {**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"}
        said = subprocess.run(verify, capture_output=True, text=True, check=False, env=env).stderr
        newer = re.compile(r"Unknown key.*'Restart(Steps|MaxDelaySec)'")
        assert [line for line in said.splitlines() if str(tmp_path) in line and not newer.search(line)] == []


# -- settings


def test_the_example_has_every_setting() -> None:
    assert set(variables("farm.env.example")) == SETTINGS | OF_COMMANDS


def test_what_the_example_comments_out_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("FARM_"):
            monkeypatch.delenv(name)
    unconfigured = load_settings()
    for name, (value, commented) in variables("farm.env.example").items():
        if commented:
            monkeypatch.setenv(name, value)
    assert load_settings() == unconfigured


def test_the_example_is_a_configuration_and_says_a_line_about_each(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = text("farm.env.example").splitlines()
    for before, line in pairwise(lines):
        if re.match(r"#?[A-Z_]+=", line):
            assert before.startswith("# "), line
    for name, (value, commented) in variables("farm.env.example").items():
        if commented:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert not load_settings().is_embedded


# -- images


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_images_copy_is_there_and_reaches_the_build(name: str) -> None:
    lets_in = [line[1:] for line in text(f"{name}.dockerignore").splitlines() if line.startswith("!")]
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", text(name), re.MULTILINE)
    sources = [source for line in copied for source in line.split()]
    assert sorted(sources) == sorted(lets_in)
    assert all((ROOT / source).exists() for source in sources)
    packages = re.search(r"^include = \[(.*)\]", PYPROJECT, re.MULTILINE)
    assert packages is not None
    assert set(re.findall(r'"(\w+)\*"', packages[1])) <= set(sources)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_run_as_a_user_without_rights(name: str) -> None:
    last_stage = re.split(r"^FROM ", text(name), flags=re.MULTILINE)[-1]
    user = re.findall(r"^USER (.*)$", last_stage, re.MULTILINE)[-1]
    assert user == "10001:10001"
    assert f"--uid {user.split(':')[0]} " in last_stage
    assert f"-o {user.split(':')[0]} " in README


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_install_what_the_project_asks_for_and_a_driver_for_the_database(name: str) -> None:
    extras = re.findall(r"^ARG EXTRAS=(\S+)$|requirements\.py (\w+) >", text(name), re.MULTILINE)
    command = [sys.executable, str(DEPLOY / "requirements.py"), "".join(extras[0])]
    wanted = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    dependencies = re.search(r"^dependencies = \[\n(.*?)^\]", PYPROJECT, re.MULTILINE | re.DOTALL)
    assert dependencies is not None
    assert set(re.findall(r'"(.+)"', dependencies[1])) < set(wanted)
    assert any(line.startswith("psycopg") for line in wanted)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_has_nothing_to_say(name: str) -> None:
    if not shutil.which("hadolint"):
        return  # what the farm needs of them is checked above
    done = subprocess.run(["hadolint", DEPLOY / name], capture_output=True, text=True, check=False)
    assert done.stdout == ""


# -- the page


def typed() -> list[list[str]]:
    """The farm commands that the page types, placeholders filled in."""
    code = re.findall(r"^    .*$|(?<!`)`[^`\n]+`", README, re.MULTILINE)
    found = [match for line in code for match in re.findall(r"(?<!-g )(?<!=)\bfarm ([a-z][^`#]*)", line)]
    known = {"HOST": "npu-1", "JOB": "1"}
    return [[known.get(word, word) for word in shlex.split(command)] for command in found]


def test_the_page_types_only_commands_there_are() -> None:
    for words in typed():
        check_command(words)
    assert {words[0] for words in typed()} >= {"doctor", "submit", "devices", "db", "worker"}


def test_the_page_names_every_file_and_only_files_there_are() -> None:
    linked = {link.rstrip("/") for link in re.findall(r"\]\(([^)]+)\)", README)}
    assert [link for link in linked if not (DEPLOY / link).exists()] == []
    said = {path.name for path in DEPLOY.iterdir() if path.name != "README.md" and not path.name.startswith(".")}
    helpers = {"requirements.py", "Dockerfile.dockerignore", "Dockerfile.ascend.dockerignore", "tls"}
    assert said - helpers == {link for link in linked if "/" not in link}


def test_the_page_names_only_units_and_options_there_are() -> None:
    units = set(re.findall(r"\bfarm-(?:worker@|coordinator|flower)(?=\b|\*|all)", README))
    assert units == {name.removesuffix(".service") for name in UNITS}
    profiles = set(re.findall(r"--profile (\w+)", README))
    assert profiles == {p for _, service in whole_services() for p in service.get("profiles", [])} - {"tools"}


@pytest.mark.parametrize("hosts", ["first", "second"])
def test_a_host_takes_five_commands(hosts: str) -> None:
    parts = README.split(f"## The {hosts} host\n\n")[1].split("\n\n")
    block = next(part for part in parts if part.startswith("    "))
    assert len(block.splitlines()) == 5
