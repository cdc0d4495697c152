"""FCN-AlexNet, FCN-VGG16 and FCN-GoogLeNet as published, for the numbers of the paper's table 1.

Long, Shelhamer, Darrell: Fully Convolutional Networks for Semantic Segmentation, CVPR 2015. Their
windows are the lists in `segfuse.geometry.layers`; here are the channels. Caffe's networks, of
which these are made, differ from torchvision's (`segfuse.models.backbones`): AlexNet's channels
and its two groups, and GoogLeNet's receptive field of 907 pixels in place of 571.

Local response normalisation and dropout, which have no parameters, are left out, so these networks
are for reading, not for training; `segfuse.models.FCN` is for that.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..geometry.layers import ALEXNET, GOOGLENET, VGG16, Conv, Deconv, Layer, Pool
from .backbones.googlenet import INCEPTIONS

__all__ = ["PAPER"]

# Of a layer's convolution, or of those of each of its branches; poolings have none.
Channels = Mapping[str, int | Sequence[Sequence[int]]]

_FULLY_CONNECTED = {"fc6": 4096, "fc7": 4096}
_ALEXNET = _FULLY_CONNECTED | {
    f"conv{k}": channels for k, channels in enumerate((96, 256, 384, 384, 256), 1)
}
_GROUPED = {"conv2", "conv4", "conv5"}
_VGG16 = _FULLY_CONNECTED | {
    f"conv{block}_{k}": channels
    for block, channels in enumerate((64, 128, 256, 512, 512), 1)
    for k in range(1, 4)
}
_GOOGLENET: Channels = {"conv1": 64, "conv2_reduce": 64, "conv2": 192, **INCEPTIONS}


class _Branches(nn.ModuleList):
    """Networks side by side, their maps joined along the channels."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self], 1)


def _network(
    classes: int,
    *,
    layers: Mapping[str, Layer],
    channels: Channels,
    grouped: Collection[str] = (),
    averaged: Collection[str] = (),
) -> nn.Sequential:
    """Layers, and a 1x1 convolution to the classes.

    The `grouped` are convolutions in two groups; the `averaged` are poolings that take the mean.
    """
    net: OrderedDict[str, nn.Module] = OrderedDict()
    cin = 3
    for name, layer in layers.items():
        given = channels.get(name, 0)
        ways = [[layer]] if isinstance(layer, (Conv, Pool, Deconv)) else layer
        widths = [[given]] if isinstance(given, int) else given
        branches = [
            _chain(way, (cin, *each), 1 + (name in grouped), mean=name in averaged)
            for way, each in zip(ways, widths, strict=True)
        ]
        net[name] = _Branches(branches) if len(branches) > 1 else branches[0]
        cin = sum(each[-1] or cin for each in widths)
    net["score"] = nn.Conv2d(cin, classes, 1)
    return nn.Sequential(net)


def _chain(
    layers: Sequence[Conv | Pool | Deconv], widths: Sequence[int], groups: int, *, mean: bool
) -> nn.Sequential:
    net: list[nn.Module] = []
    steps = pairwise(widths)
    for layer in layers:
        if isinstance(layer, Conv):
            window = layer.kernel, layer.stride, layer.padding, layer.dilation
            net += [nn.Conv2d(*next(steps), *window, groups), nn.ReLU()]
        elif isinstance(layer, Pool):
            pool = nn.AvgPool2d if mean else nn.MaxPool2d
            net.append(pool(layer.kernel, layer.stride, layer.padding, ceil_mode=layer.ceil))
    return nn.Sequential(*net)


PAPER: dict[str, Callable[[int], nn.Sequential]] = {
    "fcn-alexnet": partial(_network, layers=ALEXNET, channels=_ALEXNET, grouped=_GROUPED),
    "fcn-vgg16": partial(_network, layers=VGG16, channels=_VGG16),
    "fcn-googlenet": partial(_network, layers=GOOGLENET, channels=_GOOGLENET, averaged=("pool5",)),
}
"""Name to a function from the number of classes to a network, (N, 3, H, W) to scores of stride 32.

Alex Krizhevsky, Ilya Sutskever, Geoffrey Hinton: ImageNet Classification with Deep Convolutional
Neural Networks, NIPS 2012, Section 3.5; Karen Simonyan, Andrew Zisserman: Very Deep Convolutional
Networks for Large-Scale Image Recognition, ICLR 2015, table 1, D; Christian Szegedy et al.: Going
Deeper with Convolutions, CVPR 2015, table 1.  GoogLeNet's field of 907 pixels is that of its last
average pooling, 7x7, with which it is counted in the paper's table; without, it is 715.
"""
