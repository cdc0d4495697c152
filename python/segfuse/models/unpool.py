"""An encoder and decoder without skips, where pooling's positions lead the way up."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ..geometry import Axis
from ..nn import DeconvUpsample, max_pool, max_unpool
from .backbones import Backbone
from .backbones import backbone as make_backbone
from .backbones.base import pair
from .fcn import align

__all__ = ["UnpoolNet", "named_unpoolnet"]

_FACTOR = 2  # of every pooling, and so of every step up
_UPS = ("unpool", "bilinear", "deconv")


class UnpoolNet(nn.Module):
    """VGG's convolutions down, one a level back up, and three ways to double the size.

    With "unpool", after Noh, Hong, Han: Learning Deconvolution Network for Semantic Segmentation,
    ICCV 2015, and Badrinarayanan, Kendall, Cipolla: SegNet, IEEE TPAMI 39, 2017: a value goes back
    to where the pooling of its level found its maximum, and a convolution fills the zeros between.
    As in SegNet, the fully connected layers are left out; unlike there, a level of the decoder is a
    single 3x3 convolution with batch normalisation and ReLU, to the channels of the level above. A
    1x1 convolution gives the scores.

    Nothing but positions passes from the encoder to the decoder, so networks that differ in `up`
    alone show what each way of upsampling is worth.

    Args:
        backbone: "vgg16" or "vgg16_bn", its weights drawn at random, or such a network, whose
            parameters are then shared.
        classes: channels of the scores.
        up: "unpool"; "bilinear", the fixed filter, the map's border held; "deconv", a transposed
            convolution, a 4x4 filter a channel that starts bilinear and learns.

    Attributes:
        in_channels: of the images that it is meant for, 3 or 1; it takes both.

    Shape:
        (N, 3, H, W), RGB in 0..1, or grey (N, 1, H, W), to (N, classes, H, W), for any H and W.

    Raises:
        ValueError: an argument out of its range; a backbone that shrinks maps by anything but 2x2
            poolings.

    Limits:
        As `nn.max_unpool`; with "bilinear" torch has no deterministic gradient on CUDA.
    """

    def __init__(
        self,
        backbone: str | Backbone,
        classes: int,
        *,
        up: Literal["unpool", "bilinear", "deconv"] = "unpool",
    ) -> None:
        super().__init__()
        if not isinstance(classes, int) or isinstance(classes, bool) or classes < 1:
            raise ValueError(f"UnpoolNet: expected classes to be an integer >= 1, got {classes!r}")
        if up not in _UPS:
            raise ValueError(f"UnpoolNet: expected up to be one of {', '.join(_UPS)}, got {up!r}")
        if isinstance(backbone, str):
            backbone = make_backbone(backbone)
        self.in_channels = 3
        self.classes = classes
        self.up = up
        self.scaling = backbone.scaling
        self.down = nn.ModuleList(_levels(backbone))
        widths = [_channels(level) for level in self.down]
        image = Axis(0, 1)
        kernel, doubled = align(
            image.window(1, _FACTOR, _FACTOR).padded(*self._rim), image, _FACTOR
        )
        self._crop = int(doubled.offset(image))
        self.upsample = nn.ModuleList(
            DeconvUpsample(width, _FACTOR, kernel_size=kernel, learned=up == "deconv")
            for width in widths
            if up != "unpool"
        )
        self.merge = nn.ModuleList(
            _block(width, above) for width, above in zip(widths, [widths[0], *widths], strict=False)
        )
        self.score = nn.Conv2d(widths[0], classes, 1)
        for module in (*self.merge.modules(), self.score):
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(self.score.bias)  # type: ignore[arg-type]

    @property
    def _rim(self) -> tuple[int, int]:
        """Elements by which a map is continued at either end."""
        return (1, 1) if self.up == "bilinear" else (0, 0)

    def forward(self, images: Tensor) -> Tensor:
        """Compute scores (N, classes, H, W) of images (N, 3, H, W) or (N, 1, H, W)."""
        x = self.scaling(images)
        places = []
        for level in self.down:
            x, positions = max_pool(level(x), _FACTOR)
            places.append(positions)
        for i in reversed(range(len(places))):
            if self.up == "unpool":
                x = max_unpool(x, places[i])
            else:
                x = F.pad(x, self._rim * 2, mode="replicate") if any(self._rim) else x
                x = self.upsample[i](x, offset=self._crop, size=places[i].size)
            x = self.merge[i](x)  # (N, channels of the level above, *its size)
        scores: Tensor = self.score(x)
        return scores


def named_unpoolnet(
    in_channels: int,
    classes: int,
    *,
    backbone: str = "vgg16_bn",
    weights: str | Path | None = None,
    width: float = 1.0,
    up: Literal["unpool", "bilinear", "deconv"] = "unpool",
) -> UnpoolNet:
    """Make an `UnpoolNet` of plain values, as `segfuse.models.build` has them.

    Args:
        in_channels: 3 for RGB, or 1, where the network repeats grey.
        classes: channels of the scores.
        backbone: "vgg16" or "vgg16_bn".
        weights: a file or a hub of its weights, as in `backbones.backbone`.
        width: a factor of the backbone's channels.
        up: as in `UnpoolNet`.

    Raises:
        ValueError: another number of channels; what `UnpoolNet` and `backbones.backbone` refuse.
    """
    if in_channels not in {1, 3}:
        raise ValueError(f"UnpoolNet: expected in_channels to be 1 or 3, got {in_channels!r}")
    classifier = make_backbone(backbone, weights=weights, width=width)
    net = UnpoolNet(classifier, classes, up=up)
    net.in_channels = in_channels
    return net


def _levels(backbone: Backbone) -> list[nn.Sequential]:
    """A backbone's layers between its poolings, each level's with the padding that keeps sizes."""
    encoder = backbone.encoder("aligned")
    levels: list[list[nn.Module]] = [[]]
    for stage in (encoder.to8, encoder.to16, encoder.to32):
        for layer in stage.children():
            if isinstance(layer, nn.MaxPool2d):
                windows = map(pair, (layer.kernel_size, layer.stride, layer.padding))
                if [*windows] != [(_FACTOR, _FACTOR)] * 2 + [(0, 0)]:
                    _refuse(backbone, "another pooling")
                levels.append([])
                continue
            if any(pair(getattr(m, "stride", 1)) != (1, 1) for m in layer.modules()):
                _refuse(backbone, "a stride elsewhere")
            levels[-1].append(layer)
    if levels.pop():
        _refuse(backbone, "layers behind the last pooling")
    return [nn.Sequential(*level) for level in levels]


def _refuse(backbone: Backbone, got: str) -> None:
    raise ValueError(
        "UnpoolNet: expected a backbone that shrinks maps by 2x2 poolings alone, such as vgg16, "
        f"got {type(backbone).__name__} with {got}"
    )


def _channels(level: nn.Module) -> int:
    return [m.out_channels for m in level.modules() if isinstance(m, nn.Conv2d)][-1]


def _block(cin: int, cout: int) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv"] = nn.Conv2d(cin, cout, 3, padding=1, bias=False)
    layers["norm"] = nn.BatchNorm2d(cout)
    layers["relu"] = nn.ReLU(inplace=True)
    return nn.Sequential(layers)
