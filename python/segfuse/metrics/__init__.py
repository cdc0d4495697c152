"""Figures that say how good a segmentation is."""

from __future__ import annotations

from .boundaries import PixelErrors, pixel_error, warp, warping_error
from .instances import (
    IU_THRESHOLDS,
    DetectionScores,
    ForegroundScores,
    PanopticQuality,
    RandScores,
    VariationOfInformation,
    adapted_rand,
    detection_scores,
    foreground_scores,
    mean_average_precision,
    panoptic_quality,
    seg_score,
    variation_of_information,
)
from .overlaps import Overlaps, overlaps
from .semantic import ConfusionMatrix, Scores, semantic_scores

__all__ = [
    "IU_THRESHOLDS",
    "ConfusionMatrix",
    "DetectionScores",
    "ForegroundScores",
    "Overlaps",
    "PanopticQuality",
    "PixelErrors",
    "RandScores",
    "Scores",
    "VariationOfInformation",
    "adapted_rand",
    "detection_scores",
    "foreground_scores",
    "mean_average_precision",
    "overlaps",
    "panoptic_quality",
    "pixel_error",
    "seg_score",
    "semantic_scores",
    "variation_of_information",
    "warp",
    "warping_error",
]
