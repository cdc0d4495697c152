"""A walk through the graph of an exported network, carrying axes from its input to its outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from .axis import Axis
from .cost import Costs
from .findings import Feature, GeometryError, Trace
from .rules import (
    JOINING,
    POSITIONS_PASS,
    REASONS,
    RULES,
    UNIFORM,
    Call,
    Dims,
    LooksEverywhere,
    arguments,
    is_pointwise,
    join,
    name,
    pools,
    scalars,
    shape,
    unpools,
    values,
)

__all__ = ["walk"]

_CHECKS = ("sym_size", "_assert", "sym_constrain")  # operations without a result
_RETURN_THEIR_INPUT = {  # in eval mode; the graph gives them memory of their own
    *("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"),
}
_WRAPPERS = {"wrap_with_autocast": 4, "wrap_with_set_grad_enabled": 1}  # place of the inner graph


def walk(
    module: GraphModule,
    image: str,
    outputs: tuple[str, ...],
    known: dict[str, str],
    parameters: dict[str, tuple[int, int]],
) -> Trace:
    """Carry axes from the placeholder `image` to the results named `outputs`.

    Args:
        module: an exported network.
        image: name of its input, (1, C, *S).
        outputs: names of what it returns, in order.
        known: name of a constant to a digest of its values.
        parameters: name of a parameter to a key of the tensor that it is, and its size.

    Raises:
        GeometryError: the first output is no map in the layout of the image.
    """
    costs = Costs(image, parameters)
    return _Walk(known, costs).run(_unwrapped(module), image, outputs)


class _Walk:
    def __init__(self, known: dict[str, str], costs: Costs) -> None:
        self.trace = Trace()
        self.costs = costs
        self.known = known
        self.dims: dict[Node, Dims] = {}
        self.number: dict[Node, int] = {}
        self.memory: dict[Node, set[int]] = {}  # the pieces that a result lies in; views share them
        self.positions: set[Node] = set()  # what max-poolings returned, and views of it
        self.changed: set[Node] = set()  # constants that were written into
        self.needed: set[Node] = set()  # for the first output

    def run(self, graph: Graph, image: str, outputs: tuple[str, ...]) -> Trace:
        by_name = {node.name: node for node in graph.nodes}
        results = [by_name[output] for output in outputs if output in by_name]
        for node in graph.nodes:
            self.memory[node] = self._memory(node)
        self.needed = self._needed(results[:1])
        for index, node in enumerate(graph.nodes):
            self.number[node] = index
            if node.op == "placeholder" and node.name == image:
                size = shape(node)[2:]
                self.dims[node] = (None, None, *(Axis(k, n) for k, n in enumerate(size)))
                self._keep(node, "input", "input")
            elif node.op == "call_function" and not name(node).startswith(_CHECKS):
                self._step(node)
        self._end(results)
        return self.trace

    def _memory(self, node: Node) -> set[int]:
        if name(node) in _RETURN_THEIR_INPUT:
            return self.memory[node.all_input_nodes[0]]
        value = node.meta.get("val")
        tensors = value if isinstance(value, (list, tuple)) else [value]
        pieces = [t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor)]
        return {piece._cdata for piece in pieces}  # noqa: SLF001 - torch compares storages so too

    def _needed(self, results: list[Node]) -> set[Node]:
        """What results are made of, with all that was written into the memory of it."""
        found = _ancestors(results)
        while True:
            pieces = set().union(*(self.memory[n] for n in found))
            writes = [
                n
                for n in self.memory
                if (into := _written(n)) is not None and self.memory[into] & pieces
            ]
            more = _ancestors(writes) - found
            if not more:
                return found
            found |= more

    def _end(self, results: list[Node]) -> None:
        if not results or not self._is_map(results[0]):
            looks = "".join(f"; {finding}" for finding in self.trace.everywhere)
            raise GeometryError(f"the output is no map in the layout of the image{looks}")
        for node in filter(self._is_map, results):
            self._keep(node, node.name, "output", self.trace.outputs)

    def _is_map(self, node: Node) -> bool:
        rank = len(self.trace.features[0].axes)
        dims = self.dims.get(node, ())
        along = [a.axis if a else None for a in dims[-rank:]]
        return along == list(range(rank)) and not any(dims[:-rank]) and node not in self.positions

    def _keep(
        self,
        node: Node,
        layer: str,
        operation: str,
        into: list[Feature] | None = None,
        cost: tuple[int, int, int] = (0, 0, 0),
    ) -> None:
        value, axes = node.meta["val"], tuple(a for a in self.dims[node] if a)
        feature = Feature(layer, operation, tuple(value.shape), axes, value.dtype, *cost)
        (self.trace.features if into is None else into).append(feature)

    def _step(self, node: Node) -> None:
        op, cost = name(node), self.costs.add(node)
        self.trace.parameters += cost[0]
        self.trace.multiply_adds += cost[1]
        self.trace.depth = max(self.trace.depth, cost[2])
        self.trace.interpolations += op.removeprefix("_").startswith("upsample_")
        maps = [n for n in values(node) if any(self.dims.get(n, ()))]
        call = Call(
            node, op, _layer(node), arguments(node), maps, self.dims, self.changed, self.trace
        )
        if not maps:
            self._constant(call)
            return
        try:
            dims, rule = self._apply(call)
        except LooksEverywhere as found:
            self._blame(call, found.reason)
            dims, rule = (found.dims or _unchanged(call)), ()
        self.dims[node] = dims
        self.trace.rules.append((call.layer, op, self._wired(node), rule))
        if any(dims) and isinstance(node.meta.get("val"), torch.Tensor):
            self._keep(node, call.layer, name(maps[0]) if op == "getitem" else op, cost=cost)

    def _blame(self, call: Call, reason: str) -> None:
        if call.node in self.needed:
            self.trace.everywhere.append(call.finding(reason))

    def _apply(self, call: Call) -> tuple[Dims, tuple[Any, ...]]:
        node, op = call.node, call.op
        if self.positions.intersection(call.maps):
            if op in POSITIONS_PASS:
                self.positions.add(node)
            elif not unpools(node):
                raise LooksEverywhere("uses positions in the whole map")
        if op == "getitem":
            if node.args[1] == 1 and pools(call.maps[0]):
                self.positions.add(node)
            return call.dims, (node.args[1],)
        if self._writes_unseen(call):
            raise LooksEverywhere("changes a part or a view of a map in place")
        rule = join if is_pointwise(node) else RULES.get(op, RULES.get(op.removesuffix("_")))
        if rule is None:
            raise LooksEverywhere(REASONS.get(op, "no rule for this operation"))
        if rule not in JOINING and call.maps != [node.args[0]]:
            raise LooksEverywhere("no rule for this operation with such operands")
        dims, what = rule(call)
        along = [a.axis for a in dims if a]
        if len(set(along)) < len(along):
            raise LooksEverywhere("pairs each place with every other")
        return dims, what

    def _writes_unseen(self, call: Call) -> bool:
        """Whether another tensor in the same memory, used later, is changed with this one.

        The node itself that is written into is not used later: its result takes its place.
        """
        into = _written(call.node)
        if into is None:
            return False
        views = [n for n in self.number if self.memory[n] & self.memory[into]]
        later = {user for n in views if n not in {into, call.node} for user in n.users}
        return into is not call.node.args[0] or bool(later - self.number.keys())

    def _constant(self, call: Call) -> None:
        """What is not made of the image may depend on its size, but where it is uniform."""
        node, op = call.node, call.op
        off = call.args.get("train", True) is False  # dropout
        if not off and torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            self._blame(call, "draws at random")
        into = _written(node)
        if into is not None:
            pieces = self.memory[into]
            self.changed |= {n for n in self.number if self.memory[n] & pieces}
        rule: tuple[Any, ...]
        if op in UNIFORM:
            rule = (str(call.args.get("fill_value", call.args.get("s"))),)
        elif op in {"expand", "expand_as", "broadcast_to"}:
            rule = ()
        else:
            sizes = () if is_pointwise(node) else tuple(map(shape, values(node)))
            rule = (scalars(node), sizes)
        self.trace.rules.append((call.layer, op, self._wired(node), rule))

    def _wired(self, node: Node) -> tuple[Any, ...]:
        """Where the operands come from."""
        return tuple(
            self.number[n] if n.op == "call_function" else self.known.get(n.name, n.name)
            for n in node.all_input_nodes
        )


def _layer(node: Node) -> str:
    """Where in the module an operation stands."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return (stack[-1][0] if stack else "") or node.name


