"""Models as they are looked at: in eval mode, by shapes alone, and never changed."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from copy import deepcopy
from dataclasses import dataclass, field
from io import StringIO
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .findings import GeometryError
from .memory import run_on_shapes

__all__ = [
    "Glance",
    "checked_shape",
    "copied",
    "evaluating",
    "first_tensor",
    "glance",
    "like",
    "line",
    "output_size",
    "quiet",
    "remembered",
]

_REMEMBERED = 256  # sizes of one model, such as those of a long folder


@dataclass(frozen=True)
class Glance:
    """What shapes tell of a network at one input size.

    Attributes:
        output: shape of the (first) output.
        peak: bytes of all maps that live at once, at most, with the input.
    """

    output: tuple[int, ...]
    peak: int


@dataclass
class _Memory:
    """What was found of a model, as long as it looks as it did."""

    look: str
    named: list[object]  # kept, so that none takes another's identity
    ghost: nn.Module | None = None  # on the device "meta"
    found: dict[Any, Any] = field(default_factory=dict)


_memories: WeakKeyDictionary[nn.Module, _Memory] = WeakKeyDictionary()


def _memory(model: nn.Module) -> _Memory:
    look, named = _look(model)
    memory = _memories.get(model)
    if memory is None or memory.look != look:
        memory = _memories[model] = _Memory(look, named)
    return memory


def remembered(model: nn.Module) -> dict[Any, Any]:
    """A dictionary that lives as long as the model and forgets when it is changed."""
    found = _memory(model).found
    if len(found) > _REMEMBERED:
        found.clear()
    return found


def glance(model: nn.Module, shape: Sequence[int], method: str = "__call__") -> Glance | None:
    """Run a network on shapes alone; None where it fails, or cannot be run so.

    Args:
        model: as in `of`.
        shape: (N, C, *S); N is of no account.
        method: run this method instead.
    """
    shape = (1, *checked_shape(shape)[1:])
    known = remembered(model)
    key = "glance", shape, method
    if key not in known:
        known[key] = _glanced(model, shape, method)
    found: Glance | None = known[key]
    return found


def _glanced(model: nn.Module, shape: tuple[int, ...], method: str) -> Glance | None:
    memory = _memory(model)
    image = torch.empty(shape, device="meta", dtype=like(model).dtype)
    with quiet():
        try:
            if memory.ghost is None:
                memory.ghost = copied(model, "meta")
            output, peak = run_on_shapes(memory.ghost, image, method)
            return Glance(tuple(first_tensor(output).shape), peak)
        except Exception:  # noqa: BLE001 - whatever a network raises at a size it cannot take
            return None


def output_size(model: nn.Module, shape: Sequence[int]) -> tuple[int, ...] | None:
    """Spatial size of the output at input `shape`, None where the network fails.

    Nothing is computed but shapes.
    """
    found = glance(model, shape)
    return None if found is None or 0 in found.output else found.output[2:]


def copied(model: nn.Module, device: str | None = None) -> nn.Module:
    """A copy in eval mode, so that the model keeps its state; tensors are shared, or on "meta"."""
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    held = [*model.parameters(), *model.buffers()]
    held += [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor)]
    memo = {id(t): t.detach().to(device) if device else t for t in held}
    try:
        return deepcopy(model, memo).eval()
    except Exception as error:
        raise GeometryError(f"the network cannot be copied: {line(error)}") from error


def line(error: Exception) -> str:
    """The first of an error's message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


def first_tensor(value: Any) -> Tensor:
    """The output of a network that returns a tensor, or several.

    Raises:
        TypeError: there is none.
    """
    leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    if not leaves:
        raise TypeError(f"model: expected a tensor as output, got {type(value).__name__}")
    return leaves[0]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set a model to eval mode and put every part back to its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch.export's warnings, log and printed graphs off the user's terminal."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def like(model: nn.Module) -> Tensor:
    """One zero of the dtype and on the device that the model takes."""
    for p in (*model.parameters(), *model.buffers()):
        if p.is_floating_point():
            return torch.zeros(1, dtype=p.dtype, device=p.device)
    return torch.zeros(1)


def _look(model: nn.Module) -> tuple[str, list[object]]:
    """What a model is made of, but for its numbers; and the objects that this names by identity.

    It changes where a layer, a parameter's shape, an option, a function or a hook does.
    """
    named: list[object] = []
    seen: set[int] = set()

    def told(value: object) -> object:
        if isinstance(value, (bool, int, float, complex, str, bytes, type(None))):
            return repr(value)
        if isinstance(value, Tensor):
            return tuple(value.shape), str(value.dtype), str(value.device)
        if id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, (list, tuple, set, frozenset)):
                return [told(v) for v in value]
            if isinstance(value, dict):
                return [(told(k), told(v)) for k, v in value.items()]
            named.append(value)
            if hasattr(value, "__dict__") and not isinstance(value, type):
                return id(value), [(k, told(v)) for k, v in vars(value).items() if k != "training"]
        return id(value)

    parts = [(name, id(type(m).forward), told(m)) for name, m in model.named_modules()]
    one = like(model)
    what = (repr(model), parts, one.dtype, one.device)
    return hashlib.sha256(repr(what).encode()).hexdigest(), named


def checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Check (N, C, *S).

    Raises:
        ValueError: no batch, channels or space.
    """
    shape = tuple(shape)
    if not 3 <= len(shape) <= 5 or min(shape) < 1:  # noqa: PLR2004
        raise ValueError(
            f"geometry: shape: expected (N, C, *S) with one to three spatial axes, got {shape}"
        )
    return shape
