"""FCN's and U-Net's upsampling as modules, and dense bilinear filters as depthwise ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import bilinear_kernel, deconv_upsample, upconv_concat

__all__ = ["DeconvUpsample", "UpConv1d", "UpConv2d", "UpConv3d", "depthwise_weight"]


class DeconvUpsample(nn.Module):
    """Upsample each channel by a filter of its own, crop and add a skip, in one pass.

    :func:`segfuse.ops.deconv_upsample` with a weight that starts bilinear (Long, Shelhamer,
    Darrell, CVPR 2015, Section 3.3), or with the bilinear filter itself, which is then no part of
    the state dict.

    Args:
        channels: C.
        factor: of the upsampling, from 1 on.
        kernel_size: k, of the filter; ``2 factor - factor % 2`` by default.
        learned: have a weight.

    Attributes:
        weight: parameter (C, k, k), or None.

    Shape:
        (N, C, H, W) to (N, C, *size); see the operator.

    Raises:
        ValueError: an argument out of its range; in forward, as the operator.

    Limits:
        Channels are not mixed. For a dense transposed convolution take ``torch.nn.
        ConvTranspose2d(C, C, k, stride=factor, bias=False)``; `depthwise_weight` converts its
        weight where it is diagonal.
    """

    def __init__(
        self, channels: int, factor: int, *, kernel_size: int | None = None, learned: bool = True
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"DeconvUpsample: channels: expected 1 or more, got {channels}")
        kernel = bilinear_kernel(factor, kernel_size)
        self.channels = channels
        self.factor = factor
        self.kernel_size = kernel.shape[0]
        self.weight: nn.Parameter | None = None
        if learned:
            self.weight = nn.Parameter(torch.empty(channels, *kernel.shape))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Make the weight bilinear."""
        if self.weight is not None:
            self.weight.copy_(bilinear_kernel(self.factor, self.kernel_size))

    def forward(
        self,
        x: Tensor,
        *,
        offset: int | Sequence[int] = 0,
        size: int | Sequence[int] | None = None,
        skip: Tensor | None = None,
    ) -> Tensor:
        """Upsample x (N, C, H, W), crop ``[offset : offset + size]`` of it and add the skip."""
        return deconv_upsample(
            x,
            self.weight,
            factor=self.factor,
            kernel_size=self.kernel_size,
            offset=offset,
            size=size,
            skip=skip,
        )

    def full_size(self, size: int) -> int:
        """Elements that `size` elements of an axis make, uncropped."""
        return (size - 1) * self.factor + self.kernel_size

    def extra_repr(self) -> str:
        """Show the options."""
        learned = self.weight is not None
        return f"{self.channels}, {self.factor}, kernel_size={self.kernel_size}, {learned=}"


class _UpConv(nn.modules.conv._ConvTransposeNd):  # noqa: SLF001 - what the three have in common
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        factor: int = 2,
        *,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(factor, int) or isinstance(factor, bool) or factor < 1:
            raise ValueError(f"UpConv: factor: expected an integer, 1 or more, got {factor!r}")
        super().__init__(  # type: ignore[call-arg]  # torch's class beside it has defaults
            in_channels, out_channels, factor, stride=factor, bias=bias, device=device, dtype=dtype
        )

    def forward(
        self, x: Tensor, output_size: list[int] | None = None, *, skip: Tensor | None = None
    ) -> Tensor:
        """Up-convolve x (N, in_channels, *s), and put the skip's centre before it."""
        if skip is None:
            up: Tensor = super().forward(x, output_size)
            return up
        if output_size is not None:
            raise ValueError("UpConv: output_size: expected None where a skip is given")
        return upconv_concat(skip, x, self.weight, self.bias)


class UpConv1d(_UpConv, nn.ConvTranspose1d):
    """`UpConv2d` in one dimension."""


class UpConv2d(_UpConv, nn.ConvTranspose2d):
    """Transposed convolution whose kernel is its stride, and U-Net's crop and concatenation.

    ``torch.nn.ConvTranspose2d(in_channels, out_channels, factor, stride=factor)``, with its
    parameters and their names. Called with a skip it is :func:`segfuse.ops.upconv_concat`, which
    does not store the upsampled map.

    Args:
        in_channels: of the map that is upsampled.
        out_channels: of the upsampled map.
        factor: kernel and stride, from 1 on.
        bias: add one.
        device, dtype: of the parameters.

    Shape:
        (N, in_channels, *s) to (N, out_channels, *(factor s)); with a skip (N, Cs, *S), of at least
        that size, to (N, Cs + out_channels, *(factor s)).

    Raises:
        ValueError: a factor below 1; in forward, as the operator, or where ``output_size`` is given
            with a skip.
    """


class UpConv3d(_UpConv, nn.ConvTranspose3d):
    """`UpConv2d` in three dimensions."""


def depthwise_weight(weight: Tensor) -> Tensor:
    """Take the filters of a transposed convolution's weight that mixes no channels.

    Checkpoints of other FCNs hold upsampling weights (C, C, k, k) whose filters off the diagonal
    are zeros, with which torch multiplies C times for each time that counts.

    Args:
        weight: (C, C, k, k), or (C, 1, k, k) of a convolution in C groups.

    Returns:
        (C, k, k), a copy.

    Raises:
        ValueError: another shape; a filter off the diagonal that is not zero, with its place.
    """
    square = weight.dim() == 4 and weight.shape[2] == weight.shape[3]  # noqa: PLR2004
    if not square or weight.shape[1] not in {1, weight.shape[0]}:
        raise ValueError(
            "depthwise_weight: weight: expected (C, C, k, k) or (C, 1, k, k), "
            f"got {tuple(weight.shape)}"
        )
    if weight.shape[1] == 1:
        return weight[:, 0].detach().clone()
    mixing = (weight != 0).flatten(2).any(2)
    mixing.fill_diagonal_(fill_value=False)
    if mixing.any():
        i, o = mixing.nonzero()[0].tolist()
        raise ValueError(
            "depthwise_weight: weight: expected zeros off the diagonal, "
            f"got a filter from channel {i} to {o}"
        )
    return weight.detach().diagonal().movedim(-1, 0).clone()
