"""Figures that say how good a segmentation is."""

from __future__ import annotations

from .semantic import ConfusionMatrix, Scores, semantic_scores

__all__ = ["ConfusionMatrix", "Scores", "semantic_scores"]
