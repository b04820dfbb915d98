"""``farm`` and ``python -m farm``: guarded from the first import on, so that Ctrl-C never ends in a traceback."""

import sys


def main() -> None:
    try:
        from farm import cli

        code = cli.run()
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
