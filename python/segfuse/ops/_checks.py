"""Checks that operators share.

Each raises before anything is written, naming the operator, the argument, what was expected and
what was got.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def wrong(op: str, argument: str, expected: object, got: object) -> ValueError:
    """Return the ValueError to raise for an argument."""
    return ValueError(f"{op}: {argument}: expected {expected}, got {got}")


def check_tensor(op: str, argument: str, value: object) -> None:
    """TypeError unless a dense tensor."""
    if not isinstance(value, Tensor):
        msg = f"{op}: {argument}: expected a torch.Tensor, got {type(value).__name__}"
        raise TypeError(msg)
    if value.layout != torch.strided:
        msg = f"{op}: {argument}: expected a dense tensor, got layout {value.layout}"
        raise TypeError(msg)


def check_alike(op: str, leading: str, lead: Tensor, argument: str, tensor: Tensor) -> None:
    """TypeError unless of one dtype (autocast brings them to one), ValueError unless on one device.

    ``leading`` names the argument whose dtype and device count.
    """
    if tensor.device != lead.device:
        raise wrong(op, argument, f"{leading}'s device {lead.device}", tensor.device)
    if tensor.dtype != lead.dtype and not torch.is_autocast_enabled(lead.device.type):
        msg = f"{op}: {argument}: expected {leading}'s dtype {lead.dtype}, got {tensor.dtype}"
        raise TypeError(msg)


def check_out(op: str, out: Tensor, size: Sequence[int], like: Tensor, **inputs: Tensor) -> None:
    """Check ``out=``: size, ``like``'s dtype and device, no overlap with itself or an input.

    ``inputs`` are the operator's tensors by the names of their arguments.
    """
    check_tensor(op, "out", out)
    if tuple(out.shape) != tuple(size):
        raise wrong(op, "out", f"shape {tuple(size)}", tuple(out.shape))
    if out.dtype != like.dtype:
        msg = f"{op}: out: expected dtype {like.dtype}, got {out.dtype}"
        raise TypeError(msg)
    if out.device != like.device:
        raise wrong(op, "out", f"device {like.device}", out.device)
    if _overlaps_itself(out):
        raise wrong(op, "out", "distinct elements", f"strides {out.stride()}")
    for name, tensor in inputs.items():
        if _share_memory(out, tensor):
            raise wrong(op, "out", f"memory apart from {name}'s", "shared memory")
    if torch.is_grad_enabled():
        for name, tensor in {"out": out, **inputs}.items():
            if tensor.requires_grad:
                raise wrong(op, name, "no gradient asked for beside out=", "requires_grad=True")


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two indices may mean one element; sure where axes nest, as all views of one do."""
    if tensor.numel() == 0:
        return False
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach = stride * (size - 1) + reach
    return False


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether the spans of memory from first to last element meet."""
    if a.numel() == 0 or b.numel() == 0:
        return False
    (a_begin, a_end), (b_begin, b_end) = _span(a), _span(b)
    return a_begin < b_end and b_begin < a_end


def _span(tensor: Tensor) -> tuple[int, int]:
    axes = zip(tensor.stride(), tensor.shape, strict=True)
    last = sum(stride * (size - 1) for stride, size in axes)
    begin = tensor.data_ptr()
    return begin, begin + (last + 1) * tensor.element_size()
