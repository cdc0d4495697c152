"""Modules over the operators."""

from __future__ import annotations

from .losses import WeightedCrossEntropy
from .touching import TouchingCrossEntropy

__all__ = ["TouchingCrossEntropy", "WeightedCrossEntropy"]
