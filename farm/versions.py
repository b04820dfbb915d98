"""What made a number: the farm's commit and the packages that decide digits."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import farm

PACKAGES = ("numpy", "pillow", "opencv-python-headless", "numba", "onnxruntime", "torch", "celery", "sqlalchemy")


@cache
def versions() -> dict[str, str]:
    """Versions by name: python, farm (with commit, where it runs from a checkout), and `PACKAGES` where installed."""
    found = {"python": platform.python_version(), "farm": _farm()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _farm() -> str:
    root = Path(farm.__file__).parent.parent
    if not (root / ".git").exists():
        return farm.__version__
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return farm.__version__
    return f"{farm.__version__}+{said.stdout.strip()}" if said.returncode == 0 else farm.__version__
