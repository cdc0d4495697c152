"""SqueezeNet 1.0 (Iandola et al., arXiv:1602.07360, 2016)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Backbone, widened

__all__ = ["SqueezeNet"]

_FIRES = (  # squeezed channels, and those of each of the two expansions; None is a pooling
    (16, 64),
    (16, 64),
    (32, 128),
    None,
    (32, 128),
    (48, 192),
    (48, 192),
    (64, 256),
    None,
    (64, 256),
)


class SqueezeNet(Backbone):
    """SqueezeNet 1.0 in torchvision's layout, 1,248,424 parameters.

    Its own stride is 16.  The encoder's map at stride 8 ends with fire8, at 16 with fire9, the
    last layer of the network; stride 32 is a 2x2 max-pooling more, without parameters.  The head
    is dropout.

    Args:
        classes: number of scores.
        dropout: probability of dropping an element.
        width: a factor of all channels but the image's and the classes'.
        border: elements of zeros by which the last convolution, 1x1, pads. torchvision's has none;
            in Caffe's network it is 1, and the average over the map is of the border too.

    Shape:
        (N, 3, H, W), H and W from 21 on, to (N, classes): the average over the map of scores.
        `native` is 227, which leaves no rest in the first convolution and the poolings.
    """

    native = 227

    def __init__(
        self,
        classes: int = 1000,
        *,
        dropout: float = 0.5,
        width: float = 1.0,
        border: int = 0,
    ) -> None:
        stem = widened(96, width)
        fires = [each and (widened(each[0], width), widened(each[1], width)) for each in _FIRES]
        ends = [2 * each[1] for each in fires if each]
        super().__init__(classes, (ends[-2], ends[-1], ends[-1]))
        layers: list[nn.Module] = [
            nn.Conv2d(3, stem, 7, stride=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, ceil_mode=True),
        ]
        cin = stem
        for each in fires:
            if each is None:
                layers.append(nn.MaxPool2d(3, 2, ceil_mode=True))
            else:
                layers.append(_Fire(cin, *each))
                cin = 2 * each[1]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Conv2d(cin, classes, 1, padding=border),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d((1, 1)),
        )
        self.dropout = dropout
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew; those of the last layer with standard deviation 0.01."""
        super().reset_parameters()
        last = self.get_submodule("classifier.1")
        nn.init.normal_(last.get_parameter("weight"), std=0.01)

    def _scores(self, x: Tensor) -> Tensor:
        return torch.flatten(self.classifier(self.features(x)), 1)

    def _stages(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        last = [i for i, m in enumerate(self.features) if isinstance(m, nn.MaxPool2d)][-1]
        return self.features[:last], self.features[last:], nn.MaxPool2d(2, 2)

    def _head(self, *, aligned: bool) -> nn.Module:  # noqa: ARG002 - nothing in it pads
        return nn.Dropout(self.dropout)


class _Fire(nn.Module):
    """A 1x1 convolution to few channels, and of these 1x1 and 3x3 side by side."""

    def __init__(self, cin: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(cin, squeezed, 1)
        self.squeeze_activation = nn.ReLU(inplace=True)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand1x1_activation = nn.ReLU(inplace=True)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)
        self.expand3x3_activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze_activation(self.squeeze(x))
        one = self.expand1x1_activation(self.expand1x1(x))
        three = self.expand3x3_activation(self.expand3x3(x))
        return torch.cat([one, three], 1)
