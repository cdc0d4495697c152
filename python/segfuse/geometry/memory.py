"""Bytes of all maps that live at once while a network runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["run_on_shapes"]


class _Living(TorchDispatchMode):
    """Follows the results of every operation until Python lets go of them."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.given = {_piece(tensor) for tensor in given}
        self.known: dict[int, ref[Tensor]] = {}
        self.holders: Counter[int] = Counter()  # piece of memory to tensors that lie in it
        self.live = self.peak = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        self.peak = max(self.peak, self.live)
        return result

    def _add(self, tensor: Tensor) -> None:
        key, piece = id(tensor), _piece(tensor)
        if key in self.known or piece in self.given:
            return
        if not self.holders[piece]:
            self.live += tensor.untyped_storage().nbytes()
        self.holders[piece] += 1
        self.known[key] = ref(tensor, self._dropper(key, piece, tensor.untyped_storage().nbytes()))

    def _dropper(self, key: int, piece: int, size: int) -> Callable[[object], None]:
        def drop(_: object) -> None:
            del self.known[key]
            self.holders[piece] -= 1
            if not self.holders[piece]:
                del self.holders[piece]
                self.live -= size

        return drop


def _piece(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001 - torch compares storages so too


def run_on_shapes(ghost: nn.Module, image: Tensor, method: str) -> tuple[Any, int]:
    """Run a network on shapes.

    Args:
        ghost: a network on the device "meta", in eval mode.
        image: (N, C, *S), on the device "meta".
        method: of the network, which is run.

    Returns:
        What that returns; bytes of all maps that live at once, at most, the image among them.

    Limits:
        Parameters and workspaces of the kernels are not counted.
    """
    given = [image, *ghost.parameters(), *ghost.buffers()]
    with torch.no_grad(), torch.device("meta"), _Living(given) as living:
        output = getattr(ghost, method)(image)
    peak: int = living.peak + image.untyped_storage().nbytes()
    return output, peak
