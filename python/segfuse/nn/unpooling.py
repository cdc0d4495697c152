"""Max-pooling that remembers where, and its inverse."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

__all__ = ["Positions", "max_pool", "max_unpool"]


class Positions(NamedTuple):
    """Where a max-pooling found its maxima, and on a map of which size.

    Attributes:
        indices: int64, of the pooled map's shape: into the flattened map that was pooled.
        size: an axis, of that map.
        kernel_size: of the windows, which abut.
    """

    indices: Tensor
    size: tuple[int, ...]
    kernel_size: int


_POOL = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}
_UNPOOL = {3: F.max_unpool1d, 4: F.max_unpool2d, 5: F.max_unpool3d}


def max_pool(x: Tensor, kernel_size: int = 2) -> tuple[Tensor, Positions]:
    """Pool windows that abut, of k elements an axis, the last of what is left.

    Args:
        x: (N, C, *S), one to three spatial axes.
        kernel_size: k, from 1 on.

    Returns:
        The maxima, (N, C, *ceil(S / k)), and where they were.

    Raises:
        ValueError: another rank, or k.
    """
    if x.dim() not in _POOL:
        raise ValueError(f"max_pool: x: expected (N, C, *S), got {tuple(x.shape)}")
    if kernel_size < 1:
        raise ValueError(f"max_pool: kernel_size: expected 1 or more, got {kernel_size}")
    pooled, indices = _POOL[x.dim()](x, kernel_size, ceil_mode=True, return_indices=True)
    return pooled, Positions(indices, tuple(x.shape[2:]), kernel_size)


def max_unpool(x: Tensor, positions: Positions) -> Tensor:
    """Put each value where `max_pool` found its maximum, zeros elsewhere.

    Noh, Hong, Han: Learning Deconvolution Network for Semantic Segmentation, ICCV 2015, Section
    3.2.1. The result has the size of the map that was pooled, rests included, so that no size is
    ambiguous.

    Args:
        x: (N, C, *S), of the shape of the pooled map.
        positions: of `max_pool`.

    Returns:
        (N, C, *positions.size), of x's dtype.

    Raises:
        ValueError: another shape.

    Limits:
        Under ``torch.use_deterministic_algorithms(True)`` torch refuses it.
    """
    indices, size, kernel = positions
    if x.shape != indices.shape:
        raise ValueError(
            f"max_unpool: x: expected the pooled map's shape {tuple(indices.shape)}, "
            f"got {tuple(x.shape)}"
        )
    return _UNPOOL[x.dim()](x, indices, [kernel] * len(size), output_size=size)
