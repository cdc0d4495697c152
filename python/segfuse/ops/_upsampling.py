"""What operators share that upsample scores by a factor, or to a size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv_transpose2d, interpolate

from ._checks import as_integer, check_tensor, wrong
from ._tiles import wide

LONGEST_KERNEL = 1024  # taps along an axis


def as_factor(op: str, factor: object) -> int:
    """Check an upsampling's factor."""
    number = as_integer(op, "factor", factor)
    if not 1 <= number < 2**31:
        raise wrong(op, "factor", f"1 to {2**31 - 1}", number)
    return number


def as_kernel_size(op: str, argument: str, factor: int, size: object) -> int:
    """Check the width of a factor's filter, or give that of the bilinear one."""
    number = 2 * factor - factor % 2 if size is None else as_integer(op, argument, size)
    if not 1 <= number <= LONGEST_KERNEL:
        raise wrong(op, argument, f"1 to {LONGEST_KERNEL}", number)
    return number


def as_pair(op: str, argument: str, value: int | Sequence[int]) -> tuple[int, int]:
    """Check what is a number, or one for each of two axes."""
    values = tuple(value) if isinstance(value, (Sequence, torch.Size)) else (value, value)
    if len(values) != 2:  # noqa: PLR2004
        raise wrong(op, argument, "a number or one for each of 2 axes", value)
    return as_integer(op, argument, values[0]), as_integer(op, argument, values[1])


def kernel_of(size: int, like: Tensor | None = None) -> Tensor:
    """Make the bilinear filter in the dtype of ``like``'s arithmetic, on its device."""
    reach = (size + 1) // 2
    centre = reach - 1 if size % 2 else reach - 0.5
    dtype = torch.float32 if like is None else wide(like.dtype)
    at = torch.arange(size, dtype=dtype, device=None if like is None else like.device)
    taps = 1 - (at - centre).abs() / reach
    return taps[:, None] * taps


@dataclass(frozen=True)
class Upsampling:
    """How scores are upsampled: by a transposed convolution, or by interpolation.

    Attributes:
        size: of the result, (height, width).
        factor: of the transposed convolution; 0: bilinear interpolation.
        kernel_size: of its filter; 0 without a factor.
        offset: elements to crop from its start.
        align_corners: of the interpolation.
    """

    size: tuple[int, int]
    factor: int
    kernel_size: int
    offset: tuple[int, int]
    align_corners: bool

    @classmethod
    def checked(  # noqa: C901, PLR0917  (one check after the other)
        cls,
        op: str,
        scores: Tensor,
        weight: Tensor | None,
        size: int | Sequence[int],
        factor: int | None,
        kernel_size: int | None,
        offset: int | Sequence[int],
        align_corners: bool,  # noqa: FBT001
    ) -> Upsampling:
        """Check scores (N, C, H, W), and the arguments that say how they are upsampled."""
        check_tensor(op, "scores", scores, floating=True)
        if scores.dim() != 4 or 0 in scores.shape[1:]:  # noqa: PLR2004
            raise wrong(op, "scores", "(N, C, H, W), C, H and W at least 1", tuple(scores.shape))
        starts, (height, width) = as_pair(op, "offset", offset), as_pair(op, "size", size)
        if height < 0 or width < 0:
            raise wrong(op, "size", "0 or more", (height, width))
        if factor is None:
            given = {"kernel_size": kernel_size, "weight": weight}
            for name, value in given.items():
                if value is not None:
                    raise wrong(op, name, "None without a factor", _brief(value))
            if starts != (0, 0):
                raise wrong(op, "offset", "0 without a factor", offset)
            return cls((height, width), 0, 0, starts, bool(align_corners))
        if align_corners:
            raise wrong(op, "align_corners", "False with a factor", align_corners)
        factor = as_factor(op, factor)
        if weight is not None:
            kernel_size = _checked_kernel(op, scores, weight, kernel_size)
        kernel = as_kernel_size(op, "kernel_size", factor, kernel_size)
        for axis, (n, start, length) in enumerate(
            zip(scores.shape[2:], starts, (height, width), strict=True), 2
        ):
            most = (n - 1) * factor + kernel
            if start < 0 or start + length > most:
                expected = f"a range within the {most} elements of axis {axis}"
                raise wrong(op, "offset and size", expected, f"{start} and {length}")
        return cls((height, width), int(factor), kernel, starts, align_corners=False)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """As schemas have them, but for the size."""
        return self.factor, self.kernel_size, self.offset, self.align_corners

    def reference(self, scores: Tensor, weight: Tensor | None) -> Tensor:
        """Upsample in plain PyTorch, in the arithmetic's dtype."""
        dtype = wide(scores.dtype)
        x = scores.to(dtype)
        if 0 in self.size or not x.numel():
            nothing = 0 * (x.sum() + (0 if weight is None else weight.sum()))
            return x.new_zeros(*x.shape[:2], *self.size) + nothing
        if not self.factor:
            return interpolate(x, self.size, mode="bilinear", align_corners=self.align_corners)
        if weight is None:
            weight = kernel_of(self.kernel_size, x).expand(x.shape[1], -1, -1)
        full = conv_transpose2d(x, weight.to(dtype)[:, None], stride=self.factor, groups=x.shape[1])
        (top, left), (height, width) = self.offset, self.size
        return full[:, :, top : top + height, left : left + width]


def _checked_kernel(op: str, scores: Tensor, weight: Tensor, kernel_size: int | None) -> int:
    """Check a weight (C, k, k); gives k."""
    check_tensor(op, "weight", weight, floating=True)
    channels, k = scores.shape[1], weight.shape[-1] if weight.dim() else 0
    if tuple(weight.shape) != (channels, k, k):
        raise wrong(op, "weight", f"({channels}, k, k)", tuple(weight.shape))
    if weight.device != scores.device:
        raise wrong(op, "weight", f"scores' device {scores.device}", weight.device)
    if weight.dtype not in {scores.dtype, torch.float32}:
        expected = f"scores' dtype {scores.dtype} or float32"
        raise TypeError(f"{op}: weight: expected {expected}, got {weight.dtype}")
    if kernel_size is not None and as_integer(op, "kernel_size", kernel_size) != k:
        raise wrong(op, "kernel_size", f"weight's {k}", kernel_size)
    return k


def _brief(value: object) -> object:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else value
