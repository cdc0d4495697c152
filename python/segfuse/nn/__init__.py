"""Modules over the operators."""

from __future__ import annotations

from .coarse import CoarseScores, coarse_scores
from .losses import UpsampleCrossEntropy, WeightedCrossEntropy
from .touching import TouchingCrossEntropy
from .unpooling import Positions, max_pool, max_unpool
from .upsampling import DeconvUpsample, UpConv1d, UpConv2d, UpConv3d, depthwise_weight

__all__ = [
    "CoarseScores",
    "DeconvUpsample",
    "Positions",
    "TouchingCrossEntropy",
    "UpConv1d",
    "UpConv2d",
    "UpConv3d",
    "UpsampleCrossEntropy",
    "WeightedCrossEntropy",
    "coarse_scores",
    "depthwise_weight",
    "max_pool",
    "max_unpool",
]
