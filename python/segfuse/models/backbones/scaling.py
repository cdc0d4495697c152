"""What a network's weights were trained on: the scale, the mean and the order of the channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = ["Scaling"]

_CHANNELS = 3


class Scaling(nn.Module):
    """Make of RGB images in 0..1 what a network was trained on.

    ``(image - mean) / std``, channel by channel, after the channels were put into the network's
    order.  It belongs to the weights: a model that holds it saves it with them, so that nobody can
    feed RGB to a network of BGR.

    Args:
        mean: three numbers in units of the image, in the network's order of channels.
        std: three numbers above 0, likewise.
        order: "rgb" or "bgr", the network's order of channels.

    Buffers:
        mean, std: (3,), float32.
        bgr: (), bool: whether the order is "bgr".

    Raises:
        ValueError: not three numbers, a std of 0 or less, another order.
    """

    def __init__(
        self,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        order: Literal["rgb", "bgr"] = "rgb",
    ) -> None:
        super().__init__()
        for name, value in (("mean", mean), ("std", std)):
            if len(value) != _CHANNELS or (name == "std" and min(value) <= 0):
                above = " above 0" if name == "std" else ""
                raise ValueError(f"Scaling: {name}: expected three numbers{above}, got {value!r}")
        if order not in {"rgb", "bgr"}:
            raise ValueError(f"Scaling: order: expected 'rgb' or 'bgr', got {order!r}")
        self.order = order
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor([float(m) for m in mean]))
        self.register_buffer("std", torch.tensor([float(s) for s in std]))
        self.register_buffer("bgr", torch.tensor(order == "bgr"))
        self.register_load_state_dict_post_hook(_read_order)  # type: ignore[no-untyped-call]

    @staticmethod
    def imagenet() -> Scaling:
        """RGB by the mean and the standard deviation of ImageNet: torchvision's weights."""
        return Scaling((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    @staticmethod
    def caffe(mean: Sequence[float] = (104.00699, 116.66877, 122.67892)) -> Scaling:
        """BGR in 0..255 less a mean, as Caffe's networks of ImageNet take it.

        The default is the mean of the FCN release (Long, Shelhamer, Darrell, CVPR 2015).

        Args:
            mean: three numbers in 0..255, BGR.
        """
        return Scaling([m / 255 for m in mean], [1 / 255] * len(mean), "bgr")

    def forward(self, images: Tensor) -> Tensor:
        """Scale images (N, 3, H, W), or grey ones (N, 1, H, W), to the network's (N, 3, H, W).

        Args:
            images: floating, RGB, 0..1.

        Raises:
            ValueError: another shape.
            TypeError: no tensor, or an integer one, which might hold 0..255.
        """
        if not isinstance(images, Tensor) or not images.is_floating_point():
            got = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"Scaling: images: expected a floating tensor of 0..1, got {got}")
        if images.dim() != _CHANNELS + 1 or images.shape[1] not in {1, _CHANNELS}:
            raise ValueError(
                f"Scaling: images: expected (N, 3, H, W) or (N, 1, H, W), got {tuple(images.shape)}"
            )
        if images.shape[1] == 1:
            images = images.expand(-1, _CHANNELS, -1, -1)
        elif self.order == "bgr":
            images = images.flip(1)
        mean, std = (t.to(images.dtype).view(-1, 1, 1) for t in (self.mean, self.std))
        return (images - mean) / std

    def extra_repr(self) -> str:
        """The order and, where there are any, the numbers."""
        if self.mean.is_meta:
            return self.order
        mean, std = ([round(x, 4) for x in t.tolist()] for t in (self.mean, self.std))
        return f"{self.order}, mean={mean}, std={std}"


def _read_order(scaling: nn.Module, _: Any) -> None:
    """Read the order after loading: it steers Python, so that compilers see one branch."""
    bgr = scaling.bgr
    if isinstance(bgr, Tensor) and not bgr.is_meta:
        scaling.order = "bgr" if bgr else "rgb"  # type: ignore[assignment]
