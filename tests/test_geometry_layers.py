"""Published networks as lists of layers: receptive fields, and FCN's crop offsets, all derived."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from segfuse.geometry import Axis
from segfuse.geometry.layers import (
    ALEXNET,
    GOOGLENET,
    VGG16,
    Conv,
    Deconv,
    Layer,
    Pool,
    chain,
)
from segfuse.geometry.network import trace

SIZES = (321, 384, 499, 500, 512, 513)  # several residues modulo 32


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("net", "layer", "field"),
    [(ALEXNET, "fc7", 355), (VGG16, "fc7", 404), (GOOGLENET, "pool5", 907)],
)
def test_receptive_field_and_stride(
    net: dict[str, Layer], layer: str, field: int, size: int
) -> None:
    axis = chain(net, size)[layer]
    assert (axis.reach, axis.scale) == (field, 32)


@pytest.mark.parametrize(("net", "size"), [(ALEXNET, 227), (VGG16, 224), (GOOGLENET, 224)])
def test_a_classifiers_own_size_gives_one_element(net: dict[str, Layer], size: int) -> None:
    assert list(chain(net, size).values())[-1].size == 1


def fcn(net: dict[str, Layer], size: int, **more: Layer) -> dict[str, Axis]:
    """As released: 100 pixels of padding in the first convolution."""
    first, conv = next(iter(net.items()))
    assert isinstance(conv, Conv)
    padded = Conv(conv.kernel, conv.stride, 100, conv.dilation)
    return chain(net | {first: padded} | {"score": Conv(1)} | more, size)


@pytest.mark.parametrize("size", SIZES)
def test_crop_offsets_of_fcn(size: int) -> None:
    for net, kernel, offset in ((VGG16, 64, 19), (ALEXNET, 63, 18)):
        axes = fcn(net, size, up=Deconv(kernel, 32))
        assert axes["up"].offset(axes["data"]) == offset
        assert axes["up"].size >= size + offset

    axes = fcn(VGG16, size, up2=Deconv(4, 2))
    assert axes["pool4"].offset(axes["up2"]) == 5  # their sum lies where `up2` does
    sixteen, eight = Deconv(32, 16), {"up4": Deconv(4, 2), "up8": Deconv(16, 8)}
    axes |= chain({"up16": sixteen}, axes["up2"], "sum4") | chain(eight, axes["up2"], "sum4")
    assert axes["up16"].offset(axes["data"]) == 27
    assert axes["pool3"].offset(axes["up4"]) == 9
    assert axes["up8"].offset(axes["data"]) == 31


layer = st.one_of(
    st.builds(Conv, st.integers(1, 5), st.integers(1, 3), st.integers(0, 4), st.integers(1, 3)),
    st.integers(2, 4).flatmap(
        lambda k: st.builds(
            Pool, st.just(k), st.integers(1, 3), st.integers(0, k // 2), st.booleans()
        )
    ),
    st.builds(Deconv, st.integers(2, 5), st.integers(1, 3), st.integers(0, 1)),
)


def module(made: Any) -> nn.Module:
    if isinstance(made, Conv):
        return nn.Conv1d(1, 1, made.kernel, made.stride, made.padding, made.dilation)
    if isinstance(made, Pool):
        return nn.MaxPool1d(made.kernel, made.stride, made.padding, ceil_mode=made.ceil)
    return nn.ConvTranspose1d(1, 1, made.kernel, made.stride, made.padding)


@settings(deadline=None, max_examples=60)
@given(st.lists(layer, min_size=1, max_size=3), st.integers(150, 190))
def test_a_list_of_layers_is_the_network_that_it_names(made: list[Any], size: int) -> None:
    axes = chain({str(k): part for k, part in enumerate(made)}, size)
    with torch.device("meta"):
        net = nn.Sequential(*map(module, made))
        assert net(torch.empty(1, 1, size)).shape[2] == list(axes.values())[-1].size
    found = trace(net.to_empty(device="cpu"), (1, 1, size))
    assert [f.axes[0] for f in found.features] == list(axes.values())


def test_branches() -> None:
    net: dict[str, Layer] = {"a": Conv(3), "b": [[Conv(1)], [Conv(5, padding=2)]], "c": Pool(2, 2)}
    axes = chain(net, 21)
    assert list(axes) == ["data", "a", "b", "c"]
    assert [a.size for a in axes.values()] == [21, 19, 19, 9]
    assert (axes["b"].reach, axes["b"].shift, axes["b"].bad_lo) == (7, 1, 2)
    assert axes["c"].shift == Fraction(3, 2)
    with pytest.raises(ValueError, match="b: branches end on different grids"):
        chain({"b": [[Conv(1)], [Conv(3)]]}, 9)
    with pytest.raises(ValueError, match="d: nothing is left of 4"):
        chain({"d": Conv(9)}, 4)
