"""
What pyproject.toml asks for, a line each: the dependencies, and those of the extras named.

    python requirements.py postgres,export
"""

import sys
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
wanted = [*project["dependencies"], *(line for extra in sys.argv[1].split(",") for line in extras[extra])]
sys.stdout.write("\n".join(wanted) + "\n")
