"""Modules over the operators."""

from __future__ import annotations

from .losses import WeightedCrossEntropy

__all__ = ["WeightedCrossEntropy"]
