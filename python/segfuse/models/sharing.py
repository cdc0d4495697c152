"""Networks made of another's parameters."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any, TypeVar

from torch import nn

__all__ = ["as_convolution", "sharing"]

Module = TypeVar("Module", bound=nn.Module)


def sharing(module: Module) -> Module:
    """A copy with the same ``Parameter`` objects and buffers, whose layers may be changed."""
    memo: dict[int, Any] = {id(t): t for t in chain(module.parameters(), module.buffers())}
    return copy.deepcopy(module, memo)


def as_convolution(linear: nn.Linear, kernel: tuple[int, int]) -> nn.Conv2d:
    """A fully connected layer on a flattened map (C, *kernel), as a convolution of that kernel.

    Its weight is a view of the layer's memory, its bias the layer's own.

    Raises:
        ValueError: the layer's inputs are no multiple of the kernel's elements.
    """
    out, inputs = linear.weight.shape
    channels, rest = divmod(inputs, kernel[0] * kernel[1])
    if rest:
        raise ValueError(f"kernel: expected its elements to divide {inputs} inputs, got {kernel}")
    conv = nn.Conv2d(channels, out, kernel, bias=linear.bias is not None, device="meta")
    weight = linear.weight.detach().view(out, channels, *kernel)
    conv.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    if linear.bias is not None:
        conv.bias = linear.bias
    return conv
