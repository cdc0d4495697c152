"""Where every output pixel of a network comes from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil, floor, lcm, prod
from typing import Any

import torch
from torch import Tensor, nn

from .axis import Axis
from .findings import Feature, Finding, GeometryError, Resize, Trace
from .glance import checked_shape, copied, glance, like, line, quiet, remembered
from .graph import walk

__all__ = ["Geometry", "check_same", "of", "scaled", "stated", "trace"]

_TRIALS = 5  # multiples of the stride, doubling, at which a network may pad itself to size


@dataclass(frozen=True, eq=False)
class Geometry:
    """Sizes, positions and dependences of all maps of a network, on an input of one size.

    Along each axis everything is exact: integers and fractions.  All of it holds for every input
    size congruent to `input_size` modulo `stride`.

    Attributes:
        shape: of the input, (N, C, *S).
        stride: an axis: the least step by which the input can shift, or shrink, so that every map
            shifts, or shrinks, by whole elements. Tiles must start on its multiples.
        features: all maps, the input first, in the order in which they are computed.
        outputs: those that the network returns.
        everywhere: layers that look at the whole image, or at where in it they are. If there are
            any, tiles cannot equal the whole image, and `margin` and `receptive_field` raise. What
            only outputs after the first need does not count.
        misaligned: layers that join maps whose elements lie at different places, with the distance
            in input pixels: at sizes that this network should not be given.
        peak: bytes of all maps that live at once, at most, with the input.
        parameters: numbers that the outputs are made with.
        multiply_adds: products that are added up for one image, in convolutions, transposed ones
            and matrix products; padding counts as if it were of the image.
        depth: convolutions on the longest way through the network, transposed ones not counted:
            the "conv. layers" of Long, Shelhamer, Darrell 2015.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    features: tuple[Feature, ...]
    outputs: tuple[Feature, ...]
    everywhere: tuple[Finding, ...] = ()
    misaligned: tuple[tuple[Finding, Fraction], ...] = ()
    peak: int = 0
    parameters: int = 0
    multiply_adds: int = 0
    depth: int = 0
    rules: tuple[tuple[Any, ...], ...] = ()
    sound: tuple[tuple[int, int, int], ...] = ()
    resizes: tuple[Resize, ...] = ()

    @property
    def input_size(self) -> tuple[int, ...]:
        """Pixels an axis."""
        return self.shape[2:]

    @property
    def output(self) -> tuple[Axis, ...]:
        """The axes of the first output."""
        return self.outputs[0].axes

    @property
    def output_size(self) -> tuple[int, ...]:
        """Elements an axis of the first output."""
        return tuple(axis.size for axis in self.output)

    @property
    def receptive_field(self) -> tuple[int, ...]:
        """Input pixels, an axis, that one output element may depend on, from first to last.

        Raises:
            GeometryError: there are layers that look everywhere.
        """
        self._check_local()
        return tuple(floor(axis.reach) for axis in self.output)

    @property
    def margin(self) -> tuple[tuple[int, int], ...]:
        """Input pixels, an axis and end, for which a tile that is cut there gives no sound output.

        They include those that unpadded convolutions eat: 92 for the published U-Net.

        Raises:
            GeometryError: there are layers that look everywhere.
        """
        self._check_local()
        return tuple(
            (
                max(0, ceil(axis.position(axis.bad_lo))),
                max(0, ceil(n - 1 - axis.position(axis.size - 1 - axis.bad_hi))),
            )
            for n, axis in zip(self.input_size, self.output, strict=True)
        )

    @property
    def phase(self) -> tuple[Fraction, ...]:
        """Input coordinate, an axis, on which output element 0 is centred."""
        return tuple(axis.shift for axis in self.output)

    def __getitem__(self, layer: str) -> Feature:
        """The last map that a layer, named as in ``named_modules()``, computes.

        Raises:
            KeyError: no layer of that name.
        """
        for feature in (*self.outputs, *reversed(self.features)):
            if feature.layer == layer:
                return feature
        raise KeyError(layer)

    def offset(self, larger: str, smaller: str) -> tuple[Fraction, ...]:
        """Elements, an axis, to crop from the start of one layer's map to align it with another's.

        ``offset("input", "score")`` is FCN's crop offset if the layer "score" has stride 1.

        Raises:
            KeyError: no layer of that name.
        """
        return tuple(
            a.offset(b) for a, b in zip(self[larger].axes, self[smaller].axes, strict=True)
        )

    def output_for(self, size: Sequence[int]) -> tuple[int, ...]:
        """Output size of an input size, congruent to `input_size` modulo `stride`.

        Raises:
            ValueError: it is not.
        """
        self._check_congruent(size)
        return tuple(
            int(a.size + (n - m) / a.scale)
            for a, n, m in zip(self.output, size, self.input_size, strict=True)
        )

    def input_for(self, size: Sequence[int]) -> tuple[int, ...]:
        """The least input size, congruent to `input_size`, whose output has at least this size."""
        found = []
        for n, a, base, step in zip(size, self.output, self.input_size, self.stride, strict=True):
            found.append(base + step * ceil((n - a.size) * a.scale / step))
        return tuple(found)

    def _check_local(self) -> None:
        if self.everywhere:
            looks = "; ".join(map(str, self.everywhere))
            raise GeometryError(f"these layers look everywhere: {looks}")

    def _check_congruent(self, size: Sequence[int]) -> None:
        for n, base, step in zip(size, self.input_size, self.stride, strict=True):
            if (n - base) % step:
                raise ValueError(
                    f"geometry: size: expected {base} plus or minus a multiple of {step}, got {n}"
                )

    def table(self, *, costs: bool = False) -> list[tuple[str, ...]]:
        """A row a map, the head first; maps that are like the one before them have none.

        Sizes are in elements of the map, strides and receptive fields in input pixels, one number
        where all axes agree.  The rim is how many elements at each end are not sound where a tile
        was cut, "4" or, if the ends differ, "4+5".

        Args:
            costs: give parameters and multiply-adds too, and a row to every map that has any.
        """
        head = ("layer", "operation", "channels", "size", "stride", "receptive field", "rim")
        rows: list[tuple[str, ...]] = [(*head, "parameters", "multiply-adds") if costs else head]
        before = None
        for f in self.features:
            spent = costs and (f.parameters or f.multiply_adds)
            if (f.shape, f.axes) == before and not spent:
                continue
            before = f.shape, f.axes
            usual = len(f.shape) == len(self.shape) and f.shape[2:] == tuple(a.size for a in f.axes)
            rims = [f"{a.bad_lo}+{a.bad_hi}" if a.bad_lo != a.bad_hi else a.bad_lo for a in f.axes]
            row = (
                f.layer,
                f.operation.rpartition("::")[2],
                str(f.shape[1]) if usual else "",
                _by(a.size for a in f.axes),
                _short(a.scale for a in f.axes),
                _short(floor(a.reach) for a in f.axes),
                _short(rims),
            )
            cost = (
                f"{f.parameters:,}" if f.parameters else "",
                scaled(f.multiply_adds) if f.multiply_adds else "",
            )
            rows.append((*row, *cost) if costs else row)
        return rows

    def __str__(self) -> str:
        rows = self.table()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines += ["", f"{_by(self.input_size)} pixels to {_by(self.output_size)}"]
        lines[-1] += f", stride {_short(self.stride)}"
        if self.everywhere:
            lines.append("tiles cannot equal the whole image, since these layers look everywhere:")
            lines += [f"  {finding}" for finding in self.everywhere]
        else:
            margin = _short(f"{a} and {b}" if a != b else str(a) for a, b in self.margin)
            lines.append(f"receptive field {_short(self.receptive_field)}, margin {margin} a side")
        for resize in self.resizes:
            lines.append(f"{resize.layer}: tiles must sample where the whole image does")
        lines += [f"misaligned by {by} pixels: {finding}" for finding, by in self.misaligned]
        return "\n".join(lines)


