"""What the figures take: label pictures as NumPy arrays or torch tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["as_pair", "wrong"]

_LARGEST = 2**63 - 1  # an id, as ids are kept in int64


def wrong(function: str, argument: str, expected: object, got: object) -> ValueError:
    """Return the ValueError to raise for an argument."""
    return ValueError(f"{function}: {argument}: expected {expected}, got {got}")


def as_pair(function: str, prediction: object, target: object) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return two pictures of one shape as arrays of ids >= 0, bool as uint8; copy no memory."""
    one = as_ids(function, "prediction", prediction)
    other = as_ids(function, "target", target)
    if one.shape != other.shape:
        raise wrong(function, "prediction", f"target's shape {other.shape}", one.shape)
    return one, other


def as_ids(function: str, argument: str, value: object) -> NDArray[Any]:
    """Return a picture as an array of ids >= 0, bool as uint8."""
    if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested:
        dtype = str(value.dtype).removeprefix("torch.")
        integer = not (value.is_floating_point() or value.is_complex() or value.is_quantized)
        array = value.detach().cpu().numpy() if integer else np.empty(0)
    elif isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray):
        dtype, array = str(value.dtype), np.asarray(value)
        integer = array.dtype.kind in "biu"
    else:
        got = type(value).__name__
        raise TypeError(
            f"{function}: {argument}: expected a NumPy array or a dense torch tensor, got {got}"
        )
    if not integer:
        raise TypeError(f"{function}: {argument}: expected an integer dtype or bool, got {dtype}")
    if array.dtype == np.bool_:
        return array.view(np.uint8)
    if array.size and array.dtype.kind == "i" and array.min() < 0:
        raise wrong(function, argument, "ids >= 0", array.min())
    if array.size and array.dtype == np.uint64 and array.max() > _LARGEST:
        raise wrong(function, argument, "ids below 2^63", array.max())
    return array
