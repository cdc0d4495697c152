"""One record an operator: from it come PyTorch's registrations, the tests and the benchmarks.

An operator has one public function and a few kernels, each a schema of csrc/library.cpp.  The
kernels' shape functions, gradients and autocast rules are declared here as data, so that they can
be installed for more than one namespace: ``segfuse``, and in the tests ``segfuse_emulated``, where
the CUDA sources run on the host.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _library

P = ParamSpec("P")
R = TypeVar("R")

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


class Operator(Protocol[P, R]):
    """A function with a slow version in plain PyTorch that defines it."""

    __name__: str
    reference: Callable[P, R]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the kernels, or the reference where there are none."""
        ...


def defined_by(
    reference: Callable[P, R],
) -> Callable[[Callable[P, R]], Operator[P, R]]:
    """Decorator: attach ``.reference``, which must have the same signature."""

    def attach(function: Callable[P, R]) -> Operator[P, R]:
        operator = cast("Operator[P, R]", function)
        operator.reference = reference
        return operator

    return attach


@dataclass(frozen=True)
class Kernel:
    """A schema, and what PyTorch must know beyond its forward function."""

    name: str
    fake: Callable[..., Any]
    """The result's shape, dtype and layout."""
    backward: Callable[..., Any] | None = None
    setup_context: Callable[..., None] | None = None
    autocast: Callable[..., tuple[Any, ...]] | None = None
    """From the arguments under autocast to those that the kernel is called with."""


@dataclass(frozen=True)
class Sample:
    """A call of an operator."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    differentiable: bool = True
    """Whether the result has a gradient, where the operator is differentiable at all."""
    asking: tuple[str, ...] = ()
    """Keyword arguments that get gradients, beside every positional one that is floating."""


Make = Callable[..., Tensor]
"""``make(*size)``: a random tensor of the dtype, device and layout that is being tested."""


@dataclass(frozen=True)
class OpSpec:
    """All that is known of an operator, save its kernels' source."""

    function: Operator[..., Any]
    kernels: tuple[Kernel, ...]
    samples: Callable[[Make], Iterator[Sample]]
    failures: Callable[[Make], Iterator[tuple[Sample, type[Exception], str]]]
    """Calls that must raise: the call, the error and a part of its text."""
    benchmarks: Callable[[Make], Iterator[Benchmark]]
    dtypes: tuple[torch.dtype, ...] = FLOATING
    exact: bool = False
    """Bit for bit the reference's result; otherwise measured against float64."""
    takes_out: bool = False
    differentiable: bool = True
    comparable: Callable[[Sample, Any], tuple[Tensor, ...]] = lambda _sample, result: (
        result if isinstance(result, tuple) else (result,)
    )
    """From a call's result to tensors that equal the reference's, where a contract leaves a choice.
    """

    @property
    def name(self) -> str:
        """The public name, ``segfuse.ops.<name>``."""
        return self.function.__name__


@dataclass(frozen=True)
class Benchmark:
    """A case to be timed against what a user would write without us.

    The functions hold the case's tensors; an operator makes them only as its cases are asked for.
    """

    name: str
    """Ends in the memory condition: "out=", the caller's memory; "reused", a result in memory that
    an earlier one returned; "fresh", in memory that the system has just given."""
    ours: Callable[[], Any]
    peer: Callable[[], Any]
    bytes_moved: int | None
    """Bytes that any implementation must read and write: the floor, at copy bandwidth.  None where
    arithmetic takes the time, so that there is no such floor."""


OPS: dict[str, OpSpec] = {}
_libraries: list[torch.library.Library] = []  # a library's registrations live as long as it


def register(spec: OpSpec) -> None:
    """Add an operator and install its kernels."""
    OPS[spec.name] = spec
    for kernel in spec.kernels:
        _install(kernel, "segfuse")


def install(namespace: str) -> None:
    """Install every operator's kernels for another namespace that has the same schemas."""
    for spec in OPS.values():
        for kernel in spec.kernels:
            _install(kernel, namespace)


def _install(kernel: Kernel, namespace: str) -> None:
    name = f"{namespace}::{kernel.name}"
    torch.library.register_fake(name, kernel.fake)
    if kernel.backward is not None:
        torch.library.register_autograd(name, kernel.backward, setup_context=kernel.setup_context)
    if kernel.autocast is not None:
        library = torch.library.Library(namespace, "IMPL")
        for device, key in AUTOCAST_KEYS.items():
            library.impl(kernel.name, _autocast(name, device, kernel.autocast), key)
        _libraries.append(library)


def _autocast(name: str, device: str, rule: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
    namespace, function = name.split("::")

    def call(*args: Any) -> Any:
        args = rule(*args)
        with torch.autocast(device, enabled=False):
            return getattr(getattr(torch.ops, namespace), function)(*args)

    return call


def runs_reference(name: str, tensor: Tensor) -> bool:
    """Whether an operator must run its reference on a tensor; said once where kernels are missing.

    So on a device without kernels of ours, and within torch.func and forward-mode differentiation,
    which the gradients that are registered from Python do not reach.
    """
    reason = _why_no_kernels(tensor.device)
    if reason and (name, tensor.device.type) not in _warned:
        _warned.add((name, tensor.device.type))
        warnings.warn(
            f"segfuse.ops.{name}: no kernels for {tensor.device.type} ({reason}); the reference in "
            "plain PyTorch runs instead",
            stacklevel=3,
        )
    return bool(reason) or _is_transformed()


_warned: set[tuple[str, str]] = set()


def _why_no_kernels(device: torch.device) -> str:
    if device.type in ("cpu", "meta"):
        return ""
    return _library.why_not_on(device) if device.type == "cuda" else "there are none for it"


def _is_transformed() -> bool:
    transformed: bool = torch._C._are_functorch_transforms_active()  # noqa: SLF001
    return transformed or forward_ad._current_level >= 0  # noqa: SLF001
