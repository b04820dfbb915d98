"""
A stand-in for the vendor's module and its model files: put `FOLDER` on PYTHONPATH, and `import aclruntime` finds it.

`write_om` makes a model; what it and the machine can be told is in `aclruntime.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent

#: A tensor: name, dtype, shape with its batch axis.
Described = tuple[str, str, tuple[int, ...]]


def write_om(path: Path, given: Sequence[Described], wanted: Sequence[Described], **behaviour: object) -> Path:
    """A model file as the module wants it: not writable by others, whatever the umask."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"inputs": given, "outputs": wanted, **behaviour}))
    path.chmod(0o640)
    return path
