"""What a network's operations cost: the parameters that they use, and their multiply-adds."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from torch.fx import Node

from .rules import arguments, name, shape

__all__ = ["Costs", "multiply_adds"]

_CONVOLUTIONS = {f"conv{n}d" for n in (1, 2, 3)}
_TRANSPOSED = {f"conv_transpose{n}d": "input" for n in (1, 2, 3)}  # and what they take
_TRANSPOSED |= {"segfuse::upconv_concat": "x"}


def multiply_adds(node: Node) -> int:
    """Count products that are added up, in convolutions, transposed ones and matrix products.

    Padding counts as if it were of the image, as in the usual tables.  Pooling, interpolation,
    normalisation and what works element by element count nothing.
    """
    op, args = name(node), arguments(node)
    if op in _CONVOLUTIONS:  # weight (out, in / groups, *kernel)
        return prod(shape(node)) * prod(shape(args["weight"])[1:])
    if op in _TRANSPOSED:  # weight (in, out / groups, *kernel)
        return prod(shape(args[_TRANSPOSED[op]])) * prod(shape(args["weight"])[1:])
    if op == "segfuse::deconv_upsample":  # (kernel / factor)^2 taps a pixel, in the mean
        taps: int = prod(shape(node)) * args["kernel_size"] ** 2 // args["factor"] ** 2
        return taps
    if op == "linear":
        return prod(shape(node)) * shape(args["weight"])[-1]
    if op == "matmul":
        return prod(shape(node)) * shape(args["self"])[-1]
    return 0


class Costs:
    """Follows parameters to the operations that use them, and counts convolutions in a row.

    Args:
        image: the graph's input that is the image.
        parameters: names of its other inputs to a key and a size; a tensor that has several names
            has one key.
    """

    def __init__(self, image: str, parameters: Mapping[str, tuple[int, int]]) -> None:
        self.image = image
        self.parameters = parameters
        self.made: set[Node] = set()  # of the image
        self.held: dict[Node, dict[int, int]] = {}  # parameters that other results are made of
        self.seen: set[int] = set()
        self.depth: dict[Node, int] = {}

    def add(self, node: Node) -> tuple[int, int, int]:
        """Take the next operation, in order.

        Returns:
            Numbers that it is the first to use on the image; its multiply-adds; convolutions on the
            longest way from the image to here.
        """
        inputs = node.all_input_nodes
        self.depth[node] = max((self.depth.get(n, 0) for n in inputs), default=0)
        held: dict[int, int] = {}
        for n in inputs:
            held |= self.held.get(n, {})
            if n.name in self.parameters:
                key, size = self.parameters[n.name]
                held[key] = size
        if not any(n in self.made or n.name == self.image for n in inputs):
            self.held[node] = held  # such as a weight that is normalised first
            return 0, 0, 0
        self.made.add(node)
        self.depth[node] += name(node) in _CONVOLUTIONS
        fresh = sum(size for key, size in held.items() if key not in self.seen)
        self.seen |= held.keys()
        return fresh, multiply_adds(node), self.depth[node]
