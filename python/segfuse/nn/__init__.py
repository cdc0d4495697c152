"""Modules over the operators."""

from __future__ import annotations

from .losses import WeightedCrossEntropy
from .touching import TouchingCrossEntropy
from .unpooling import Positions, max_pool, max_unpool
from .upsampling import DeconvUpsample, depthwise_weight

__all__ = [
    "DeconvUpsample",
    "Positions",
    "TouchingCrossEntropy",
    "WeightedCrossEntropy",
    "depthwise_weight",
    "max_pool",
    "max_unpool",
]
