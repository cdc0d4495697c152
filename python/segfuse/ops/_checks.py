"""Checks that operators share.

Each raises before anything is written, naming the operator, the argument, what was expected and
what was got.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from ..registry import AUTOCAST_KEYS, FLOATING


def wrong(op: str, argument: str, expected: object, got: object) -> ValueError:
    """Return the ValueError to raise for an argument."""
    return ValueError(f"{op}: {argument}: expected {expected}, got {got}")


def check_tensor(op: str, argument: str, value: object, *, floating: bool = False) -> None:
    """TypeError unless a dense tensor of a plain dtype, a floating one if so asked."""
    if not isinstance(value, Tensor):
        got = type(value).__name__
        raise TypeError(f"{op}: {argument}: expected a torch.Tensor, got {got}")
    if value.layout != torch.strided or value.is_nested:
        got = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{op}: {argument}: expected a dense tensor, got {got}")
    if value.is_quantized or (floating and value.dtype not in FLOATING):
        expected = "float64, float32, float16 or bfloat16" if floating else "a plain dtype"
        raise TypeError(f"{op}: {argument}: expected {expected}, got {value.dtype}")


def as_integer(op: str, argument: str, value: object) -> int:
    """Return a plain integer of 64 bits, from whatever can index; TypeError or ValueError."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        number: int = value  # type: ignore[assignment]  # which may be symbolic, in a trace
    else:
        try:
            number = operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            raise TypeError(f"{op}: {argument}: expected an integer, got {value!r}") from None
    if not -(2**63) <= number < 2**63:
        raise wrong(op, argument, "an integer of 64 bits", value)
    return number


IDS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_ids(op: str, argument: str, value: object) -> None:
    """TypeError unless a dense tensor of a dtype that class ids may have."""
    check_tensor(op, argument, value)
    if isinstance(value, Tensor) and value.dtype not in IDS:
        expected = "uint8, int8, int16, int32 or int64"
        raise TypeError(f"{op}: {argument}: expected {expected}, got {value.dtype}")


def label_dtype(classes: int) -> torch.dtype:
    """Return the narrowest of uint8, int16 and int32 that holds ids of so many classes."""
    if classes <= 2**8:
        return torch.uint8
    return torch.int16 if classes <= 2**15 else torch.int32


def check_classes(
    op: str, argument: str, ids: Tensor, *, classes: int, target: Tensor, ignore_index: int | None
) -> None:
    """ValueError for the first id that is no class, where ``target`` is not ignored.

    Waits for the GPU.
    """
    if ids.is_meta:
        return
    bad = (ids < 0) | (ids.long() >= classes)
    if ignore_index is not None:
        bad = bad & (target.long() != ignore_index)
    if not bad.any():
        return
    first = tuple(bad.nonzero()[0].tolist())
    ignored = (
        f" or ignore_index {ignore_index}" if ids is target and ignore_index is not None else ""
    )
    expected = f"class ids 0 to {classes - 1}{ignored}"
    raise wrong(op, argument, expected, f"{ids[first].item()} at {first}")


def check_alike(
    op: str, leading: str, lead: Tensor, argument: str, tensor: Tensor, *, promotes: bool = False
) -> None:
    """ValueError unless on one device, TypeError unless of one dtype.

    ``leading`` names the argument whose device and dtype count.  With ``promotes`` dtypes may
    differ under autocast, since the operator has a rule for them.
    """
    if tensor.device != lead.device:
        raise wrong(op, argument, f"{leading}'s device {lead.device}", tensor.device)
    if tensor.dtype != lead.dtype and not (promotes and autocasts(lead.device)):
        raise TypeError(
            f"{op}: {argument}: expected {leading}'s dtype {lead.dtype}, got {tensor.dtype}"
        )


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for a kind of device; false where there is no such thing."""
    return device.type in AUTOCAST_KEYS and torch.is_autocast_enabled(device.type)


def check_apart(op: str, out: Tensor | Sequence[Tensor] | None, **inputs: Tensor | None) -> None:
    """ValueError where the span of memory of ``out``, or one of several, meets an input's.

    As csrc/core/out.h has it, for inputs of which the kernel is given copies.  Tensors without
    memory, in a trace, pass.
    """
    if out is None or torch.compiler.is_compiling():
        return
    for to in (out,) if isinstance(out, Tensor) else out:
        begin, end = _span(to)
        for name, tensor in inputs.items():
            start, stop = (0, 0) if tensor is None else _span(tensor)
            if start < end and begin < stop:
                raise wrong(op, "out", f"memory apart from {name}'s", "shared memory")


def _span(tensor: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte and behind its last; of no memory (0, 0)."""
    try:
        address = tensor.data_ptr() if tensor.numel() else 0
    except RuntimeError:  # for want of memory
        address = 0
    if address == 0:
        return 0, 0
    steps = zip(tensor.stride(), tensor.shape, strict=True)
    last = sum(step * (size - 1) for step, size in steps)
    return address, address + (last + 1) * tensor.element_size()


def check_out(op: str, out: Tensor, size: Sequence[int], like: Tensor, **inputs: Tensor) -> None:
    """Check ``out=``: size, ``like``'s dtype and device, no part in autograd.

    ``inputs`` are the operator's tensors by the names of their arguments.  What only the memory can
    tell (elements that coincide, memory shared with an input) csrc/core/out.h checks, as the kernel
    runs: here ``out`` may be a tensor that is being traced.
    """
    check_tensor(op, "out", out)
    if tuple(out.shape) != tuple(size):
        raise wrong(op, "out", f"shape {tuple(size)}", tuple(out.shape))
    if out.dtype != like.dtype:
        raise TypeError(f"{op}: out: expected dtype {like.dtype}, got {out.dtype}")
    if out.device != like.device:
        raise wrong(op, "out", f"device {like.device}", out.device)
    if not torch.compiler.is_compiling():  # which cannot ask
        if out.is_conj() or out.is_neg():
            raise wrong(op, "out", "memory as it is", "a conjugated or negated view")
        if out.is_inference() and not torch.is_inference_mode_enabled():
            raise wrong(op, "out", "no inference tensor outside of inference mode", "one")
    if torch.is_grad_enabled():
        for name, tensor in {"out": out, **inputs}.items():
            if tensor.requires_grad:
                raise wrong(op, name, "no gradient asked for beside out=", "requires_grad=True")
