"""Networks given as lists of layers, and the published ones that FCN was made of; needs no torch.

A network is a mapping from names to layers, in order.  `chain` follows one axis through it::

    axes = chain(VGG16 | {"conv1_1": Conv(3, padding=100), "up": Deconv(64, 32)}, 500)
    axes["up"].offset(axes["data"])  # what FCN-32s crops
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

from .axis import Axis

__all__ = ["ALEXNET", "GOOGLENET", "VGG16", "Conv", "Deconv", "Layer", "Pool", "chain"]


@dataclass(frozen=True)
class Conv:
    """Convolution; sizes in elements, along one axis."""

    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1

    def __call__(self, axis: Axis) -> Axis:
        """The axis of the result."""
        span = self.dilation * (self.kernel - 1)
        size = (axis.size + 2 * self.padding - span - 1) // self.stride + 1
        return axis.window(size, self.kernel, self.stride, self.dilation, self.padding)


@dataclass(frozen=True)
class Pool:
    """Pooling; with `ceil` the last window may hang over the end, as in Caffe."""

    kernel: int
    stride: int
    padding: int = 0
    ceil: bool = False

    def __call__(self, axis: Axis) -> Axis:
        """The axis of the result."""
        rest = axis.size + 2 * self.padding - self.kernel
        size = -(-rest // self.stride) + 1 if self.ceil else rest // self.stride + 1
        if self.ceil and (size - 1) * self.stride >= axis.size + self.padding:
            size -= 1  # no window begins behind the end
        return axis.window(size, self.kernel, self.stride, 1, self.padding)


@dataclass(frozen=True)
class Deconv:
    """Transposed convolution."""

    kernel: int
    stride: int
    padding: int = 0

    def __call__(self, axis: Axis) -> Axis:
        """The axis of the result."""
        size = (axis.size - 1) * self.stride + self.kernel - 2 * self.padding
        return axis.scatter(size, self.kernel, self.stride, 1, self.padding)


Layer = Conv | Pool | Deconv | Sequence[Sequence[Conv | Pool | Deconv]]


def chain(layers: Mapping[str, Layer], size: int | Axis, start: str = "data") -> dict[str, Axis]:
    """Follow one axis through a list of layers.

    Args:
        layers: name to layer, in order.  A list of lists stands for branches that all begin at
            the layer before; their ends are joined.
        size: elements of the input, or the axis at which the layers begin.
        start: name of the input.

    Returns:
        Name to axis, the input's first.

    Raises:
        ValueError: a layer to which nothing is left, or branches that do not fit together.

    Limits:
        Layers without a window (ReLU, normalisation over channels, dropout) need not be listed.
        Normalisation by statistics of the map and pooling over all of it cannot be: the axes
        would not show that these look everywhere.
    """
    axis = Axis(0, size) if isinstance(size, int) else size
    axes = {start: axis}
    for name, layer in layers.items():
        branches = [[layer]] if isinstance(layer, (Conv, Pool, Deconv)) else layer
        ends = [_through(branch, axis) for branch in branches]
        if len({(end.size, end.scale, end.shift) for end in ends}) > 1:
            raise ValueError(f"geometry.chain: {name}: branches end on different grids")
        axis = axes[name] = reduce(Axis.joined, ends)
        if axis.size < 1:
            raise ValueError(f"geometry.chain: {name}: nothing is left of {axes[start].size}")
    return axes


def _through(branch: Iterable[Conv | Pool | Deconv], axis: Axis) -> Axis:
    for layer in branch:
        axis = layer(axis)
    return axis


def _vgg() -> dict[str, Layer]:
    net: dict[str, Layer] = {}
    for block, count in enumerate((2, 2, 3, 3, 3), 1):
        net |= {f"conv{block}_{k}": Conv(3, padding=1) for k in range(1, count + 1)}
        net[f"pool{block}"] = Pool(2, 2, ceil=True)
    return net | {"fc6": Conv(7), "fc7": Conv(1)}


def _googlenet() -> dict[str, Layer]:
    pool = Pool(3, 2, ceil=True)
    inception = (
        (Conv(1),),
        (Conv(1), Conv(3, padding=1)),
        (Conv(1), Conv(5, padding=2)),
        (Pool(3, 1, 1, ceil=True), Conv(1)),
    )
    return {
        "conv1": Conv(7, 2, 3),
        "pool1": pool,
        "conv2_reduce": Conv(1),
        "conv2": Conv(3, padding=1),
        "pool2": pool,
        **dict.fromkeys(("3a", "3b"), inception),
        "pool3": pool,
        **dict.fromkeys(("4a", "4b", "4c", "4d", "4e"), inception),
        "pool4": pool,
        **dict.fromkeys(("5a", "5b"), inception),
        "pool5": Pool(7, 1, ceil=True),
    }


VGG16: dict[str, Layer] = _vgg()
"""Simonyan, Zisserman: Very Deep Convolutional Networks for Large-Scale Image Recognition, ICLR
2015, configuration D, its first fully connected layers as convolutions (Long et al., CVPR 2015)."""

ALEXNET: dict[str, Layer] = {
    "conv1": Conv(11, 4),
    "pool1": Pool(3, 2, ceil=True),
    "conv2": Conv(5, padding=2),
    "pool2": Pool(3, 2, ceil=True),
    "conv3": Conv(3, padding=1),
    "conv4": Conv(3, padding=1),
    "conv5": Conv(3, padding=1),
    "pool5": Pool(3, 2, ceil=True),
    "fc6": Conv(6),
    "fc7": Conv(1),
}
"""Krizhevsky, Sutskever, Hinton: ImageNet Classification with Deep Convolutional Neural Networks,
NIPS 2012, as Caffe's CaffeNet, its fully connected layers as convolutions (FCN-AlexNet)."""

GOOGLENET: dict[str, Layer] = _googlenet()
"""Szegedy et al.: Going Deeper with Convolutions, CVPR 2015, to its last pooling, here 7x7 with
stride 1; the auxiliary classifiers are left out."""
