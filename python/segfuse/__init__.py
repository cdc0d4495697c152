"""Fused operators for dense prediction in PyTorch, and the networks that they were made for.

``segfuse.ops`` holds the operators, ``segfuse.models`` the networks.  Importing registers
``torch.ops.segfuse``; it needs torch and NumPy alone.
"""

from __future__ import annotations

from importlib.metadata import version

from . import _library, models, ops

__all__ = ["__version__", "models", "ops"]
__version__ = version("segfuse")

del _library
