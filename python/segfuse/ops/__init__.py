"""The operators.  Each has ``.reference``, the slow version in plain PyTorch that defines it."""

from __future__ import annotations

from .crop_concat import crop_concat

__all__ = ["crop_concat"]