def _written(node: Node) -> Node | None:
    """The tensor that an operation changes in place."""
    schema = getattr(node.target, "_schema", None)
    for argument in schema.arguments if schema else ():
        if argument.is_write:
            value = arguments(node).get(argument.name)
            return value if isinstance(value, Node) else None
    return None


def _ancestors(nodes: list[Node]) -> set[Node]:
    """These, and all that they are made of."""
    found: set[Node] = set()
    left = list(nodes)
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += node.all_input_nodes
    return found


def _unchanged(call: Call) -> Dims:
    """Axes of the first map that keep their size."""
    if len(call.new) != len(call.dims):
        return (None,) * len(call.new)
    pairs = zip(call.dims, call.new, strict=True)
    return tuple(a if a and a.size == n else None for a, n in pairs)


def _unwrapped(module: GraphModule) -> Graph:
    """The graph, with the inner graphs of autocast regions put in their places."""
    graph: Graph = module.graph
    for node in list(graph.nodes):
        place = _WRAPPERS.get(name(node)) if node.op == "call_function" else None
        if place is None:
            continue
        target: Any = node.args[place]
        inner = getattr(module, target.target)
        given = node.args[place + 1 :]
        places = [n for n in inner.graph.nodes if n.op == "placeholder"]
        with graph.inserting_before(node):
            values: Any = graph.graph_copy(inner.graph, dict(zip(places, given, strict=True)))
        for user in list(node.users):  # getitem: it returns a tuple
            index: Any = user.args[1]
            user.replace_all_uses_with(values[index])
            graph.erase_node(user)
        graph.erase_node(node)
    return graph
