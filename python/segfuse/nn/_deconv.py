"""A stand-in, in plain PyTorch, for the operator of this name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def bilinear_kernel(factor: int, size: int | None = None) -> Tensor:
    """Make the filter (k, k) by which a transposed convolution interpolates bilinearly."""
    size = 2 * factor - factor % 2 if size is None else size
    reach = (size + 1) // 2
    centre = reach - 1 if size % 2 else reach - 0.5
    taps = 1 - (torch.arange(size) - centre).abs() / reach
    return taps[:, None] * taps


def deconv_upsample(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    factor: int,
    kernel_size: int | None = None,
    offset: int | Sequence[int] = 0,
    size: int | Sequence[int] | None = None,
    skip: Tensor | None = None,
) -> Tensor:
    """Upsample x (N, C, H, W) by weight (C, k, k), crop, add the skip."""
    if weight is None:
        weight = bilinear_kernel(factor, kernel_size).to(x).expand(x.shape[1], -1, -1)
    full = F.conv_transpose2d(x, weight[:, None], stride=factor, groups=x.shape[1])
    top, left = (offset, offset) if isinstance(offset, int) else offset
    if size is None:
        size = skip.shape[2:] if skip is not None else [full.shape[2] - top, full.shape[3] - left]
    height, width = (size, size) if isinstance(size, int) else size
    result = full[:, :, top : top + height, left : left + width]
    return result if skip is None else result + skip
