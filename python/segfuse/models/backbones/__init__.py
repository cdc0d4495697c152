"""Classifiers of ImageNet in torchvision's layouts, and the encoders that FCN makes of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .alexnet import AlexNet
from .base import Backbone, Encoder
from .googlenet import GoogLeNet
from .scaling import Scaling
from .squeezenet import SqueezeNet
from .vgg import VGG
from .weights import fill, read_weights

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


def backbone(
    name: str,
    *,
    classes: int = 1000,
    weights: str | Path | None = None,
    scaling: Scaling | None = None,
    **options: Any,
) -> Backbone:
    """Make the backbone `name`, with weights of a file or a hub.

    Args:
        name: a key of `BACKBONES`.
        classes: number of scores; with `weights`, what they were trained for.
        weights: None for weights drawn at random. A file in torchvision's names, .pth or .pt (read
            with ``weights_only``), .safetensors or .npz; GoogLeNet's auxiliary classifiers in it
            are left out. A file of any of these formats in Caffe's names, for squeezenet1_0
            (conv1, fire2.squeeze, ... conv10) and vgg16 (conv1_1, ... fc8), which makes the network
            as Caffe has it: images are BGR, and conv10 of squeezenet1_0 pads by 1. "torchvision" or
            "timm" (vgg16 and vgg16_bn alone): what they publish for ImageNet, fetched through them.
        scaling: what the weights were trained on, if not what the file says or, of a file in
            torchvision's names, ImageNet's mean and standard deviation, GoogLeNet's own.
        options: what the network's class takes besides.

    Returns:
        The network, float32, in training mode.

    Raises:
        ValueError: an unknown name; the text lists the known.
        UserError: a file that is not there, cannot be read or holds other weights; a hub that is
            not installed or cannot be reached. It is a ValueError.
        ImportError: to read .safetensors, ``safetensors`` is needed.
        TypeError: an option that the network does not have.
    """
    if name not in BACKBONES:
        raise ValueError(f"backbone: expected one of {', '.join(BACKBONES)}, got {name!r}")
    if weights is None:
        net = BACKBONES[name](classes, **options)
    else:
        found = read_weights(name, weights)
        with torch.device("meta"):  # nothing is drawn that the file replaces
            net = BACKBONES[name](classes, **{**found.options, **options})
        net.scaling = found.scaling or net.default_scaling()
        fill(net, name, weights, found.state)
    net.scaling = scaling or net.scaling
    return net
