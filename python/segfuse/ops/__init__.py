"""The operators.  Each has ``.reference``, the slow version in plain PyTorch that defines it."""

from __future__ import annotations

from .confusion_matrix import confusion_matrix
from .crop_concat import crop_concat
from .gather_tiles import gather_tiles
from .stitch_tiles import stitch_tiles
from .weighted_cross_entropy import weighted_cross_entropy

__all__ = [
    "confusion_matrix",
    "crop_concat",
    "gather_tiles",
    "stitch_tiles",
    "weighted_cross_entropy",
]
