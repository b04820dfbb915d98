"""
A stand-in for ATC, on no CANN: its texts in the layouts of three ages, its exit codes, and the files it leaves behind.

`install` puts an executable `atc` into a folder. It is told by ``FAKE_ATC``, JSON, what to do:

* `fault`: "code" (with `code`, `text`, and `cause` and `solution` if any), "inner", "killed", "loader", "nothing",
  "empty", "says so only" (it fails with a model and exit code 0), "hang" (with a child, until killed)
* `age`: "7", "8" or "2025", of the layout;  `suffix`: of the output's name, e.g. "_linux_x86_64"
* `trace`: a file that is told of every run: its arguments, working directory and PATH;  `salt`: makes the model another

Faithful beyond that: the first required option that is missing is named, an input that the graph does not have is, too,
and the model is what `tests.fake_acl` loads, with LV-ViT's output.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

_SCRIPT = r"""
import json, os, signal, subprocess, sys, time

told = json.loads(os.environ.get("FAKE_ATC") or "{}")
age, fault = told.get("age", "8"), told.get("fault")
given = dict(part[2:].split("=", 1) for part in sys.argv[1:])
TIME = "2025-03-18-09:02:18.501.341"

if told.get("trace"):
    with open(told["trace"], "a") as file:
        print(json.dumps([sys.argv, os.getcwd(), os.environ["PATH"], os.getpid()]), file=file)

def say(text):
    print(text, flush=True)

def fail(code, text, cause="", solution=""):
    say("ATC run failed, Please check the detail log, Try 'atc --help' for more information")
    head = {"7": f"{code}: ", "8": f"{code}: [PID: 7] {TIME} ", "2025": f"[PID: 7] {TIME} Invalid_Argument({code}): "}
    say(head[age] + text)
    if cause:
        say("        Possible Cause: " + cause)
    if solution:
        say("        Solution: " + solution)
    say("        TraceBack (most recent call last):")
    say("        [Parse][Shape] failed[FUNC:Parse][FILE:main_impl.cc][LINE:7]")
    say("")
    sys.exit(0 if fault == "says so only" else 255)

if fault == "loader":
    say(sys.argv[0] + ".bin: error while loading shared libraries: libascend_hal.so: cannot open shared object file: "
        "No such file or directory")
    sys.exit(127)
say("ATC start working now, please wait for a moment.")
for name, code in (("framework", "E10007"), ("soc_version", "E10054"), ("output", "E10054"), ("model", "E10054")):
    if name not in given:
        fail(code, f"[--{name}] is required.")
if not os.path.exists(given["model"]):
    fail("E10410", f"Cannot find model {given['model']}")
input_name, shape = given["input_shape"].split(":")
if input_name.encode() not in open(given["model"], "rb").read():
    fail("E10016", f"Opname {input_name} specified in --input_shape is not found in the model.")
os.mkdir("kernel_meta")
open("kernel_meta/te_matmul.o", "wb").write(b"kernel")
open("fusion_result.json", "w").write("[]")
if fault == "code":
    fail(told["code"], told["text"], told.get("cause", ""), told.get("solution", ""))
if fault == "inner":
    say("ATC run failed, Please check the detail log, Try 'atc --help' for more information")
    say("E19999: Inner Error!")
    say(("E19999" if age == "7" else f"E19999[PID: 7] {TIME} (E19999): ") + " Call Build failed[FUNC:Build][LINE:7]")
    say("        TraceBack (most recent call last):")
    say("        build graph failed, graph id:0, ret:-1[FUNC:BuildModel][FILE:ge_generator.cc][LINE:148]")
    sys.exit(255)
if fault == "killed":
    say("BrokenPipeError: [Errno 32] Broken pipe")
    os.kill(os.getpid(), signal.SIGKILL)
if fault == "hang":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open(told["trace"] + ".hangs", "w").write(f"{os.getpid()} {child.pid}")
    time.sleep(600)
if fault != "nothing":
    shape = [int(each) for each in shape.split(",")]
    made = given["output"] + told.get("suffix", "") + ".om"
    with open(made, "w") as file:
        if fault != "empty":
            inputs = [[input_name, told.get("dtype", "float32"), shape]]
            outputs = [["Gemm_9:0:features", "float32", [shape[0], 1000]]]
            json.dump({"inputs": inputs, "outputs": outputs, "salt": told.get("salt", "")}, file)
if fault == "says so only":
    fail("E13000", "Save model failed")
say("...")
say("ATC run success, welcome to the next use.")
"""


def install(folder: Path) -> Path:
    """An executable `atc` in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "atc"
    path.write_text(f"#!{sys.executable} -S\n{_SCRIPT}")
    path.chmod(0o755)
    return path


def told(**behaviour: object) -> Mapping[str, str]:
    """The environment that makes it so."""
    return {"FAKE_ATC": json.dumps(behaviour)}