def of(
    model: nn.Module,
    shape: Sequence[int],
    *,
    margin: int | Sequence[int] | None = None,
    stride: int | Sequence[int] | None = None,
) -> Geometry:
    """Derive where every output pixel of a network comes from.

    The network is read through ``torch.export`` at two sizes, without computing anything, and
    each operation's rule applied to the axes.  It is looked at as in eval mode; its own mode is
    left as it is.  An operation that has no rule counts as one that looks everywhere.

    Args:
        model: maps images (N, C, *S), one to three spatial axes, to a tensor, or to a tuple, list
            or dict, of which the first tensor is the output.
        shape: (N, C, *S), a size at which the network runs; N is of no account.
        margin: instead of reading the network, take the user's word for it: input pixels a side
            (or one an axis) that an output pixel may depend on.
        stride: with `margin`: the step on which tiles must start; 1 if not given.

    Raises:
        GeometryError: the network does not run or cannot be exported at this size, its maps cannot
            be followed to an output, or it does other things at other sizes.
        ValueError: a shape without batch, channels or space; stride without margin.

    Limits:
        What depends on the values of the image cannot be seen, nor that images of a batch are
        mixed: the network is read with one image.  Networks with several inputs are not read.
    """
    shape = checked_shape(shape)
    if margin is not None:
        return stated(model, shape, margin, 1 if stride is None else stride)
    if stride is not None:
        raise ValueError("geometry.of: stride: expected a margin with it")
    found = trace(model, shape)
    if found.everywhere:
        return found
    problems: list[GeometryError] = []
    for double in range(_TRIALS):
        step = tuple(s * 2**double for s in found.stride)
        larger = (*shape[:2], *(n + s for n, s in zip(shape[2:], step, strict=True)))
        try:
            check_same(found, trace(model, larger))
        except GeometryError as error:
            problems.append(error)
        else:
            return replace(found, stride=step)
    raise problems[0]


