"""The rules: what each operation does to the spatial axes of the map that it takes.

A rule takes a `Call` and returns the axes of the result, one entry a dimension, and a description
of what the operation does that holds no size: the same for a tile and for the whole image.  It
raises `LooksEverywhere` where tiles cannot equal the whole image.  `RULES` lists every operation
that has one; all others, but for torch's pointwise ones, count as looking everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import torch
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from .axis import Axis
from .findings import Finding, Resize, Trace

__all__ = [
    "JOINING",
    "POSITIONS_PASS",
    "REASONS",
    "RULES",
    "UNIFORM",
    "Call",
    "Dims",
    "LooksEverywhere",
    "arguments",
    "is_pointwise",
    "join",
    "name",
    "pools",
    "scalars",
    "shape",
    "unpools",
    "values",
]

Dims = tuple[Axis | None, ...]  # one entry a dimension; None where it is not spatial
Result = tuple[Dims, tuple[Any, ...]]

_ROUNDING = Fraction(1, 64)  # of an element: what float32 positions err by, to 131,072 elements
_LARGEST = 32  # terms of the fraction by which maps are resized; nearest is exact by all of these


class LooksEverywhere(Exception):  # noqa: N818 - no error, but what there is to say of a layer
    """An operation under which a tile cannot equal the whole image.

    `dims` are the axes to go on with; None means those of the input that keep their size.
    """

    def __init__(self, reason: str, dims: Dims | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.dims = dims


@dataclass(frozen=True)
class Call:
    """One operation of the graph, with what is known of the tensors that it takes."""

    node: Node
    op: str
    layer: str
    args: dict[str, Any]
    maps: list[Node]  # inputs that have spatial axes
    dims_of: Mapping[Node, Dims]
    changed: set[Node]  # constants that were written into
    trace: Trace

    @property
    def dims(self) -> Dims:
        """Of the first map."""
        return self.dims_of[self.maps[0]]

    @property
    def old(self) -> tuple[int, ...]:
        """Shape of the first map."""
        return shape(self.maps[0])

    @property
    def new(self) -> tuple[int, ...]:
        """Shape of the result, of its first tensor if there are several."""
        return shape(self.node)

    def finding(self, reason: str) -> Finding:
        """Say something of this operation."""
        return Finding(self.layer, self.op, reason)

    def each(self, rank: int, move: Callable[[int, Axis, int], Axis]) -> Dims:
        """Apply ``move(d, axis, new size)`` to the axes among the last `rank` dimensions.

        The dimension before these is that of channels; d counts back from -1, as kernels do.
        """
        if len(self.dims) > rank and self.dims[-rank - 1]:
            raise LooksEverywhere("treats a spatial axis as channels")
        last = len(self.dims)
        return tuple(
            move(d - last, a, self.new[d]) if a and d - last >= -rank else a
            for d, a in enumerate(self.dims)
        )

    def meet(self, a: Axis, b: Axis) -> Axis:
        """Join two axes element by element."""
        if (a.axis, a.size, a.scale) != (b.axis, b.size, b.scale):
            raise LooksEverywhere(
                f"joins maps of different grids ({a.size} elements of {a.scale} pixels, "
                f"{b.size} of {b.scale})"
            )
        if a.shift != b.shift:
            self.trace.misaligned.append((self.finding("joins"), b.shift - a.shift))
        return a.joined(b)


# Windows


def _per_axis(value: int | Iterable[int], rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def _windows(call: Call, rank: int, move: Callable[..., Axis], parts: list[list[int]]) -> Dims:
    """Move the last `rank` dimensions: kernel, stride, dilation, padding of each are `parts`."""
    return call.each(rank, lambda d, a, n: move(a, n, *(part[d] for part in parts)))


def _convolution(call: Call) -> Result:
    args, kernel = call.args, list(shape(call.args["weight"])[2:])
    rank = len(kernel)
    stride, dilation = (_per_axis(args[name], rank) for name in ("stride", "dilation"))
    if args["padding"] == "same":  # an odd rest goes to the far end
        padding = [d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)]
    else:
        padding = _per_axis(0 if args["padding"] == "valid" else args["padding"], rank)
    move = Axis.scatter if "transpose" in call.op else Axis.window
    parts = [kernel, stride, dilation, padding]
    dims = _windows(call, rank, move, parts)
    return dims, (*map(tuple, parts), str(args.get("output_padding")), args["groups"])


def _pooling(call: Call) -> Result:
    args, rank = call.args, int(next(c for c in call.op if c.isdigit()))
    kernel = _per_axis(args["kernel_size"], rank)
    stride = _per_axis(args.get("stride") or kernel, rank)
    dilation = _per_axis(args.get("dilation") or 1, rank)
    parts = [kernel, stride, dilation, _per_axis(args["padding"], rank)]
    extra = [args.get(n) for n in ("ceil_mode", "count_include_pad", "divisor_override")]
    return _windows(call, rank, Axis.window, parts), (*map(tuple, parts), *extra)


def _pixel_shuffle(call: Call) -> Result:
    up = call.op == "pixel_shuffle"
    factor = [call.args["upscale_factor" if up else "downscale_factor"]] * 2
    move = Axis.scatter if up else Axis.window
    return _windows(call, 2, move, [factor, factor, [1] * 2, [0] * 2]), (factor[0],)


def _unpooling(call: Call) -> Result:
    """The max-pooling whose positions it takes says how far they lie."""
    indices = call.args["indices"]
    pooling = _pooling_of(indices)
    if pooling is None or not any(call.dims_of.get(indices, ())):
        raise LooksEverywhere("unpools by positions that no max-pooling of the network returned")
    args = arguments(pooling)
    pooled = [a for a in call.dims_of[pooling.args[0]] if a]  # type: ignore[index]
    kernel, stride = (
        _per_axis(args[name] or args["kernel_size"], len(pooled))
        for name in ("kernel_size", "stride")
    )
    if (
        kernel != stride
        or any(_per_axis(args["padding"], 1))
        or {*_per_axis(args["dilation"], 1)} != {1}
    ):
        raise LooksEverywhere("unpools overlapping or padded windows")
    by_axis = {a.axis: (a.size, k) for a, k in zip(pooled, kernel, strict=True)}
    dims: list[Axis | None] = []
    for a, b, n in zip(
        call.dims_of[call.args["self"]], call.dims_of[indices], call.new, strict=True
    ):
        if a is None or b is None:
            dims.append(None)
            continue
        size, k = by_axis[a.axis]
        if n != size:  # positions count along rows of the length that was pooled
            raise LooksEverywhere("unpools to another size than was pooled")
        dims.append(call.meet(a, b).scatter(n, k, k))
    return tuple(dims), tuple(kernel)


def _pooling_of(indices: Node) -> Node | None:
    """The max-pooling that returned these positions."""
    node: Any = indices
    while isinstance(node, Node) and name(node) in POSITIONS_PASS:
        node, index = node.args[0], node.args[1] if name(node) == "getitem" else None
        if isinstance(node, Node) and pools(node):
            return node if index == 1 else None
    return None


def pools(node: Node) -> bool:
    """Whether an operation is a pooling; its second result is positions."""
    return RULES.get(name(node)) is _pooling


def unpools(node: Node) -> bool:
    """Whether an operation takes positions."""
    return RULES.get(name(node)) is _unpooling


# Resizing


def _interpolation(call: Call) -> Result:
    """Nearest, linear and cubic interpolation.

    Enlarging reads `reach` elements either side of a position; 0 is the nearest one.  By a whole
    number that is a power of two, or any with nearest, a tile of its own does the same arithmetic
    as the whole image.  Else it must sample at positions of the whole, see `Resize`.
    """
    reach = 0 if "nearest" in call.op else 2 if "cubic" in call.op else 1
    corners = bool(call.args.get("align_corners"))
    ways = {  # of each dimension, from -1 back
        d - len(call.dims): _Way.of(call.old[d], call.new[d], scale, reach, corners=corners)
        for d, scale in enumerate(_scales(call), 2)
    }
    absolute = any(way.absolute for way in ways.values())
    if absolute and any(way.factor < 1 for way in ways.values()):
        raise LooksEverywhere("shrinks one axis and resizes another by positions of the whole")

    def resize(d: int, a: Axis, n: int) -> Axis:
        way = ways[d]
        if way.factor == 1:
            return a
        if way.factor < 1:
            return _shrunk(a, n, way.factor.denominator, reach, exact="exact" in call.op)
        if reach == 0 and not way.absolute:
            return a.scatter(n, int(way.factor), int(way.factor))
        return a.interpolate(n, way.factor, max(1, reach), way.drift)

    dims = call.each(len(call.dims) - 2, resize)
    if absolute:
        before, after = (tuple(a for a in axes if a) for axes in (call.dims, dims))
        call.trace.resizes.append(Resize(call.layer, call.trace.interpolations - 1, before, after))
    return dims, (tuple(ways.values()), corners)


@dataclass(frozen=True)
class _Way:
    """How one axis is resized: by `factor`, on positions up to `drift` elements off."""

    factor: Fraction
    drift: Fraction
    absolute: bool

    @staticmethod
    def of(n: int, m: int, scale: float | None, reach: int, *, corners: bool) -> _Way:
        factor = _factor(n, m, scale)
        rest = abs(m - factor * n) / factor
        if m == n:
            drift = Fraction(0)
        elif corners:  # element i lies at i (n - 1) / (m - 1)
            drift = rest + Fraction(1, 2)
        else:  # at (i + 1/2) n / m - 1/2, unless the factor was given
            drift = Fraction(0) if scale else rest
        if factor < 1 and (drift or factor.numerator != 1):
            raise LooksEverywhere(f"shrinks {n} elements to {m}, at positions set by the size")
        steady = factor.denominator == 1 and (reach == 0 or factor.numerator.bit_count() == 1)
        absolute = factor > 1 and (drift > 0 or not steady)
        return _Way(factor, drift + _ROUNDING * absolute, absolute)


def _scales(call: Call) -> list[float | None]:
    """The factors that were given; None where the kernel takes the sizes' ratio."""
    rank, args = len(call.dims) - 2, call.args
    given = args.get("scale_factors")
    if given is None:
        given = [args.get("scales") or args.get(f"scales_{c}") for c in "dhw"[-rank:]]
    return list(given)


