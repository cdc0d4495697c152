"""A classifier run on whole images (Long, Shelhamer, Darrell, CVPR 2015, Section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from .. import geometry
from ..geometry.glance import line, quiet
from .backbones.scaling import Scaling
from .flattened import Rewriting, wrong
from .sharing import sharing

__all__ = ["convolutionalize"]


def convolutionalize(classifier: nn.Module, input_size: int | Sequence[int]) -> nn.Module:
    """Make a classifier fully convolutional: scores of one image become a map of them.

    Where a map (C, h, w) is flattened, h and w at `input_size`, the fully connected layer behind
    becomes a convolution of that kernel with the same numbers, and those that follow it 1x1.
    Pooling to 1x1 (adaptive, or a mean over space) becomes average pooling of the size that the
    map has there, with stride 1; adaptive pooling that changes nothing there is left out, and to
    another size of which the map's is a multiple it becomes plain pooling.  All else stays.

    At `input_size` the result is the classifier's, with two axes of one element more.  On larger
    images it is a map of scores, one for each window of `input_size` at steps of the network's
    stride.  For a network without padding every cell equals the classifier on its window (the
    window's last rows and columns may see more than the classifier if a pooling that rounds up
    hangs over its end).  With padding only the interior's meaning holds: a window in the middle of
    an image sees its surroundings where the classifier saw padding.

    Args:
        classifier: any module that maps images (N, C, H, W) to scores (N, classes): the backbones
            of this package, torchvision's of those layouts, or features, flatten and
            fully connected layers of one's own.  It is looked at as in eval mode, read by
            ``torch.fx``, and not changed.
        input_size: pixels a side for which the classifier was made, one number, (H, W), or
            (C, H, W) where the channels cannot be told from its first convolution.

    Returns:
        A ``torch.fx.GraphModule`` with layers of the classifier's names, in their modes.  It has
        the same ``Parameter`` objects, but for the layers that became convolutions, whose weights
        are views of the classifier's memory.

    Raises:
        ValueError: the classifier does not run at this size, or cannot be made convolutional; the
            text names the layer and the reason.
        TypeError: no module.

    Limits:
        Functional dropout is left out.  The result is compared with the classifier on one random
        image, unless it is on the meta device, and refused if it differs.
    """
    if not isinstance(classifier, nn.Module):
        got = type(classifier).__name__
        raise TypeError(f"convolutionalize: classifier: expected a torch.nn.Module, got {got}")
    network = sharing(classifier).eval()
    image = _image(network, input_size)
    with torch.no_grad(), quiet():
        try:
            expected = network(image[:1])
        except Exception as error:
            raise wrong(f"does not run on {tuple(image.shape[1:])}: {line(error)}") from error
        if not isinstance(expected, Tensor) or expected.dim() != 2:  # noqa: PLR2004
            got = tuple(expected.shape) if isinstance(expected, Tensor) else type(expected).__name__
            raise wrong(f"expected scores (N, classes) of it, got {got}")
        result = _traced(network)
        Rewriting(result, _shapes(result, image)).run()
        _check_local(result, image)
        found = result(image[:1])
    if found.shape != (*expected.shape, 1, 1):
        raise wrong(f"expected {(*expected.shape, 1, 1)} at its own size, got {tuple(found.shape)}")
    if not expected.is_meta:
        off = float((found.flatten(1) - expected).abs().max())
        # Beyond what the order of sums makes of rounding, on CUDA that of TF32 in convolutions,
        # which has the mantissa of float16.
        rounds = torch.float16 if expected.is_cuda else expected.dtype
        if not off <= math.sqrt(torch.finfo(rounds).eps) * float(expected.abs().max()):
            raise wrong(f"does other things than torch.fx can read: scores differ by {off:.2g}")
    modes = {name: module.training for name, module in classifier.named_modules()}
    for name, module in result.named_modules():
        module.training = modes.get(name, classifier.training)
    return result


def _image(network: nn.Module, size: int | Sequence[int]) -> Tensor:
    """Two images of that size, as the network takes them."""
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) not in {2, 3} or min(sides) < 1:
        raise ValueError(
            f"convolutionalize: input_size: expected pixels a side, (H, W) or (C, H, W), got {size}"
        )
    if len(sides) == 2:  # noqa: PLR2004 - (H, W)
        convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
        sides = (convolutions[0].in_channels if convolutions else 3, *sides)
    like = next((p for p in network.parameters() if p.is_floating_point()), torch.zeros(()))
    if like.is_meta:
        return torch.empty(2, *sides, dtype=like.dtype, device=like.device)
    chance = torch.Generator().manual_seed(0)  # which leaves the user's own as it is
    return torch.rand(2, *sides, generator=chance).to(like)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Scaling) or super().is_leaf_module(m, module_qualified_name)


def _traced(network: nn.Module) -> fx.GraphModule:
    try:
        graph = _Tracer().trace(network)
    except Exception as error:
        raise wrong(f"cannot be read by torch.fx: {line(error)}") from error
    if sum(node.op == "placeholder" for node in graph.nodes) != 1:
        raise wrong("expected one argument, the image")
    return fx.GraphModule(network, graph, type(network).__name__)


def _shapes(network: fx.GraphModule, image: Tensor) -> dict[fx.Node, tuple[int, ...]]:
    """Shapes of all tensors of the graph, for these images."""
    shapes: dict[fx.Node, tuple[int, ...]] = {}

    class Watching(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor):
                shapes[n] = tuple(value.shape)
            return value

    try:
        Watching(network).run(image)
    except Exception as error:
        raise wrong(f"does not run on several images: {line(error)}") from error
    return shapes


def _check_local(result: nn.Module, image: Tensor) -> None:
    """Check that nothing is left that looks everywhere, at this size and a larger one."""
    try:
        found = [str(each) for each in geometry.of(result, tuple(image.shape)).everywhere]
    except geometry.GeometryError as error:
        what, *found = str(error).split("; ")  # what is no map, and the layers for which it is not
        if not found:
            raise wrong(what) from error
    if found:
        more = f", and {len(found) - 1} more layers that look everywhere" if found[1:] else ""
        raise wrong(f"{found[0]}{more}")