def trace(model: nn.Module, shape: Sequence[int]) -> Geometry:
    """`of` at one size: enough for sizes, not for what a network does at others."""
    shape = (1, *checked_shape(shape)[1:])
    known = remembered(model)
    key = "trace", shape
    if key not in known:
        known[key] = _traced(model, shape)
    found: Geometry = known[key]
    return found


def _traced(model: nn.Module, shape: tuple[int, ...]) -> Geometry:
    found, seen = _walk(model, shape), glance(model, shape)
    # a network that runs, but not on shapes alone, is taken to keep all its maps
    peak = seen.peak if seen else sum(prod(f.shape) * f.dtype.itemsize for f in found.features)
    strides = []
    for k in range(len(shape) - 2):
        scales = [a.scale.numerator for f in found.features for a in f.axes if a.axis == k]
        strides.append(lcm(1, *scales))
    return Geometry(
        shape=shape,
        stride=tuple(strides),
        features=tuple(found.features),
        outputs=tuple(found.outputs),
        everywhere=tuple(found.everywhere),
        misaligned=tuple(found.misaligned),
        peak=peak,
        parameters=found.parameters,
        multiply_adds=found.multiply_adds,
        depth=found.depth,
        rules=tuple(found.rules),
        sound=tuple(found.sound),
        resizes=tuple(found.resizes),
    )


def _walk(model: nn.Module, shape: tuple[int, ...]) -> Trace:
    image, copy = like(model).expand(shape), copied(model)
    with quiet(), torch.no_grad():
        try:
            program = torch.export.export(copy, (image,), strict=False)
        except Exception as error:
            what = line(error)
            why = "its steps depend on the image's values: " if "data-dependent" in what else ""
            raise GeometryError(
                f"the network cannot be read at input {_by(shape[2:])}: {why}{what}"
            ) from error
    signature = program.graph_signature
    constants, parameters = {}, {}
    for spec in signature.input_specs:
        value = program.constants.get(spec.target or "")
        if isinstance(value, Tensor):
            constants[spec.arg.name] = _digest(value)
        elif spec.target in signature.parameters:
            held = program.state_dict[spec.target]
            parameters[spec.arg.name] = id(held), held.numel()
    outputs = tuple(map(str, signature.user_outputs))
    name = str(signature.user_inputs[0])
    return walk(program.graph_module, name, outputs, constants, parameters)