def _factor(n: int, m: int, scale: float | None) -> Fraction:
    """The fraction by which n elements become m, but for a rest that sizes leave."""
    if scale:
        factor = Fraction(scale).limit_denominator(_LARGEST)
        simple = abs(factor - Fraction(scale)) < factor * Fraction(1, 10**9)
    elif m < n:
        factor, simple = Fraction(m, n), n % m == 0
    else:  # to the size of a skip: 99 to 199 is by 2, and a rest
        factor = Fraction(round(Fraction(m, n)))
        simple = abs(m - factor * n) < factor
    if not simple or max(factor.numerator, factor.denominator) > _LARGEST:
        by = f"by {scale}" if scale else f"{n} elements to {m}"
        raise LooksEverywhere(f"resizes {by}, which is no simple factor")
    return factor


def _shrunk(a: Axis, n: int, step: int, reach: int, *, exact: bool) -> Axis:
    """Interpolation to every `step`-th element: a window about ``step (i + 1/2) - 1/2``."""
    if reach == 0:
        return a.window(n, 1, step, 1, -(step // 2) if exact else 0)
    if step % 2:  # the position is an element, and its neighbours have no weight
        return a.window(n, 1, step, 1, -(step // 2))
    return a.window(n, 2 * reach, step, 1, -(step // 2 - reach))


# Padding and cropping


def _pad(call: Call) -> Result:
    args, dims = call.args, list(call.dims)
    widths = list(args["pad"])
    mode = args.get("mode") or call.op.removesuffix("_pad_nd")  # constant_pad_nd has no mode
    for k in range(len(widths) // 2):
        d, (before, after) = len(dims) - 1 - k, widths[2 * k : 2 * k + 2]
        if not (old := dims[d]):
            continue
        dims[d] = old.padded(before, after)
        if mode != "constant" and max(before, after) > 0:
            # What the border repeats must be sound itself: element 0, or up to `before`.
            mirrors = mode == "reflect"
            call.trace.sound += [
                (old.axis, old.size - old.bad_hi, before * mirrors + 1),
                (old.axis, old.size - old.bad_lo, after * mirrors + 1),
            ]
    if mode == "circular":
        raise LooksEverywhere("joins opposite borders of the image", tuple(dims))
    return tuple(dims), (mode, *widths, args.get("value"))


def _slice(call: Call) -> Result:
    args, dims = call.args, call.dims
    d = args["dim"] % len(dims)
    n, step = call.old[d], args.get("step") or 1
    start = args.get("start") or 0
    start = max(0, start + n) if start < 0 else min(start, n)
    end = args.get("end")
    if call.op == "narrow":
        end = start + args["length"]
    elif end is None:
        end = n
    end = max(start, end + n if end < 0 else min(end, n))
    if not (old := dims[d]):
        return dims, (d, start, end, step)
    new = old.padded(-start, end - n)
    if step > 1:
        new = new.window(call.new[d], 1, step)
    return (*dims[:d], new, *dims[d + 1 :]), (d, start, n - end, step)


# Dimensions


def _along(call: Call) -> Result:
    """What reduces, splits, sorts or turns dimensions that are not spatial, and drops some."""
    dims, args = call.dims, call.args
    rank = len(dims)
    over = args.get("dim", args.get("dims"))
    if over is None or over == []:
        over = range(rank)
    along = {d % rank for d in ([over] if isinstance(over, int) else over)}
    if call.op == "squeeze":
        along = {d for d in along if call.old[d] == 1}
    gone = along if len(call.new) < rank else set()
    kept = tuple(a for d, a in enumerate(dims) if d not in gone)
    if any(dims[d] for d in along):
        reason = "takes the map apart" if call.op in _APART else "sees the whole map"
        if call.op in _TURNING:
            reason = "reads the map elsewhere"
        now = tuple(a and (a if a.size == n else None) for a, n in zip(kept, call.new, strict=True))
        raise LooksEverywhere(reason, now)
    return kept, scalars(call.node)


def _unsqueeze(call: Call) -> Result:
    d = call.args["dim"] % (len(call.dims) + 1)
    return (*call.dims[:d], None, *call.dims[d:]), (d,)


def _permute(call: Call) -> Result:
    rank = len(call.dims)
    order = list(range(rank))
    if call.op == "permute":
        order = [d % rank for d in call.args["dims"]]
    elif call.op == "movedim":
        goes, to = (_per_axis(call.args[end], 1) for end in ("source", "destination"))
        order = [d for d in order if d not in {g % rank for g in goes}]
        for place, g in sorted((t % rank, g % rank) for t, g in zip(to, goes, strict=True)):
            order.insert(place, g)
    else:
        i, j = (call.args.get(f"dim{k}", call.args.get(f"axis{k}")) for k in (0, 1))
        order[i], order[j] = order[j], order[i]  # type: ignore[index]
    return tuple(call.dims[d] for d in order), tuple(order)


def _reshape(call: Call) -> Result:
    dims = _regrouped(call.dims, call.old, call.new)
    if dims is None:
        raise LooksEverywhere("reshapes the map")
    return dims, ()


def _regrouped(dims: Dims, old: tuple[int, ...], new: tuple[int, ...]) -> Dims | None:
    """An axis may stay, absorb the dimensions after it, or split some off; None if it is more."""
    if 0 in old:
        return None
    result: list[Axis | None] = []
    for here, there in _groups(old, new):
        axes = [d for d in here if dims[d]]
        if not axes:
            result += [None] * len(there)
            continue
        # Ones move freely; where the axis is, one place of the new shape takes it.
        axis, size = dims[axes[0]], old[axes[0]]
        before = math.prod(old[d] for d in here if d < axes[0])
        inner = math.prod(old[d] for d in here) // (before * size)
        places = [d for d in there if new[d] != 1] or list(there)[:1]
        if axis is None or len(axes) > 1 or before > 1 or not places or (inner > 1 < len(places)):
            return None
        moved = axis
        if inner > 1:
            moved = axis.scatter(size * inner, inner, inner)
        elif len(places) > 1:
            part = size // new[places[0]]
            moved = axis.window(new[places[0]], part, part)
        result += [moved if d == places[0] else None for d in there]
    return tuple(result)


def _groups(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[range, range]]:
    """The smallest runs of dimensions of both shapes with equal products, in order."""
    cuts, i, j, p, q = [(0, 0)], 0, 0, 1, 1
    while i < len(old) or j < len(new):
        if (p <= q and i < len(old)) or j == len(new):
            p, i = p * old[i], i + 1
        else:
            q, j = q * new[j], j + 1
        if p == q and i > cuts[-1][0] and j > cuts[-1][1]:
            cuts.append((i, j))
            p = q = 1
    if cuts[-1] != (len(old), len(new)):  # ones at the end
        cuts[-1] = (len(old), len(new))
    return [(range(a, c), range(b, d)) for (a, b), (c, d) in pairwise(cuts)]


def _copy(call: Call) -> Result:
    return call.dims, scalars(call.node)


def _like(call: Call) -> Result:
    """Zeros or ones in the shape of the map: right everywhere, on a tile too."""
    clean = tuple(a and replace(a, bad_lo=0, bad_hi=0) for a in call.dims)
    return clean, scalars(call.node)


def _expand(call: Call) -> Result:
    dims = (None,) * (len(call.new) - len(call.dims)) + call.dims
    return _same_sizes(call, dims), ()


def _repeat(call: Call) -> Result:
    dims = (None,) * (len(call.new) - len(call.dims)) + call.dims
    return _same_sizes(call, dims), scalars(call.node)


def _same_sizes(call: Call, dims: Dims) -> Dims:
    if any(a and a.size != n for a, n in zip(dims, call.new, strict=True)):
        raise LooksEverywhere("repeats the map")
    return dims


def _index(call: Call) -> Result:
    """``x[:, [2, 1, 0]]``: a list of channels, always the same."""
    given = [d for d, i in enumerate(call.args["indices"]) if i is not None]
    one = len(given) == 1 and len(call.new) == len(call.dims)
    if not one or call.dims[given[0]]:
        raise LooksEverywhere("reads the map by index")
    return call.dims, tuple(given)


# Between channels


def _normalisation(call: Call) -> Result:
    """Fixed statistics, or statistics of what is not spatial."""
    args, dims = call.args, call.dims
    if call.op == "batch_norm":
        fixed = not args["training"] and dims[1] is None
    elif call.op == "instance_norm":
        fixed = not args["use_input_stats"] and dims[1] is None
    elif call.op == "group_norm":
        fixed = False
    else:  # layer_norm, rms_norm
        fixed = not any(dims[-len(args["normalized_shape"]) :])
    if not fixed:
        raise LooksEverywhere("normalises by statistics of the whole map")
    return dims, scalars(call.node)


def _random(call: Call) -> Result:
    if call.args.get("train") or call.args.get("training"):
        raise LooksEverywhere("draws at random")
    return join(call)


def _linear(call: Call) -> Result:
    other = shape(call.args.get("weight", call.args.get("other")))
    if call.dims[-1] or len(call.new) != len(call.dims) or math.prod(other[:-2]) != 1:
        raise LooksEverywhere("multiplies along space")
    return call.dims, ()


def _channelwise(call: Call) -> Result:
    if call.dims[1]:
        raise LooksEverywhere("treats a spatial axis as channels")
    return call.dims, scalars(call.node)


# Joins


def join(call: Call) -> Result:
    """Element by element; operands are aligned from the last dimension."""
    dims: list[Axis | None] = [None] * len(call.new)
    spatial = {d - len(call.dims_of[n]) for n in call.maps for d, a in _axes(call.dims_of[n])}
    for node in call.node.all_input_nodes:
        known = call.dims_of.get(node, (None,) * len(shape(node)))
        for d in range(-len(known), 0):
            axis, other = known[d], dims[d]
            if axis is None:
                if d in spatial and _varies(call, node, d):
                    raise LooksEverywhere("combines the map with what varies over space by itself")
            elif other is not None and axis.size != other.size and 1 in {axis.size, other.size}:
                raise LooksEverywhere("spreads one element over the map")
            else:
                dims[d] = call.meet(other, axis) if other else axis
    return tuple(dims), scalars(call.node)


def _cat(call: Call) -> Result:
    dims: list[Axis | None] = [None] * len(call.dims)
    spatial = {d for n in call.maps for d, _ in _axes(call.dims_of[n])}
    for node in call.args["tensors"]:
        known = call.dims_of.get(node, (None,) * len(dims))
        for d, axis in enumerate(known):
            if axis is None and d in spatial and _varies(call, node, d - len(dims)):
                raise LooksEverywhere("joins the map with what varies over space by itself")
            other = dims[d]
            dims[d] = call.meet(other, axis) if other and axis else other or axis
    d = call.args["dim"] % (len(dims) + (call.op == "stack"))
    if call.op == "stack":
        dims.insert(d, None)
    if dims[d]:
        raise LooksEverywhere("puts maps side by side")
    return tuple(dims), (d,)


def _crop_concat(call: Call) -> Result:
    """`segfuse.ops.crop_concat`: the skip cropped about its centre to the size of `up`."""
    return _joined(call, "skip", "up", 1)


def _upconv_concat(call: Call) -> Result:
    """`segfuse.ops.upconv_concat`: the same, with x up-convolved by a kernel as large as a step."""
    factor = shape(call.args["weight"])[-1]
    dims, crops = _joined(call, "skip", "x", factor)
    return dims, (factor, *crops)


def _joined(call: Call, large: str, small: str, factor: int) -> Result:
    """A map cropped about its centre to the size of another, which grows by a factor."""
    dims: list[Axis | None] = []
    crops: list[tuple[int, int]] = []
    skip, up = call.args[large], call.args[small]
    alone = {*call.maps} <= {skip, up}
    if not (alone and any(call.dims_of.get(skip, ())) and any(call.dims_of.get(up, ()))):
        raise LooksEverywhere("joins the map with what varies over space by itself")
    for a, x in zip(call.dims_of[skip], call.dims_of[up], strict=True):
        if a is None or x is None:
            dims.append(None)
            continue
        b = x.scatter(x.size * factor, factor, factor)
        before = (a.size - b.size) // 2
        after = a.size - b.size - before
        crops.append((before, after))
        dims.append(call.meet(a.padded(-before, -after), b))
    return tuple(dims), tuple(crops)


def _deconv_upsample(call: Call) -> Result:
    """`segfuse.ops.deconv_upsample`: a transposed convolution, cropped, and a skip added to it."""
    args = call.args
    x, skip, factor, kernel = (args[n] for n in ("x", "skip", "factor", "kernel_size"))
    if x not in call.maps or not {*call.maps} <= {x, skip}:
        raise LooksEverywhere("joins the map with what varies over space by itself")
    crops: list[tuple[int, int]] = []

    def upsample(d: int, a: Axis, n: int) -> Axis:
        full = (a.size - 1) * factor + kernel
        crops.append((args["offset"][d], full - args["offset"][d] - n))
        made = a.scatter(full, kernel, factor).padded(*(-c for c in crops[-1]))
        if skip is None:
            return made
        other = call.dims_of.get(skip, (None,) * len(call.new))[d]
        if other is None and _varies(call, skip, d):
            raise LooksEverywhere("combines the map with what varies over space by itself")
        return call.meet(made, other) if other else made

    dims = call.each(2, upsample)
    return dims, (factor, kernel, tuple(crops))


def _varies(call: Call, node: Node, d: int) -> bool:
    """Whether a tensor that is not made of the image may vary along dimension d, from -1 back."""
    size = shape(node)
    if len(size) < -d or size[d] == 1:
        return False
    if node in call.changed or node.op != "call_function":
        return True
    if name(node) in UNIFORM or RULES.get(name(node)) is _like:
        return False
    if RULES.get(name(node)) in {_expand, _copy, join} or is_pointwise(node):
        return any(_varies(call, n, d) for n in values(node))
    return True


def _axes(dims: Dims) -> list[tuple[int, Axis]]:
    return [(d, a) for d, a in enumerate(dims) if a]


# Reading a node


def name(node: Node) -> str:
    """Name of an operation: torch's own bare, others with their library's before it."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet is None:
        return str(getattr(node.target, "__name__", node.target))
    full: str = packet._qualified_op_name  # noqa: SLF001
    return full.removeprefix("aten::")


def arguments(node: Node) -> dict[str, Any]:
    """Arguments by name, with defaults."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {}
    args = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    args |= dict(zip((a.name for a in schema.arguments), node.args, strict=False))
    return args | node.kwargs


def values(node: Node) -> list[Node]:
    """The tensors whose values an operation takes; of others it takes the shape or the dtype."""
    inputs = node.all_input_nodes
    if name(node) in UNIFORM:
        return []
    return [n for n in inputs if n is node.args[0]] if name(node) in SHAPE_ONLY else inputs


def scalars(node: Node) -> tuple[str, ...]:
    """All arguments that are no tensors."""
    leaves = tree_leaves((node.args, dict(node.kwargs)))
    return tuple(str(v) for v in leaves if not isinstance(v, Node))


def shape(node: Node | None) -> tuple[int, ...]:
    """Shape of a tensor, of the first one if there are several."""
    value = node.meta.get("val") if node is not None else None
    value = value[0] if isinstance(value, (list, tuple)) and value else value
    return tuple(getattr(value, "shape", ()))


def is_pointwise(node: Node) -> bool:
    """Whether torch says that an operation works element by element."""
    tags = getattr(node.target, "tags", ())
    random = torch.Tag.nondeterministic_seeded in tags
    one = isinstance(node.meta.get("val"), torch.Tensor)
    return one and torch.Tag.pointwise in tags and not random


# The table of contents

_APART = {"chunk", "select", "split", "split_with_sizes", "squeeze", "unbind", "unsafe_split"}
_TURNING = {"flip", "roll", "index_select"}
_COPYING = ("alias", "contiguous", "detach", "lift_fresh_copy", "to", "_to_copy", "type_as")
_POINTWISE = ("hardswish", "log_sigmoid", "relu6", "selu")  # those that torch does not tag
_RANDOM = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "rrelu")
# Constants that are the same at every place.
UNIFORM = {"zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "scalar_tensor"}
SHAPE_ONLY = {"expand_as", "view_as", "reshape_as", "type_as", "to"}  # of a second tensor
POSITIONS_PASS = {"getitem", "squeeze", "unsqueeze", "detach", "to"}  # keep positions what they are
JOINING = (  # may take several maps
    *(join, _cat, _crop_concat, _deconv_upsample, _unpooling, _upconv_concat),
)

REASONS = {  # why an operation has no rule, where its name may not say
    **{
        f"adaptive_{kind}_pool{n}d": "pools to a size" for kind in ("avg", "max") for n in (1, 2, 3)
    },
    "scaled_dot_product_attention": "sees the whole map",
    "grid_sampler": "reads the map elsewhere",
}

RULES: dict[str, Callable[[Call], Result]] = {
    **{f"conv{n}d": _convolution for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _convolution for n in (1, 2, 3)},
    **{f"max_pool{n}d": _pooling for n in (1, 2, 3)},
    **{f"max_pool{n}d_with_indices": _pooling for n in (1, 2, 3)},
    **{f"avg_pool{n}d": _pooling for n in (1, 2, 3)},
    **{f"max_unpool{n}d": _unpooling for n in (2, 3)},
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle"), _pixel_shuffle),
    **{f"upsample_nearest{n}d": _interpolation for n in (1, 2, 3)},
    **{f"_upsample_nearest_exact{n}d": _interpolation for n in (1, 2, 3)},
    **dict.fromkeys(
        ("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d"),
        _interpolation,
    ),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    **dict.fromkeys(("slice", "narrow"), _slice),
    **dict.fromkeys((*_APART, *_TURNING), _along),
    **dict.fromkeys(("mean", "sum", "prod", "amax", "amin", "max", "min", "any", "all"), _along),
    **dict.fromkeys(("std", "var", "std_mean", "var_mean", "logsumexp", "norm"), _along),
    **dict.fromkeys(("linalg_vector_norm", "argmax", "argmin", "softmax", "log_softmax"), _along),
    **dict.fromkeys(("glu", "cumsum", "sort", "topk"), _along),
    "unsqueeze": _unsqueeze,
    **dict.fromkeys(("permute", "transpose", "movedim", "swapaxes"), _permute),
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "view_as"), _reshape),
    **dict.fromkeys(("reshape_as", "_unsafe_view"), _reshape),
    **dict.fromkeys(("zeros_like", "ones_like", "full_like"), _like),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    **dict.fromkeys(("repeat", "tile"), _repeat),
    "index": _index,
    **dict.fromkeys(("batch_norm", "instance_norm", "group_norm"), _normalisation),
    **dict.fromkeys(("layer_norm", "rms_norm"), _normalisation),
    **dict.fromkeys(("linear", "matmul"), _linear),
    **dict.fromkeys(("prelu", "channel_shuffle"), _channelwise),
    **dict.fromkeys(_COPYING, _copy),
    **dict.fromkeys(_POINTWISE, join),
    **dict.fromkeys(_RANDOM, _random),
    **dict.fromkeys(("cat", "concat", "concatenate", "stack"), _cat),
    "segfuse::crop_concat": _crop_concat,
    "segfuse::deconv_upsample": _deconv_upsample,
    "segfuse::upconv_concat": _upconv_concat,
}
