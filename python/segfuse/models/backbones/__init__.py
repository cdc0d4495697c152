"""Classifiers of ImageNet in torchvision's layouts, and the encoders that FCN makes of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from .alexnet import AlexNet
from .base import Backbone, Encoder
from .googlenet import GoogLeNet
from .scaling import Scaling
from .squeezenet import SqueezeNet
from .vgg import VGG

__all__ = [
    "BACKBONES",
    "VGG",
    "AlexNet",
    "Backbone",
    "Encoder",
    "GoogLeNet",
    "Scaling",
    "SqueezeNet",
    "backbone",
]

BACKBONES: dict[str, Callable[..., Backbone]] = {
    "alexnet": AlexNet,
    "googlenet": GoogLeNet,
    "squeezenet1_0": SqueezeNet,
    "vgg16": VGG,
    "vgg16_bn": partial(VGG, batch_norm=True),
}


def backbone(name: str, *, classes: int = 1000, weights: str | Path | None = None) -> Backbone:
    """Make the backbone `name`.

    Args:
        name: a key of `BACKBONES`.
        classes: number of scores.
        weights: None for weights drawn at random.

    Raises:
        ValueError: an unknown name; the text lists the known.
    """
    if weights is not None:
        raise NotImplementedError
    if name not in BACKBONES:
        raise ValueError(f"backbone: expected one of {', '.join(BACKBONES)}, got {name!r}")
    return BACKBONES[name](classes)
