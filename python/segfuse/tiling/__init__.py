"""Prediction tile by tile, of images of any size."""

from __future__ import annotations

__all__: list[str] = []
