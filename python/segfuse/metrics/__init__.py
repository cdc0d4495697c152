"""Figures that say how good a segmentation is."""

from __future__ import annotations

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
    "RandScores",
    "Scores",
    "VariationOfInformation",
    "adapted_rand",
    "detection_scores",
    "foreground_scores",
    "mean_average_precision",
    "overlaps",
    "panoptic_quality",
    "seg_score",
    "semantic_scores",
    "variation_of_information",
]
