"""Graphs of classifiers, with what is flattened in them left as maps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from .sharing import as_convolution

__all__ = ["Rewriting", "wrong"]

_SPACE = {2, 3}  # dimensions of (N, C, H, W)
_MAP = 4  # how many it has


def wrong(what: str) -> ValueError:
    """Return the ValueError to raise for a classifier."""
    return ValueError(f"convolutionalize: classifier: {what}")


@dataclass(frozen=True)
class Flat:
    """What the classifier has as (N, channels h w), and the result as a map, not flattened."""

    channels: int
    side: tuple[int, int]  # h, w at the classifier's own size

    @property
    def size(self) -> int:
        """Elements of one image."""
        return self.channels * math.prod(self.side)


class Rewriting:
    """Goes through a graph's operations in order, and knows what of it is flattened.

    What is not flattened is the same in the classifier and in the result.

    Args:
        network: is rewritten, its layers are not.
        shapes: of all tensors of its graph, at the classifier's own size.
    """

    def __init__(self, network: fx.GraphModule, shapes: dict[fx.Node, tuple[int, ...]]) -> None:
        self.network = network
        self.graph = network.graph
        self.shapes = shapes
        self.flat: dict[fx.Node, Flat] = {}
        self.dropped: list[fx.Node] = []

    def run(self) -> None:
        """Rewrite.

        Raises:
            ValueError: what cannot be; the text names the layer and the reason.
        """
        for node in list(self.graph.nodes):
            if node.op == "output":
                flat = self.flat.get(node.args[0]) if isinstance(node.args[0], fx.Node) else None
                if flat is None or flat.side != (1, 1):
                    raise wrong("expected scores of a fully connected layer, or pooled over space")
            elif node.op.startswith("call"):
                self._call(node)
        for node in self.dropped:
            node.replace_all_uses_with(_source(node))
            self.graph.erase_node(node)
        self.graph.eliminate_dead_code()
        self.network.delete_all_unused_submodules()
        self.network.recompile()

    def _call(self, node: fx.Node) -> None:
        name = self._name(node)
        if name in _SIZES and node not in self.shapes:
            return
        if any(n in self.flat for n in node.all_input_nodes):
            if name not in _ON_FLAT:
                raise self._refused(node, "is given what was flattened, and has no rule for it")
            _ON_FLAT[name](self, node)
        elif name in _ON_MAP and len(self.shapes.get(_source(node), ())) == _MAP:
            _ON_MAP[name](self, node)

    # Of maps

    def flatten(self, node: fx.Node) -> None:
        """Any operation that keeps the order of elements."""
        n, channels, h, w = old = self.shapes[_source(node)]
        flat, new = Flat(channels, (h, w)), self.shapes[node]
        if new == (n, flat.size) or (len(new) < _MAP and _is_vector(flat, new)):
            self._drop(node, flat)
        elif len(new) < _MAP:
            raise self._refused(node, f"makes {new} of {old}, expected {(n, flat.size)}")

    def pool(self, node: fx.Node) -> None:
        """Adaptive pooling."""
        if node not in self.shapes:
            raise self._refused(node, "gives positions too, which no rule follows")
        *_, h, w = self.shapes[_source(node)]
        *_, to_h, to_w = self.shapes[node]
        if h % to_h or w % to_w:
            at = "to a size that does not divide it at the input size that was given"
            raise self._refused(node, f"pools {h}x{w} to {to_h}x{to_w}, {at}")
        kernel = h // to_h, w // to_w
        if kernel == (1, 1):
            self._drop(node)
            return
        stride = 1 if to_h == 1 else kernel[0], 1 if to_w == 1 else kernel[1]
        kind = nn.AvgPool2d if "avg" in self._name(node) else nn.MaxPool2d
        self._replace(node, kind(kernel, stride))

    def mean(self, node: fx.Node) -> None:
        """The mean over space, else whatever it is."""
        over = _argument(node, 1, "dim", ())
        if {d % _MAP for d in ([over] if isinstance(over, int) else over)} == _SPACE:
            _, channels, h, w = self.shapes[_source(node)]
            self._replace(node, nn.AvgPool2d((h, w), 1))
            if len(self.shapes[node]) < _MAP:
                self.flat[node] = Flat(channels, (1, 1))

    # Of what is flattened

    def reshape(self, node: fx.Node) -> None:
        """Any operation that keeps the order of elements."""
        flat, new = self.flat[_source(node)], self.shapes[node]
        if new[1:] == (flat.channels, *flat.side):
            self._drop(node)
        elif new[1:] == (flat.size,) or _is_vector(flat, new):
            self._drop(node, flat)
        else:
            raise self._refused(node, f"makes {new} of what was flattened")

    def linear(self, node: fx.Node) -> None:
        """A fully connected layer."""
        layer, flat = self._layer(node), self.flat[_source(node)]
        if layer is None:
            raise self._refused(node, "expected torch.nn.Linear in place of the function")
        self._replace(node, as_convolution(layer, flat.side))
        self.flat[node] = Flat(layer.out_features, (1, 1))

    def pointwise(self, node: fx.Node) -> None:
        """What acts on each element by itself."""
        kinds = {self.flat.get(n) for n in node.all_input_nodes if n in self.shapes}
        if None in kinds or len(kinds) > 1:
            raise self._refused(node, "joins what was flattened with what is not like it")
        self.flat[node] = self.flat[_source(node)]

    def prelu(self, node: fx.Node) -> None:
        """One slope for all, or one for each element that is flattened."""
        layer = self._layer(node)
        if layer is None or layer.num_parameters > 1:
            self._vector(node)
        self.flat[node] = self.flat[_source(node)]

    def normalise(self, node: fx.Node) -> None:
        """Batch normalisation."""
        layer, flat = self._layer(node), self._vector(node)
        if layer is None or layer.running_mean is None:
            raise self._refused(node, "expected torch.nn.BatchNorm1d with running statistics")
        plane = nn.BatchNorm2d(
            layer.num_features, layer.eps, layer.momentum, affine=layer.affine, device="meta"
        )
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            setattr(plane, name, tensor)
        self._replace(node, plane)
        self.flat[node] = flat

    def softmax(self, node: fx.Node) -> None:
        """Over the classes."""
        layer, flat = self._layer(node), self._vector(node)
        dim = _argument(node, 1, "dim") if layer is None else layer.dim
        if dim not in {1, -1}:
            raise self._refused(node, f"expected dim=1, got {dim}")
        if layer is None:
            node.args, node.kwargs = node.args[:1], {**node.kwargs, "dim": 1}
        else:
            self._replace(node, type(layer)(dim=1))
        self.flat[node] = flat

    def concatenate(self, node: fx.Node) -> None:
        """Side by side, of maps of one size."""
        nodes: Any = node.args[0]
        flats = [self.flat[n] for n in nodes if n in self.flat]
        dim = _argument(node, 1, "dim", 0)
        if dim not in {1, -1} or len(flats) < len(nodes) or len({f.side for f in flats}) > 1:
            raise self._refused(node, "joins what was flattened with what is not like it")
        node.args, node.kwargs = (nodes, 1), {}
        self.flat[node] = Flat(sum(f.channels for f in flats), flats[0].side)

    # Helpers

    def _vector(self, node: fx.Node) -> Flat:
        flat = self.flat[_source(node)]
        if flat.side != (1, 1):
            h, w = flat.side
            raise self._refused(node, f"does not treat all {h}x{w} places of the map alike")
        return flat

    def _drop(self, node: fx.Node, flat: Flat | None = None) -> None:
        self.dropped.append(node)
        if flat is not None:
            self.flat[node] = flat

    def _replace(self, node: fx.Node, layer: nn.Module) -> None:
        """Let a layer do what a node did, by the same name unless others use that too."""
        name = str(node.target) if node.op == "call_module" else node.name
        taken = [n for n in self.graph.nodes if n.op == "call_module" and n.target == name]
        if node.op != "call_module" or len(taken) > 1:
            name = f"{name}_{node.name}_"  # ends as no name does that fx makes
        source = _source(node)
        self.network.set_submodule(name, layer.train(self.network.training))
        node.op, node.target, node.args, node.kwargs = "call_module", name, (source,), {}

    def _layer(self, node: fx.Node) -> Any:
        """The module that a node calls, None where it calls a function."""
        is_layer = node.op == "call_module"
        return self.network.get_submodule(str(node.target)) if is_layer else None

    def _name(self, node: fx.Node) -> str:
        layer = self._layer(node)
        name = type(layer).__name__ if layer is not None else _called(node)
        return name.lower().replace("_", "")

    def _refused(self, node: fx.Node, reason: str) -> ValueError:
        layer = self._layer(node)
        if layer is not None:
            return wrong(f"{node.target} ({type(layer).__name__}): {reason}")
        return wrong(f"{_called(node)}: {reason}")


def _called(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _source(node: fx.Node) -> fx.Node:
    """The tensor that an operation works on."""
    first = node.args[0] if node.args else None
    return first if isinstance(first, fx.Node) else node.all_input_nodes[0]


def _argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _is_vector(flat: Flat, shape: tuple[int, ...]) -> bool:
    """Whether a shape is (N, channels, 1, ...), of a map of one element."""
    return flat.side == (1, 1) and shape[1:2] == (flat.channels,) and {*shape[2:]} <= {1}


# The table of contents: layers and functions by their names, in small letters and without "_".

_Rule = Callable[[Rewriting, fx.Node], None]

_SIZES = {"size", "getattr", "dim", "getitem"}  # where they give no tensor
_RESHAPING = ("flatten", "unflatten", "reshape", "view", "squeeze", "unsqueeze")
_POINTWISE = (
    *("relu", "relu6", "elu", "celu", "selu", "gelu", "silu", "mish", "leakyrelu", "threshold"),
    *("hardswish", "hardsigmoid", "hardtanh", "hardshrink", "softplus", "softsign", "softshrink"),
    *("sigmoid", "logsigmoid", "tanh", "tanhshrink", "identity", "dropout", "alphadropout"),
    *("add", "iadd", "sub", "isub", "mul", "imul", "div", "truediv", "itruediv", "neg", "clamp"),
    *("contiguous", "clone", "detach", "float", "double", "half", "to"),
)
_ON_MAP: dict[str, _Rule] = {
    **dict.fromkeys(_RESHAPING, Rewriting.flatten),
    **dict.fromkeys(("adaptiveavgpool2d", "adaptivemaxpool2d"), Rewriting.pool),
    "mean": Rewriting.mean,
}
_ON_FLAT: dict[str, _Rule] = {
    **dict.fromkeys(_RESHAPING, Rewriting.reshape),
    **dict.fromkeys(_POINTWISE, Rewriting.pointwise),
    **dict.fromkeys(("softmax", "logsoftmax"), Rewriting.softmax),
    **dict.fromkeys(("cat", "concat"), Rewriting.concatenate),
    "batchnorm1d": Rewriting.normalise,
    "linear": Rewriting.linear,
    "prelu": Rewriting.prelu,
}
