"""Published networks for dense prediction."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from . import backbones
from .convolutionalize import convolutionalize
from .fcn import FCN, named_fcn
from .unet import UNet
from .unpool import UnpoolNet, named_unpoolnet

__all__ = ["FCN", "MODELS", "UNet", "UnpoolNet", "backbones", "build", "convolutionalize"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "unet": UNet,
    **{f"fcn{stride}s": partial(named_fcn, stride=stride) for stride in (32, 16, 8)},
    "unpoolnet": named_unpoolnet,
}


def build(name: str, in_channels: int, classes: int, **options: Any) -> nn.Module:
    """Make the network `name`, maps images (N, in_channels, *S) to logits (N, classes, *S').

    Args:
        name: a key of `MODELS`: unet, fcn32s, fcn16s, fcn8s, unpoolnet.
        in_channels: channels of the image.
        classes: channels of the logits.
        options: what the network takes besides: `UNet`, `named_fcn`, `named_unpoolnet`.

    Raises:
        ValueError: an unknown name; the text lists the known. What the network itself refuses.
        TypeError: an option that the network does not have.
    """
    if name not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(sorted(MODELS))}, got {name!r}")
    return MODELS[name](in_channels, classes, **options)
