"""What all backbones share: scores of images, and the encoder that FCN makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..sharing import as_convolution, sharing
from .scaling import Scaling

__all__ = ["Backbone", "Encoder", "Layout", "convolutional_head", "pair", "widened"]

Layout = Literal["published", "aligned"]

_PUBLISHED = 100  # pixels by which FCN's release pads the image in its first convolution


class Encoder(nn.Module):
    """A backbone in three stages and a head, each a module, for dense prediction.

    Attributes:
        to8: from the scaled image (N, 3, H, W) to a map of stride 8.
        to16: from there to stride 16.
        to32: from there to stride 32.
        head: the classifier without its last layer, as convolutions; dropout alone where the
            classifier has no more.
        channels: of the results of `to8`, `to16` and `head`.
    """

    def __init__(
        self,
        to8: nn.Module,
        to16: nn.Module,
        to32: nn.Module,
        head: nn.Module,
        channels: tuple[int, int, int],
    ) -> None:
        super().__init__()
        self.to8 = to8
        self.to16 = to16
        self.to32 = to32
        self.head = head
        self.channels = channels

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the maps at stride 8, at stride 16, and the head's, of scaled images."""
        at8 = self.to8(x)  # (N, channels[0], about H / 8, W / 8)
        at16 = self.to16(at8)
        return at8, at16, self.head(self.to32(at16))


class Backbone(nn.Module):
    """A classifier of ImageNet in torchvision's layout: its names, its shapes.

    What torchvision has published for the network, or its users have saved, loads strictly, and
    the other way round.  Unlike torchvision's it takes images as they are, RGB in 0..1, and scales
    them itself: `scaling` goes with the weights.  It is no part of the state dict.

    Attributes:
        scaling: what the weights were trained on; may be set.
        classes: number of scores.
        channels: of the maps at stride 8 and 16 and of the encoder's head.
    """

    scaling: Scaling
    native = 224  # pixels a side of the images that the weights were trained on

    def __init__(self, classes: int, channels: tuple[int, int, int]) -> None:
        super().__init__()
        self.classes = classes
        self.channels = channels
        self.scaling = self.default_scaling()
        self.register_state_dict_post_hook(_without_scaling)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_with_scaling)  # type: ignore[no-untyped-call]

    @staticmethod
    def default_scaling() -> Scaling:
        """What torchvision's published weights of this network were trained on."""
        return Scaling.imagenet()

    def forward(self, images: Tensor) -> Tensor:
        """Compute scores (N, classes) of images (N, 3, H, W), RGB, 0..1, floating.

        Grey images (N, 1, H, W) are taken too.  H and W are `native`, or whatever the network's
        layers can take.
        """
        return self._scores(self.scaling(images))

    def encoder(self, layout: Layout) -> Encoder:
        """Make an encoder that shares this network's parameters, with other padding.

        Convolutions and normalisations have the same ``Parameter`` objects and buffers.  Fully
        connected layers become convolutions whose weights are views of the same memory, so that
        nothing is copied: to train one of the two networks trains the other. But as parameters
        these weights are new, so ``.to`` another device or dtype moves what is the same in both
        networks and the views in one alone: move the classifier first, or copy it.

        Args:
            layout: "published", as FCN was released (Long, Shelhamer, Darrell, CVPR 2015): the
                first convolution pads by 100 pixels, in place of its own padding, all poolings
                round up, all else pads as in the classifier, and the head's first convolution,
                7x7 in VGG and 6x6 in AlexNet, does not.
                "aligned": windows of odd width k, poolings too, pad by k // 2, so that elements are
                their centres; 2x2 poolings round up; the head's 7x7 convolution pads by 3, the 6x6
                by 2 before and 3 after, which puts its outputs in the middle of the pixels that
                they stand for. So a stage of stride s makes ceil(n / s) of n elements, from 1 on:
                the coarse map covers the image, and nothing but it.

        Raises:
            ValueError: another layout.
        """
        if layout not in {"published", "aligned"}:
            raise ValueError(f"layout: expected 'published' or 'aligned', got {layout!r}")
        stages = [sharing(stage) for stage in self._stages()]
        windows = [m for m in chain(*map(_windows, stages)) if max(pair(m.kernel_size)) > 1]
        for window in windows:
            if layout == "published":
                if isinstance(window, nn.MaxPool2d):
                    window.ceil_mode = True
            else:
                sides = pair(window.kernel_size)
                window.padding = tuple(k // 2 if k % 2 else 0 for k in sides)
                if isinstance(window, nn.MaxPool2d):  # padded, it covers the rest without
                    window.ceil_mode = not all(k % 2 for k in sides)
        if layout == "published":
            windows[0].padding = (_PUBLISHED, _PUBLISHED)
        to8, to16, to32 = stages
        return Encoder(to8, to16, to32, self._head(aligned=layout == "aligned"), self.channels)

    def _scores(self, x: Tensor) -> Tensor:
        """Scores of scaled images."""
        raise NotImplementedError

    def _stages(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """The network's own modules up to stride 8, 16 and 32."""
        raise NotImplementedError

    def _head(self, *, aligned: bool) -> nn.Module:
        """The head of an encoder, of the network's parameters."""
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew.

        Convolutions as He et al. (ICCV 2015), normal with variance 2 / fan-in; fully connected
        layers normal with standard deviation 0.01; biases zero; batch normalisation starts afresh.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
                continue
            if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
                nn.init.zeros_(module.bias)


def convolutional_head(
    linears: list[nn.Linear], kernel: int, dropout: float, *, aligned: bool
) -> nn.Sequential:
    """Fully connected layers as convolutions, each with ReLU and dropout behind it.

    With `aligned` the first, `kernel` wide, pads so that the map keeps its size; an even one has
    the odd element behind.
    """
    before, after = (kernel - 1) // 2, kernel // 2
    layers: list[nn.Module] = []
    if aligned and before != after:
        layers.append(nn.ZeroPad2d((before, after, before, after)))
    for i, linear in enumerate(linears):
        conv = as_convolution(linear, (1, 1) if i else (kernel, kernel))
        if aligned and before == after and not i:
            conv.padding = (before, before)
        layers += [conv, nn.ReLU(inplace=True), nn.Dropout(dropout)]
    return nn.Sequential(*layers)


def widened(channels: int, width: float) -> int:
    """Channels times `width`, at least one."""
    return max(1, round(channels * width))


def _windows(module: nn.Module) -> Iterator[Any]:
    return (m for m in module.modules() if isinstance(m, (nn.Conv2d, nn.MaxPool2d)))


def pair(value: int | tuple[int, ...]) -> tuple[int, ...]:
    """A layer's option as (rows, columns)."""
    return (value, value) if isinstance(value, int) else tuple(value)


def _without_scaling(_: Any, state: dict[str, Any], prefix: str, __: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}scaling.")]:
        del state[name]


def _with_scaling(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, value in module.scaling.state_dict().items():
        state.setdefault(f"{prefix}scaling.{name}", value)
