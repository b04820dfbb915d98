"""
ATC, CANN's compiler: an ONNX graph becomes an ``.om`` for one kind of chip. It needs no NPU.

It ends with 0 or 255 and says why on stdout, in one of three layouts by its age. Two runs must not share a working
directory, for what it leaves there (`kernel_meta`, `fusion_result.json`).
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from farm import artifacts
from farm.errors import FarmError, UsageError

SOC = "Ascend310P3"
#: What makes ATC known to a shell, by CANN's age.
SET_ENV = ("/usr/local/Ascend/ascend-toolkit/set_env.sh", "/usr/local/Ascend/cann/set_env.sh")

_TENSORS = "the tensors that jobs expect"
_BATCH = "--input_shape, which has one batch size"
_MODEL = "--model"
#: Options that would make something else than was asked for, and what speaks against them.
_CONTRADICTING = {
    "dynamic_batch_size": _BATCH, "dynamic_image_size": _BATCH, "dynamic_dims": _BATCH, "input_shape_range": _BATCH,
    "out_nodes": _TENSORS, "output_type": _TENSORS, "input_fp16_nodes": _TENSORS,
    "is_input_adjust_hw_layout": _TENSORS, "is_output_adjust_hw_layout": _TENSORS,
    "weight": _MODEL, "om": _MODEL, "singleop": _MODEL, "mode": _MODEL,
    "external_weight": "the artifact, which is one file",
}  # fmt: skip
#: Options whose value is a file that decides what is compiled.
_FILES = (
    "insert_op_conf", "op_precision_mode", "modify_mixlist", "keep_dtype", "customize_dtypes", "fusion_switch_file",
    "compress_weight_conf", "compression_optimize_conf",
)  # fmt: skip
#: Options whose value is a folder.
_FOLDERS = ("debug_dir", "op_compiler_cache_dir", "mdl_bank_path", "op_bank_path")

_KERNELS = "install its kernels for this soc, take a newer CANN, or export with another --opset"
_PYTHON = (
    "the first python3 on PATH, the farm's own left out, must have what CANN wants (decorator, attrs, scipy, numpy "
    "below 2, and not be newer than CANN knows)"
)
#: What to do about a complaint, by its code.
_ADVICE = (
    (r"E10016", "the graph has no input of this name: it is none of farm export's, export it again"),
    (r"E10041|E1600[145]", "ATC cannot read this graph: export it again, with a lower --opset if CANN is old"),
    (r"E10052", "it does not take the AIPP file of --insert_op_conf"),
    (r"E100\d\d", "ATC does not take one of its options: look at those after --, then at CANN's version"),
    (r"E10410|E1300\d", "it cannot open, read or write a file: look at permissions, and the room in TMPDIR and HOME"),
    (
        r"E10501|E13010|E14001|E16002|E19010|EZ0501|EZ300[23]|EZ9010",
        f"this CANN lacks an operator: {_KERNELS}",
    ),
    (r"E40000|E4002[01]|EC0010", f"its Python part fails: {_PYTHON}"),
    (r"EL000[14]", "the driver says no: the device is absent or has no memory"),
    (r"E[0-9A-Z]9999", "this is an error inside ATC, which its trace tells more of; another version of CANN may do"),
)

#: The head of a complaint: `E10001: text`, `E10001: [PID: 7] time text`, `[PID: 7] time Title(E10001): text`.
_HEAD = re.compile(
    r"(?:^|[(\s])(?P<code>E[0-9A-Z]\d{4})(?=[:)\[])[):]*\s*"
    r"(?:\[PID: \d+\] ?[\d:.-]*)?\s*(?:\w*\(\w+\):)?\s*(?P<text>.*)"
)
_INNER = re.compile(r"E[0-9A-Z]9999")
#: Lines of a complaint that are shown, and bytes of the output that are looked at: the end.
_MOST, _SAID_BYTES = 6, 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Further:
    """Options beyond the guide's, fit for any working directory."""

    options: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)  #: those they name: sha256 by path

    @property
    def has_aipp(self) -> bool:
        """Whether the model's input is what a file says, and not the graph's any more."""
        return any(option.startswith("--insert_op_conf=") for option in self.options)


def further(options: Iterable[str], command: Sequence[str]) -> Further:
    """What a user adds to a command; `UsageError` for what is no option, contradicts the command, or names no file."""
    ours = {option[2:].partition("=")[0] for option in command[1:]}
    found, files = [], {}
    for option in options:
        given = re.fullmatch(r"--(\w+)=(.+)", option)
        if given is None:
            raise UsageError(f"{option!r} is no option of ATC's: after -- they are written --name=value")
        name, value = given.groups()
        if name in ours:
            raise UsageError(f"--{name} is set by farm compile itself (farm compile --print shows it): leave it out")
        if name in _CONTRADICTING and (name, value) not in (("output_type", "FP32"), ("mode", "0")):
            raise UsageError(f"--{name} contradicts {_CONTRADICTING[name]}: leave it out")
        if name in _FILES or name in _FOLDERS:
            path = Path(value).expanduser().absolute()
            if name in _FILES:
                files[str(path)] = _sha256(option, path)
            option = f"--{name}={path}"
        found.append(option)
    return Further(options=tuple(found), files=files)


