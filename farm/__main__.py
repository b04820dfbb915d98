"""``farm`` and ``python -m farm``: guarded from the first import on, so that Ctrl-C never ends in a traceback."""

import gc
import os
import sys


def main() -> None:
    gc.set_threshold(20_000)  # what imports leave is no garbage; looking through it takes a tenth of their time
    # Next to nothing here multiplies matrices with numpy, whose threads for that spin while they wait for work.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        from farm import cli

        code = cli.run()
    except KeyboardInterrupt:
        code = 130
    gc.freeze()  # else all of it is looked through twice more on the way out
    sys.exit(code)


if __name__ == "__main__":
    main()