def check_same(a: Geometry, b: Geometry) -> None:
    """Check that a network does the same at two sizes, on maps that differ as the inputs do.

    Raises:
        GeometryError: it does not; the message names the first layer that differs.
    """
    sizes = f"at input {_by(a.input_size)} than at {_by(b.input_size)}"
    for one, other in zip(a.rules, b.rules, strict=False):
        if one != other:
            layer, operation = one[:2]
            raise GeometryError(f"{layer} ({operation}): does other things {sizes}")
    counts = [(len(g.rules), len(g.features), len(g.outputs)) for g in (a, b)]
    if counts[0] != counts[1]:
        raise GeometryError(f"the network has other operations {sizes}")
    pairs = zip((*a.features, *a.outputs), (*b.features, *b.outputs), strict=True)
    for feature, larger in pairs:
        for p, q in zip(feature.axes, larger.axes, strict=True):
            before, after = a.input_size[p.axis], b.input_size[p.axis]
            if (p.scale, p.shift, p.lo, p.hi) != (q.scale, q.shift, q.lo, q.hi):
                raise GeometryError(
                    f"{feature.layer} ({feature.operation}): reads other places {sizes}"
                )
            if (q.size - p.size) * p.scale != after - before:
                raise GeometryError(
                    f"{feature.layer} ({feature.operation}): its size does not grow with the "
                    f"image: {p.size} at input {before}, {q.size} at {after}"
                )


def stated(
    model: nn.Module,
    shape: Sequence[int],
    margin: int | Sequence[int],
    stride: int | Sequence[int] = 1,
) -> Geometry:
    """The geometry that the user's word gives; see `of`.

    Where shapes alone do not tell the size of the output, it is taken to be the input's.

    Raises:
        ValueError: numbers out of range, an output larger than the input.
    """
    shape = (1, *checked_shape(shape)[1:])
    rank = len(shape) - 2
    margins = _each("margin", margin, rank, 0)
    strides = _each("stride", stride, rank, 1)
    seen = glance(model, shape)
    out = seen.output[2:] if seen and 0 not in seen.output else shape[2:]
    axes, plain = [], []
    for k, (n, m, reach) in enumerate(zip(shape[2:], out, margins, strict=True)):
        if m > n:
            raise ValueError(f"geometry: margin: the output {out} is larger than the input {shape}")
        lost = (n - m) // 2
        reach_in = Fraction(reach)
        axes.append(
            Axis(
                k,
                m,
                shift=Fraction(lost),
                lo=lost - reach_in,
                hi=lost + reach_in,
                bad_lo=max(0, reach - lost),
                bad_hi=max(0, reach - (n - m - lost)),
            )
        )
        plain.append(Axis(k, n))
    dtype = like(model).dtype
    image = Feature("input", "input", shape, tuple(plain), dtype)
    output = Feature("output", "as stated", (1, 1, *out), tuple(axes), dtype)
    return Geometry(shape, strides, (image, output), (output,), peak=seen.peak if seen else 0)


def _each(name: str, value: int | Sequence[int], rank: int, least: int) -> tuple[int, ...]:
    values = (value,) * rank if isinstance(value, int) else tuple(value)
    if len(values) != rank or min(values) < least:
        raise ValueError(
            f"geometry: {name}: expected an integer >= {least}, or {rank} of them, got {value}"
        )
    return values


def scaled(count: int) -> str:
    """Three figures of a count, and its unit: "18.3 G"."""
    for exponent, unit in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if count >= 9.995 * 10 ** (exponent - 1):
            return f"{count / 10**exponent:#.3g} {unit}".replace(". ", " ")
    return str(count)


def _digest(value: Tensor) -> str:
    """Of shape, dtype and values; of shape and dtype where a network has no values."""
    if value.is_meta:
        return f"{tuple(value.shape)} {value.dtype}"
    flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    head = f"{tuple(value.shape)} {value.dtype}".encode()
    return hashlib.sha256(head + flat.numpy().tobytes()).hexdigest()


def _by(values: Iterable[object]) -> str:
    return " x ".join(map(str, values))


def _short(values: Iterable[object]) -> str:
    """One value where all axes agree, else one an axis."""
    texts = [str(value) for value in values]
    return texts[0] if len(set(texts)) == 1 else " x ".join(texts)
