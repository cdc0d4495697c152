"""Fused operators for dense prediction in PyTorch, and the networks that they were made for.

``segfuse.ops`` holds the operators, ``segfuse.nn`` modules over them, ``segfuse.models`` the
networks, ``segfuse.geometry`` tells where each output pixel of any network comes from.  Importing
registers ``torch.ops.segfuse``; it needs torch and NumPy alone.

``fit``, ``fit_stages``, ``resume``, ``predict``, ``predict_files``, ``instances``, ``evaluate`` and
its kin, and ``inspect`` are the program, as functions; what they need (``pip install
'segfuse[cli]'``) is imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from . import _library, geometry, models, nn, ops

if TYPE_CHECKING:
    from .boundary_evaluation import evaluate_boundaries
    from .data import inspect
    from .evaluation import evaluate
    from .instance_evaluation import evaluate_instances
    from .objects import instances
    from .prediction import predict
    from .prediction_files import predict_files
    from .run import Run
    from .stages import fit_stages, resume
    from .training import fit

__all__ = [
    "Run",
    "__version__",
    "evaluate",
    "evaluate_boundaries",
    "evaluate_instances",
    "fit",
    "fit_stages",
    "geometry",
    "inspect",
    "instances",
    "models",
    "nn",
    "ops",
    "predict",
    "predict_files",
    "resume",
]
__version__ = version("segfuse")

del _library

_LAZY = {
    "Run": "run",
    "evaluate": "evaluation",
    "evaluate_boundaries": "boundary_evaluation",
    "evaluate_instances": "instance_evaluation",
    "fit": "training",
    "fit_stages": "stages",
    "inspect": "data",
    "instances": "objects",
    "predict": "prediction",
    "predict_files": "prediction_files",
    "resume": "stages",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'segfuse' has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
