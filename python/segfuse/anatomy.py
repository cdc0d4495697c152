"""Networks by name, layer by layer: sizes, receptive fields, margins, parameters, multiply-adds."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import nn

from . import geometry, models
from .errors import UserError
from .geometry import Geometry
from .geometry.network import scaled
from .models.backbones import BACKBONES
from .models.convolutionalize import convolutionalize
from .models.paper import PAPER

__all__ = ["NETWORKS", "anatomy", "summary"]

NETWORKS = (*models.MODELS, *PAPER, *BACKBONES)
_SIDE = 500  # pixels a side, of the images of the FCN paper
_SIDES = {"unet": 572}  # that the U-Net paper draws


def anatomy(
    name: str,
    size: Sequence[int] | None = None,
    *,
    in_channels: int | None = None,
    classes: int | None = None,
    **options: Any,
) -> Geometry:
    """Read a network by its name; nothing is computed but shapes.

    Args:
        name: a key of `models.MODELS`; of `models.paper.PAPER`, the networks of table 1 of Long,
            Shelhamer, Darrell, CVPR 2015; or of `models.backbones.BACKBONES`, which are classifiers
            of ImageNet and are made fully convolutional here (`models.convolutionalize`).
        size: of the image, (H, W); 500 x 500 or, of unet, 572 x 572.
        in_channels: of the image; 3 or, of unet, 1.
        classes: channels of the scores; 21 or, of backbones, 1000.
        options: of networks in `models.MODELS`, what `models.build` takes besides.

    Raises:
        UserError: an unknown name, options that the network does not have or refuses, a size that
            it does not take.
    """
    if name not in NETWORKS:
        raise UserError(f"model: expected one of {', '.join(NETWORKS)}, got {name!r}")
    known = signature(models.MODELS[name]).parameters if name in models.MODELS else ()
    for option in options:
        if option not in known:
            raise UserError(f"{name}: expected no {option}")
    side = _SIDES.get(name, _SIDE)
    channels = in_channels or (1 if name == "unet" else 3)
    try:
        net = _network(name, channels, classes or (1000 if name in BACKBONES else 21), options)
        return geometry.of(net, (1, channels, *(size or (side, side))))
    except (ValueError, TypeError) as error:
        raise UserError(f"{name}: {error}") from error


def _network(name: str, in_channels: int, classes: int, options: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        if name in models.MODELS:
            return models.build(name, in_channels, classes, **options)
        if name in PAPER:
            return PAPER[name](classes)
        net = BACKBONES[name](classes)
        return convolutionalize(net, net.native)


def summary(found: Geometry) -> list[str]:
    """Say in two lines what table 1 of the FCN paper says of a network, and what it costs.

    Convolutions are those on the longest way, transposed ones not counted.
    """

    def short(values: Sequence[object]) -> str:
        return " x ".join(map(str, values if len(set(values)) > 1 else values[:1]))

    sides = [f"{a} and {b}" if a != b else str(a) for a, b in found.margin]
    seen, stride = short(found.receptive_field), short(found.stride)
    before, after = (" x ".join(map(str, s)) for s in (found.input_size, found.output_size))
    numbers, work = scaled(found.parameters), scaled(found.multiply_adds)
    return [
        f"{found.depth} conv layers, {numbers} parameters, receptive field {seen}, stride {stride}",
        f"{before} pixels to {after}, margin {short(sides)} a side, {work} multiply-adds",
    ]
