"""AlexNet in one column (Krizhevsky: One weird trick, arXiv:1404.5997, 2014)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Backbone, convolutional_head, widened

__all__ = ["AlexNet"]

_SIDE = 6  # elements a side that the first fully connected layer takes
_HIDDEN = 4096


class AlexNet(Backbone):
    """AlexNet in torchvision's layout, 61,100,840 parameters.

    It is not the network of FCN-AlexNet, which is Caffe's: that one has 96, 256, 384, 384 and 256
    channels in place of 64, 192, 384, 256 and 256, two groups, local response normalisation, and
    no padding in its first convolution (`segfuse.geometry.layers.ALEXNET`).

    The encoder's map at stride 8 ends with the first pooling, at 16 with the second, at 32 with
    the last; the head is fc6, a 6x6 convolution, and fc7, each with ReLU and dropout, which in the
    classifier comes before each.

    Args:
        classes: number of scores.
        dropout: probability of dropping an element.
        width: a factor of all channels but the image's and the classes'.

    Shape:
        (N, 3, H, W), H and W from 63 on, to (N, classes). The last map is averaged to 6x6, of which
        224x224 makes an identity.
    """

    def __init__(self, classes: int = 1000, *, dropout: float = 0.5, width: float = 1.0) -> None:
        c1, c2, c3, c4, hidden = (widened(c, width) for c in (64, 192, 384, 256, _HIDDEN))
        super().__init__(classes, (c1, c2, hidden))
        self.features = nn.Sequential(
            nn.Conv2d(3, c1, 11, stride=4, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(c1, c2, 5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(c2, c3, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(c3, c4, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(c4, c4, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((_SIDE, _SIDE))
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(c4 * _SIDE * _SIDE, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, classes),
        )
        self.dropout = dropout
        self.reset_parameters()

    def _scores(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))  # (N, 256, 6, 6)
        scores: Tensor = self.classifier(torch.flatten(x, 1))
        return scores

    def _stages(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        pools = [i for i, m in enumerate(self.features) if isinstance(m, nn.MaxPool2d)]
        first, second = pools[0] + 1, pools[1] + 1
        return self.features[:first], self.features[first:second], self.features[second:]

    def _head(self, *, aligned: bool) -> nn.Module:
        *linears, _ = (m for m in self.classifier if isinstance(m, nn.Linear))
        return convolutional_head(linears, _SIDE, self.dropout, aligned=aligned)
