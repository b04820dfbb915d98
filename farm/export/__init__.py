"""
From a checkpoint to an artifact. Besides `farm.nets` the only place that knows PyTorch, which is an optional extra.

Nothing here is imported by what runs jobs. This module itself imports without the extra; call `require_torch` first.
"""

from __future__ import annotations

from importlib import import_module

from farm.errors import UsageError

# Requirements rather than an extra of "farm": the package index knows that name as somebody else's project.
INSTALL = 'pip install "torch>=2.6" "onnx>=1.16" "onnxslim>=0.1.50"'


def require_torch(*also: str) -> None:
    """`UsageError` with the line to type where PyTorch, onnx or another module is missing or does not load."""
    for module in ("torch", "onnx", *also):
        try:
            import_module(module)
        except (ImportError, OSError) as exc:  # OSError: a shared library of theirs is missing
            raise UsageError(f"exporting needs {module}, which does not import ({exc}). Install it: {INSTALL}") from exc
