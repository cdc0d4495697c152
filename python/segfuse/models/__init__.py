"""Published networks for dense prediction."""

from __future__ import annotations

from .unet import UNet

__all__ = ["UNet"]
