"""The backends that the operators are tested on, and tensors in every layout."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from segfuse import _C, _library, registry

_emulated_path = _library.FOLDER / "_emulated.so"
SEEDS = (0, 1, 2)  # orders in which the emulator runs a block's threads; 0 is the natural one

BACKENDS = [*_C.isas(), "streaming"]
if _emulated_path.exists():
    torch.ops.load_library(str(_emulated_path))
    registry.install("segfuse_emulated")
    _set_seed = ctypes.CDLL(str(_emulated_path)).segfuse_emulator_set_seed
    _set_seed.argtypes = [ctypes.c_ulong]
    BACKENDS += [f"emulated-{seed}" for seed in SEEDS]
DEVICES = ["cpu"]  # for what does not depend on which of a device's kernels run
if torch.cuda.is_available():
    BACKENDS.append("cuda")
    DEVICES.append("cuda")


def device_of(backend: str) -> str:
    return "cuda" if backend == "cuda" else "cpu"


@contextmanager
def running(backend: str) -> Iterator[None]:
    """The operators run on a backend.

    An instruction set; the best one with every ``out=`` written past the cache; the CUDA sources
    emulated, under a seed; or CUDA.
    """
    if backend.startswith("emulated"):
        _set_seed(int(backend.split("-")[1]))
        with mock.patch.object(torch.ops, "segfuse", torch.ops.segfuse_emulated):
            yield
    elif backend == "cuda":
        yield
    elif backend == "streaming":
        before_bytes = _C.streams_from()
        _C.set_streams_from(-1)
        try:
            yield
        finally:
            _C.set_streams_from(before_bytes)
    else:
        before = _C.isa()
        _C.set_isa(backend)
        try:
            yield
        finally:
            _C.set_isa(before)


def _strided(t: Tensor) -> Tensor:
    """Every second element of a larger tensor, along the last axis."""
    return torch.stack([t, t], dim=-1).flatten(-2)[..., ::2] if t.dim() else t


def _offset(t: Tensor) -> Tensor:
    """One element behind where an allocation is aligned."""
    buffer = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    return buffer[1:].view(t.shape).copy_(t)


def _transposed(t: Tensor) -> Tensor:
    return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t


def _expanded(t: Tensor) -> Tensor:
    return t[:, :1].expand(t.shape) if t.dim() > 1 and t.shape[1] else t


def _channels_last(t: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.contiguous(memory_format=formats[t.dim()]) if t.dim() in formats else t


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels_last": _channels_last,
    "strided": _strided,
    "offset": _offset,
    "transposed": _transposed,
    "expanded": _expanded,
}


def maker(backend: str, dtype: torch.dtype, *, bits: bool = False, seed: int = 0) -> registry.Make:
    """Random tensors of a dtype on a backend's or a device's memory; with ``bits``, every pattern
    of bits, NaN and all."""
    generator = torch.Generator().manual_seed(seed)

    def make(*size: int) -> Tensor:
        if dtype == torch.bool:
            t = torch.rand(size, generator=generator) < 0.5
        elif bits:
            t = torch.empty(size, dtype=dtype)
            t = torch.randint(
                0, 256, (t.numel() * t.element_size(),), generator=generator, dtype=torch.uint8
            )
            t = t.view(dtype).view(size)
        elif dtype.is_floating_point or dtype.is_complex:
            t = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
        else:
            t = torch.randint(0, 100, size, generator=generator).to(dtype)
        return t.to(device_of(backend))

    return make


def in_layout(sample: registry.Sample, layouts: tuple[str, str]) -> registry.Sample:
    """The sample with its first tensor in one layout and the others in another."""
    left = iter([layouts[0]] + [layouts[1]] * len(sample.args))
    args = [LAYOUTS[next(left)](a) if isinstance(a, Tensor) else a for a in sample.args]
    return with_kwargs(replace(sample, args=tuple(args)), LAYOUTS[layouts[1]])


def with_kwargs(sample: registry.Sample, change: Callable[[Tensor], Tensor]) -> registry.Sample:
    """The sample with its keyword arguments that are tensors changed."""
    kwargs = {k: change(v) if isinstance(v, Tensor) else v for k, v in sample.kwargs.items()}
    return replace(sample, kwargs=kwargs)


def requiring_grad(sample: registry.Sample) -> registry.Sample:
    def ask(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        return value

    kwargs = {k: ask(v) if k in sample.asking else v for k, v in sample.kwargs.items()}
    return replace(sample, args=tuple(map(ask, sample.args)), kwargs=kwargs)
