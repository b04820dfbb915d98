"""
The command line. Results go to stdout, talk to stderr; commands parse, call one function and print.

Imports in this package are light at module level: ``farm --help`` must not wait for torch or a database.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated, Any

import typer

from farm.cli import (
    bench,
    cluster,
    compiling,
    data,
    database,
    demo,
    devices,
    events,
    export,
    flower,
    jobs,
    local,
    models,
    results,
    suite,
)
from farm.errors import FarmError

DETACHED = 130

app = typer.Typer(
    name="farm",
    help="Evaluate vision models on every device there is, and know what the numbers are worth.",
    epilog="First steps: farm demo. A real job: farm prepare, farm export, farm submit; each has --help.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for command in (
    models.models,
    data.prepare,
    data.import_,
    export.export,
    compiling.compile_,
    jobs.submit,
    jobs.wait,
    jobs.retry,
    jobs.resume,
    jobs.jobs,
    jobs.status,
    jobs.report,
    results.show,
    results.results,
    results.rescore,
    results.ingest,
    jobs.cancel,
    bench.bench,
    suite.suite,
    events.events,
    devices.doctor,
    local.up,
    local.down,
    cluster.worker,
    cluster.coordinator,
    flower.flower,
    demo.demo,
):
    app.command(command.__name__.rstrip("_"))(command)
app.add_typer(devices.app, name="devices")
app.add_typer(database.app, name="db")


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.", envvar="FARM_DEBUG")] = False,
) -> None:
    """Options of every command."""
    if debug:
        os.environ["FARM_DEBUG"] = "1"


def run() -> int:
    """Run the command line; every error ends as one sentence on stderr and an exit code of the contract."""
    try:
        code = app(standalone_mode=False)
    except FarmError as exc:
        return _complain(str(exc), exc.exit_code)
    except typer.TyperException as exc:
        usage: Any = exc  # typer carries a click of its own, whose errors know how to show themselves
        usage.show()
        return int(usage.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return DETACHED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as exc:
        where = f"{exc.filename}: " if exc.filename else ""
        return _complain(f"{where}{exc.strerror or exc}", 1)
    except Exception as exc:
        return _complain(f"this is a bug in the farm: {exc!r}. Run again with --debug and report what it prints.", 1)
    return code if isinstance(code, int) else 0


def _complain(sentence: str, code: int) -> int:
    if os.environ.get("FARM_DEBUG"):
        traceback.print_exc()
    print(f"error: {sentence}", file=sys.stderr)
    return code
