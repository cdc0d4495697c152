"""GoogLeNet (Szegedy et al.: Going Deeper with Convolutions, CVPR 2015)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Backbone, widened
from .scaling import Scaling

__all__ = ["INCEPTIONS", "GoogLeNet"]

# Channels of 1x1; of 3x3 and what reduces to it; of 5x5 likewise; behind the pooling.
INCEPTIONS = {
    "3a": ((64,), (96, 128), (16, 32), (32,)),
    "3b": ((128,), (128, 192), (32, 96), (64,)),
    "4a": ((192,), (96, 208), (16, 48), (64,)),
    "4b": ((160,), (112, 224), (24, 64), (64,)),
    "4c": ((128,), (128, 256), (24, 64), (64,)),
    "4d": ((112,), (144, 288), (32, 64), (64,)),
    "4e": ((256,), (160, 320), (32, 128), (128,)),
    "5a": ((256,), (160, 320), (32, 128), (128,)),
    "5b": ((384,), (192, 384), (48, 128), (128,)),
}
_TO16 = "maxpool3"  # the layers with which the stages begin
_TO32 = "maxpool4"


class GoogLeNet(Backbone):
    """GoogLeNet in torchvision's layout, without auxiliary classifiers, 6,624,904 parameters.

    It differs from the paper's: batch normalisation follows each convolution, those of 5x5 are of
    3x3, and the fourth pooling is 2x2, so that its receptive field is 571 pixels in place of 907
    (`segfuse.geometry.layers.GOOGLENET`).

    The encoder's map at stride 8 ends with inception 3b, at 16 with 4e, at 32 with 5b; the head is
    dropout.

    Args:
        classes: number of scores.
        dropout: probability of dropping an element.
        width: a factor of all channels but the image's and the classes'.

    Scaling:
        (image - 0.5) / 0.5, which torchvision's published weights were trained on and its
        ``transform_input`` arrives at. Weights trained otherwise want theirs set.

    Shape:
        (N, 3, H, W), H and W from 15 on, to (N, classes). The last map, 7x7 of 224x224, is
        averaged.
    """

    def __init__(self, classes: int = 1000, *, dropout: float = 0.2, width: float = 1.0) -> None:
        stem, conv3 = widened(64, width), widened(192, width)
        blocks = {
            name: [[widened(c, width) for c in branch] for branch in each]
            for name, each in INCEPTIONS.items()
        }
        out = {name: sum(branch[-1] for branch in each) for name, each in blocks.items()}
        super().__init__(classes, (out["3b"], out["4e"], out["5b"]))
        self.conv1 = _Convolution(3, stem, 7, stride=2, padding=3)
        self.maxpool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2 = _Convolution(stem, stem, 1)
        self.conv3 = _Convolution(stem, conv3, 3, padding=1)
        self.maxpool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        cin, pools = conv3, {"4a": (_TO16, 3), "5a": (_TO32, 2)}
        for name, each in blocks.items():
            if name in pools:
                pool, kernel = pools[name]
                self.add_module(pool, nn.MaxPool2d(kernel, 2, ceil_mode=True))
            self.add_module(f"inception{name}", _Inception(cin, each))
            cin = out[name]
        self._layers = [name for name, _ in self.named_children() if name != "scaling"]
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(cin, classes)
        self.reset_parameters()

    @staticmethod
    def default_scaling() -> Scaling:
        """What torchvision's published weights of this network were trained on."""
        return Scaling((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

    def _scores(self, x: Tensor) -> Tensor:
        for name in self._layers:
            x = getattr(self, name)(x)  # last (N, 1024, H / 32, W / 32)
        scores: Tensor = self.fc(self.dropout(torch.flatten(self.avgpool(x), 1)))
        return scores

    def _stages(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        cuts = [0, self._layers.index(_TO16), self._layers.index(_TO32), len(self._layers)]
        to8, to16, to32 = (
            nn.Sequential(OrderedDict((name, getattr(self, name)) for name in self._layers[a:b]))
            for a, b in pairwise(cuts)
        )
        return to8, to16, to32

    def _head(self, *, aligned: bool) -> nn.Module:  # noqa: ARG002 - nothing in it pads
        return nn.Dropout(self.dropout.p)


class _Convolution(nn.Module):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(
        self, cin: int, cout: int, kernel: int, *, stride: int = 1, padding: int = 0
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(cout, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class _Inception(nn.Module):
    """Four branches side by side; the channels as in `INCEPTIONS`."""

    def __init__(self, cin: int, channels: Sequence[Sequence[int]]) -> None:
        super().__init__()
        (one,), (red3, three), (red5, five), (pool,) = channels
        self.branch1 = _Convolution(cin, one, 1)
        self.branch2 = nn.Sequential(
            _Convolution(cin, red3, 1), _Convolution(red3, three, 3, padding=1)
        )
        self.branch3 = nn.Sequential(
            _Convolution(cin, red5, 1), _Convolution(red5, five, 3, padding=1)
        )
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(3, 1, padding=1, ceil_mode=True), _Convolution(cin, pool, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        branches = (self.branch1, self.branch2, self.branch3, self.branch4)
        return torch.cat([branch(x) for branch in branches], 1)
