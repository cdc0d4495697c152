"""VGG16 (Simonyan, Zisserman: Very Deep Convolutional Networks, ICLR 2015, configuration D)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Backbone, convolutional_head, widened

__all__ = ["VGG"]

_BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels and convolutions
_SIDE = 7  # elements a side that the first fully connected layer takes
_HIDDEN = 4096


class VGG(Backbone):
    """VGG16, plain or with batch normalisation; 138,357,544 and 138,365,992 parameters.

    The encoder's map at stride 8 ends with the third pooling, at 16 with the fourth, at 32 with
    the fifth; the head is fc6, a 7x7 convolution, and fc7, each with ReLU and dropout.

    Args:
        classes: number of scores.
        batch_norm: batch normalisation between convolution and ReLU, as in torchvision's vgg16_bn.
        dropout: probability of dropping an element.
        width: a factor of all channels but the image's and the classes'.

    Shape:
        (N, 3, H, W), H and W from 32 on, to (N, classes). The last map is averaged to 7x7, of which
        224x224 makes an identity.
    """

    def __init__(
        self,
        classes: int = 1000,
        *,
        batch_norm: bool = False,
        dropout: float = 0.5,
        width: float = 1.0,
    ) -> None:
        blocks = [(widened(channels, width), count) for channels, count in _BLOCKS]
        hidden, last = widened(_HIDDEN, width), blocks[-1][0]
        super().__init__(classes, (blocks[2][0], blocks[3][0], hidden))
        layers: list[nn.Module] = []
        cin = 3
        for cout, count in blocks:
            for _ in range(count):
                layers.append(nn.Conv2d(cin, cout, 3, padding=1))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(cout))
                layers.append(nn.ReLU(inplace=True))
                cin = cout
            layers.append(nn.MaxPool2d(2, 2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((_SIDE, _SIDE))
        self.classifier = nn.Sequential(
            nn.Linear(last * _SIDE * _SIDE, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, classes),
        )
        self.dropout = dropout
        self.reset_parameters()

    def _scores(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))  # (N, 512, 7, 7)
        scores: Tensor = self.classifier(torch.flatten(x, 1))
        return scores

    def _stages(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        pools = [i for i, m in enumerate(self.features) if isinstance(m, nn.MaxPool2d)]
        third, fourth = pools[2] + 1, pools[3] + 1
        return self.features[:third], self.features[third:fourth], self.features[fourth:]

    def _head(self, *, aligned: bool) -> nn.Module:
        *linears, _ = (m for m in self.classifier if isinstance(m, nn.Linear))
        return convolutional_head(linears, _SIDE, self.dropout, aligned=aligned)
