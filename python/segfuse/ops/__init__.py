"""The operators.  Each has ``.reference``, the slow version in plain PyTorch that defines it."""

from __future__ import annotations

from .confusion_matrix import confusion_matrix
from .crop_concat import crop_concat
from .weighted_cross_entropy import weighted_cross_entropy

__all__ = ["confusion_matrix", "crop_concat", "weighted_cross_entropy"]
