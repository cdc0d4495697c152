"""Fully convolutional networks of classifiers (Long et al., CVPR 2015, Section 3.1)."""

from __future__ import annotations

from torch import nn

__all__ = ["as_convolution"]


def as_convolution(linear: nn.Linear, kernel: tuple[int, int]) -> nn.Conv2d:
    """A fully connected layer on a flattened map (C, *kernel), as a convolution of that kernel.

    Its weight is a view of the layer's: nothing is copied.

    Raises:
        ValueError: the layer's inputs are no multiple of the kernel's elements.
    """
    out, inputs = linear.weight.shape
    channels, rest = divmod(inputs, kernel[0] * kernel[1])
    if rest:
        raise ValueError(
            f"convolutionalize: kernel: expected to divide {inputs} inputs, got {kernel}"
        )
    conv = nn.Conv2d(channels, out, kernel, bias=linear.bias is not None, device="meta")
    weight = linear.weight.detach().view(out, channels, *kernel)
    conv.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    if linear.bias is not None:
        conv.bias = linear.bias
    return conv