def _sha256(option: str, path: Path) -> str:
    try:
        return artifacts.sha256_of(path)
    except OSError as exc:
        raise UsageError(f"{option}: cannot read {path}: {exc.strerror}") from exc


def find() -> str:
    """ATC's path; `UsageError` says how to get it."""
    if program := shutil.which("atc"):
        return program
    there = next((path for path in SET_ENV if Path(path).exists()), SET_ENV[0])
    raise UsageError(
        f"there is no atc on PATH: source {there} first. Where CANN's toolkit is not installed, have another host run "
        "what farm compile --print prints, and take the result over with farm import"
    )


def version() -> str:
    """CANN's, of the ATC on PATH; empty if it cannot be told."""
    program = shutil.which("atc")
    parents = Path(program).resolve().parents[:3] if program else ()
    for parent in parents:
        for info in (parent / "ascend_toolkit_install.info", *parent.glob("*-linux/ascend_toolkit_install.info")):
            with suppress(OSError):
                if said := re.search(r"^version=(\S+)", info.read_text(errors="replace"), re.MULTILINE):
                    return said[1]
    return ""


def run(command: Sequence[str], output: str, directory: Path, log: Path) -> Path:
    """
    The file that a command with ``--output=output`` made in this directory; all it says goes to `log`.

    `FarmError` says why there is none. Whatever ends this call, an interrupt too, ends all that ATC has started.
    """
    program = find()
    with log.open("wb") as said:
        process = subprocess.Popen(
            command,
            executable=program,
            cwd=directory,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            # Ended, not reaped: until then no other group can have its number.
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _SAID_BYTES))
        text = file.read().decode(errors="replace")
    # Of models for one system only the name goes on.
    made = [path for path in (directory / f"{output}.om", *directory.glob(f"{output}_linux*.om")) if path.is_file()]
    if code == 0 and made and made[0].stat().st_size and "ATC run failed" not in text:
        return made[0]
    raise FarmError(f"{output}.om was not made: {reason(code, text)}\nAll that ATC said is in {log}")


def _environment() -> dict[str, str]:
    """
    Ours, but for what would lead ATC astray.

    It runs the first python3 on PATH and needs CANN's packages there, which the farm's own environment does not have.
    """
    environment = {name: value for name, value in os.environ.items() if name != "ASCEND_WORK_PATH"}
    if sys.prefix != sys.base_prefix:
        own = os.path.realpath(Path(sys.prefix) / "bin")
        path = environment.get("PATH", "").split(os.pathsep)
        environment["PATH"] = os.pathsep.join(folder for folder in path if os.path.realpath(folder) != own)
        environment.pop("VIRTUAL_ENV", None)
    return environment


def reason(code: int, said: str) -> str:
    """Why ATC made no model: a sentence, and beneath it ATC's own words."""
    found, lines = complaint(said)
    if code == 0 and not found:
        sentence = "ATC ended well, but left no model"
    elif code in (137, -signal.SIGKILL):
        sentence = "ATC was killed, most likely for memory: compile on a host with more, or less at a time"
    elif code == 127:
        sentence = (
            "ATC does not start for want of a program or library: source CANN's set_env.sh; where no driver is "
            "installed, add $ASCEND_TOOLKIT_HOME/$(uname -m)-linux/devlib to LD_LIBRARY_PATH"
        )
    else:
        advice = [sentence for codes, sentence in _ADVICE if re.fullmatch(codes, found)]
        sentence = f"ATC failed ({found or f'exit code {code}'})" + "".join(f": {each}" for each in advice[:1])
    return "\n".join([sentence, *(f"    {line}" for line in lines)])


def complaint(said: str) -> tuple[str, list[str]]:
    """The code of ATC's complaint, and what it says of it: text, cause and solution. Without a code, its last lines."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    heads = [(place, head) for place, line in enumerate(lines) if (head := _HEAD.search(line))]
    if not heads:
        return "", lines[-_MOST:]
    start, code = heads[0][0], heads[0][1]["code"]
    kept: list[str] = []
    for line in lines[start:]:
        head = _HEAD.search(line)
        if line.lower().startswith("traceback"):
            if _INNER.fullmatch(code):  # nothing else is known of these
                continue
            break
        text = head["text"] if head else line
        if text not in ("", "Inner Error!"):
            kept.append(text)
    return code, kept[:_MOST]
