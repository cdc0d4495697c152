"""Deform images and their labels by a coarse grid of displacements and an affine map."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol, TypeAlias, cast, overload

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn.functional import grid_sample, interpolate

from ..registry import (
    Benchmark,
    Kernel,
    Make,
    OpSpec,
    Sample,
    defined_by,
    register,
    runs_reference,
)
from ._borders import BORDERS, INTEGERS, Border, check_border, check_fill, source
from ._checks import as_integer, check_apart, check_out, check_tensor, wrong
from ._tiles import wide

Fill: TypeAlias = float | tuple[float, float]
Out: TypeAlias = Tensor | tuple[Tensor, Tensor]

FAR = 2.0**30  # positions beyond count as there
LONGEST_AXIS = 2**24  # which float32 counts


def _cubic(f: Tensor) -> tuple[Tensor, ...]:
    """Weights of four neighbours, for a place that lies ``f`` behind the second of them."""
    g = 1 - f
    return (
        -0.75 * f * (g * g),
        (1.25 * f - 2.25) * (f * f) + 1,
        (1.25 * g - 2.25) * (g * g) + 1,
        -0.75 * g * (f * f),
    )


def _along(values: Tensor, axis: int, pixels: int) -> Tensor:
    """Values at control points along an axis, interpolated to pixels, as F.interpolate does it.

    To the bit as the kernel does it, so that of two labels almost equally near both take the same.
    """
    points = values.shape[axis]
    place = torch.arange(pixels, dtype=values.dtype, device=values.device)
    place = place * ((points - 1) / (pixels - 1) if pixels > 1 else 0.0)
    below = place.floor()
    shape = [-1 if a == axis else 1 for a in range(values.dim())]
    total = torch.zeros((), dtype=values.dtype, device=values.device)
    for k, weight in enumerate(_cubic(place - below)):
        index = (below.long() - 1 + k).clamp(0, points - 1)
        total = total + weight.view(shape) * values.index_select(axis, index)
    return total


def _positions(image: Tensor, grid: Tensor, affine: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where each pixel of the result lies in the image: rows and columns, ``(N, H, W)``."""
    height, width = image.shape[2:]
    dtype = wide(image.dtype)
    field = _along(_along(grid.to(dtype), 2, height), 3, width)
    centre_y, centre_x = (height - 1) / 2, (width - 1) / 2
    y = torch.arange(height, dtype=dtype, device=image.device)[:, None]
    x = torch.arange(width, dtype=dtype, device=image.device)
    if affine is None:
        return y + field[:, 0], x + field[:, 1]
    m = affine.to(dtype)[..., None, None]
    y, x = y - centre_y, x - centre_x
    at_y = ((m[:, 0, 0] * y + m[:, 0, 1] * x) + (m[:, 0, 2] + centre_y)) + field[:, 0]
    at_x = ((m[:, 1, 0] * y + m[:, 1, 1] * x) + (m[:, 1, 2] + centre_x)) + field[:, 1]
    return at_y, at_x


def _bounded(position: Tensor) -> Tensor:
    return position.nan_to_num(nan=-FAR, posinf=FAR, neginf=-FAR).clamp(-FAR, FAR)


def _sampled(image: Tensor, at_y: Tensor, at_x: Tensor, border: str, fill: float) -> Tensor:
    """The image at positions, bicubic, in the dtype of the arithmetic."""
    images, channels, height, width = image.shape
    values = image.to(wide(image.dtype)).flatten(2)
    below, weights = [], []
    for at in (at_y, at_x):
        bounded = _bounded(at)
        floor = bounded.detach().floor()
        below.append(floor.long())
        weights.append(_cubic((bounded - floor) + (at - at)))
    result = torch.zeros((), dtype=values.dtype, device=image.device)
    some = torch.zeros((), dtype=torch.bool, device=image.device)
    for k in range(4):
        column = below[1] - 1 + k
        total = torch.zeros_like(result)
        for j in range(4):
            row = below[0] - 1 + j
            index = source(row, height, border) * width + source(column, width, border)
            index = index.flatten(1)[:, None].expand(images, channels, height * width)
            tap = values.gather(2, index).view(images, channels, height, width)
            if border == "constant":
                inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
                some = some | inside
                tap = torch.where(inside[:, None], tap, fill)
            total = total + weights[0][j][:, None] * tap
        result = result + weights[1][k][:, None] * total
    if border == "constant":
        result = torch.where(some[:, None], result, fill)
    return result


def _nearest(labels: Tensor, at_y: Tensor, at_x: Tensor, border: str, fill: float) -> Tensor:
    height, width = labels.shape[1:]
    y, x = (_bounded(at).round().long() for at in (at_y, at_x))
    image = torch.arange(labels.shape[0], device=labels.device)[:, None, None]
    result = labels[image, source(y, height, border), source(x, width, border)]
    if border == "constant":
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        result = torch.where(inside, result, torch.full_like(result, fill))
    return result


def _both(fill: Fill) -> tuple[float, float]:
    """What lies beyond the border of the image, and of the labels."""
    return (fill[0], fill[1]) if isinstance(fill, tuple) else (fill, fill)


def _reference(
    image: Tensor,
    grid: Tensor,
    *,
    affine: Tensor | None = None,
    labels: Tensor | None = None,
    border: Border = "mirror",
    fill: Fill = 0,
    out: Out | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    of_image, of_labels = _both(fill)
    results = [image]
    if labels is not None:
        results.append(labels)
    if image.shape[0] > 0 and 0 not in image.shape[2:]:
        at_y, at_x = _positions(image, grid, affine)
        results[0] = _sampled(image, at_y, at_x, border, of_image).to(image.dtype)
        if labels is not None:
            results[1] = _nearest(labels, at_y, at_x, border, of_labels)
    if out is not None:
        outs = (out,) if isinstance(out, Tensor) else out
        for to, result in zip(outs, results, strict=True):
            to.copy_(result)
        return out
    results = [t.clone(memory_format=torch.contiguous_format) for t in results]
    return results[0] if labels is None else (results[0], results[1])


class _ElasticDeform(Protocol):
    """The operator's type: with labels it returns two tensors."""

    __name__: str
    reference: Any

    @overload
    def __call__(
        self,
        image: Tensor,
        grid: Tensor,
        *,
        affine: Tensor | None = None,
        labels: None = None,
        border: Border = "mirror",
        fill: Fill = 0,
        out: Tensor | None = None,
    ) -> Tensor: ...
    @overload
    def __call__(
        self,
        image: Tensor,
        grid: Tensor,
        *,
        affine: Tensor | None = None,
        labels: Tensor,
        border: Border = "mirror",
        fill: Fill = 0,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]: ...


def _typed(function: object) -> _ElasticDeform:
    return cast("_ElasticDeform", function)


@_typed
@defined_by(_reference)
def elastic_deform(
    image: Tensor,
    grid: Tensor,
    *,
    affine: Tensor | None = None,
    labels: Tensor | None = None,
    border: Border = "mirror",
    fill: Fill = 0,
    out: Out | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Deform images, and their labels, smoothly and by an affine map, in one pass.

    The augmentation of Ronneberger, Fischer, Brox 2015, section 3.1: a coarse grid of random
    displacements, interpolated to every pixel.  :func:`segfuse.ops.random_deformation` draws one.
    Pixel ``p`` of the result, a pair of row and column, shows the image at

        ``s(p) = M (p - c) + shift + c + d(p),   c = ((H - 1) / 2, (W - 1) / 2)``

    where ``d`` is ``F.interpolate(grid, (H, W), mode="bicubic", align_corners=True)``, which is
    stored nowhere.  The image is interpolated as ``F.grid_sample`` with ``mode="bicubic"`` and
    ``align_corners=True`` does it (and, for "mirror", with ``padding_mode="reflection"``): by
    cubic convolution with a = -3/4, which overshoots at edges.  Each of the 4 x 4 pixels that are
    weighed may lie beyond the border.

    Args:
        image: ``(N, C, H, W)``, floating, of any strides, but fastest where the last axis is dense.
        grid: ``(N, 2, gh, gw)``, displacements in pixels, rows' before columns', at control points
            of which the outermost lie on the centres of the outermost pixels; at least one along
            each axis.  Of the image's dtype or float32.
        affine: ``(N, 2, 3)``: row by row ``M`` and ``shift``, in the order row, column; shift in
            pixels.  Of the image's dtype or float32.  None: the identity.
        labels: ``(N, H, W)`` of any integer dtype or bool.  Each pixel takes the label nearest to
            ``s(p)``; half-way between two, the even row or column.
        border: what lies beyond the image, as in :func:`segfuse.ops.gather_tiles`.
        fill: what "constant" puts there; a pair is the image's and the labels'.  The labels' is an
            integer that they and float64 hold.
        out: where to write the result, of exactly its shape, dtype and device; with labels a pair.
            Any strides, but its span of memory must not meet that of an input.  No gradients then.

    Returns:
        The shape and dtype of ``image``, contiguous; with labels a pair, the second like them.
        Positions, weights and sums are in float32 (float64 for float64), rounded at the end.

    Raises:
        ValueError: shapes, devices, options that do not fit, axes of more than 2^24 pixels, or an
            ``out`` that cannot be written to.
        TypeError: dtypes other than those above.

    Limits: two spatial axes.  A position in float32 is off by up to 6e-5 pixels where it is about
    1000.  One beyond 2^30 pixels counts as there.  Where it is infinite or NaN the image's result
    is NaN, or ``fill``, and the label is that of -2^30 or 2^30.  Gradients flow to image, grid and
    affine, the same bits every run.  Those of grid and affine store the dense field's gradient.
    That of the image stores the positions, and each of its rows goes through every pixel of the
    result near those that have read it, so that it takes many times the forward pass: augmentation
    needs none.  Within ``torch.func`` and forward-mode differentiation the reference runs.
    """
    op = "elastic_deform"
    check_tensor(op, "image", image, floating=True)
    if image.dim() != 4:  # noqa: PLR2004
        raise wrong(op, "image", "(N, C, H, W)", tuple(image.shape))
    if max(image.shape[2:]) > LONGEST_AXIS:
        raise wrong(op, "image", "axes of at most 2^24 pixels", tuple(image.shape))
    _check_companion(image, "grid", grid)
    if affine is not None:
        _check_companion(image, "affine", affine)
    _check_field(image.shape[0], grid, affine)
    if labels is not None:
        _check_labels(image, labels)
    check_border(op, border)
    of_image, of_labels = _checked_fill(fill, image, labels)
    if out is not None:
        _check_outs(out, image, grid, affine, labels)
    if runs_reference(op, image):
        return _reference(
            image, grid, affine=affine, labels=labels, border=border, fill=fill, out=out
        )
    check_apart(op, out, grid=grid, affine=affine)  # of which the kernel sees copies
    # Small, so that a copy costs little; and so each gradient has its own dtype.
    grid = grid.to(wide(image.dtype)).contiguous()
    affine = None if affine is None else affine.to(wide(image.dtype)).contiguous()
    options: tuple[float, ...] = (BORDERS.index(border), of_image)
    kernels = torch.ops.segfuse
    result: Tensor | tuple[Tensor, Tensor]
    if labels is None:
        if out is None:
            result = kernels.elastic_deform(image, grid, affine, *options)
            return result
        kernels.elastic_deform_out(image, grid, affine, *options, out)
    else:
        options = (*options, of_labels)
        if out is None:
            result = kernels.elastic_deform_labels(image, grid, affine, labels, *options)
            return result
        kernels.elastic_deform_labels_out(image, grid, affine, labels, *options, *out)
    increment_version(out)
    return out


def _check_field(n: int, grid: Tensor, affine: Tensor | None) -> None:
    op, shape = "elastic_deform", tuple(grid.shape)
    if grid.dim() != 4 or shape[:2] != (n, 2) or 0 in shape[2:] or max(shape) > LONGEST_AXIS:  # noqa: PLR2004
        raise wrong(op, "grid", f"({n}, 2, gh, gw) with 1 to 2^24 control points an axis", shape)
    if affine is not None and tuple(affine.shape) != (n, 2, 3):
        raise wrong(op, "affine", f"shape {(n, 2, 3)}", tuple(affine.shape))


def _check_companion(image: Tensor, name: str, tensor: Tensor) -> None:
    op = "elastic_deform"
    check_tensor(op, name, tensor)
    if tensor.dtype not in (image.dtype, torch.float32):
        expected = f"image's dtype {image.dtype} or torch.float32"
        raise TypeError(f"{op}: {name}: expected {expected}, got {tensor.dtype}")
    if tensor.device != image.device:
        raise wrong(op, name, f"image's device {image.device}", tensor.device)


def _check_labels(image: Tensor, labels: Tensor) -> None:
    op = "elastic_deform"
    check_tensor(op, "labels", labels)
    if labels.dtype not in INTEGERS:
        raise TypeError(f"{op}: labels: expected an integer dtype or bool, got {labels.dtype}")
    if labels.device != image.device:
        raise wrong(op, "labels", f"image's device {image.device}", labels.device)
    shape = (image.shape[0], *image.shape[2:])
    if tuple(labels.shape) != shape:
        raise wrong(op, "labels", f"shape {shape}", tuple(labels.shape))


def _checked_fill(fill: Fill, image: Tensor, labels: Tensor | None) -> tuple[float, float]:
    op = "elastic_deform"
    if isinstance(fill, tuple) and (labels is None or len(fill) != 2):  # noqa: PLR2004
        raise wrong(op, "fill", "a number, or with labels a pair", fill)
    of_image, of_labels = _both(fill)
    check_fill(op, of_image, image.dtype)
    if labels is not None:
        check_fill(op, of_labels, labels.dtype)
    return float(of_image), float(of_labels)


def _check_outs(
    out: Out, image: Tensor, grid: Tensor, affine: Tensor | None, labels: Tensor | None
) -> None:
    op, inputs = "elastic_deform", {"image": image, "grid": grid}
    if affine is not None:
        inputs["affine"] = affine
    if labels is None:
        check_out(op, cast("Tensor", out), image.shape, image, **inputs)
        return
    if not isinstance(out, (tuple, list)) or len(out) != 2:  # noqa: PLR2004
        got = f"{len(out)} of them" if isinstance(out, (tuple, list)) else type(out).__name__
        raise wrong(op, "out", "with labels a pair of tensors", got)
    check_out(op, out[0], image.shape, image, **inputs)
    check_out(op, out[1], labels.shape, labels)


def _fake(image: Tensor, *_: Any) -> Tensor:
    return image.new_empty(image.shape)


def _fake_labels(
    image: Tensor,
    grid: Tensor,  # noqa: ARG001
    affine: Tensor | None,  # noqa: ARG001
    labels: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    return image.new_empty(image.shape), labels.new_empty(labels.shape)


def _fake_out(*_: Any) -> None:
    pass


def _fake_backward_field(
    grad: Tensor,  # noqa: ARG001
    image: Tensor,  # noqa: ARG001
    grid: Tensor,
    affine: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    images = 0 if affine is None else grid.shape[0]
    return grid.new_empty(grid.shape), grid.new_empty((images, 2, 3))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    image, grid, affine, ctx.border, ctx.fill = inputs
    ctx.save_for_backward(image, grid, affine)


def _setup_context_labels(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    image, grid, affine, _, border, fill, _ = inputs
    _setup_context(ctx, (image, grid, affine, border, fill), output)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of image, grid and affine, as far as they are asked for."""
    image, grid, affine = ctx.saved_tensors
    grad = grad.to(image.dtype)
    kernels = torch.ops.segfuse
    of_image = of_grid = of_affine = None
    if ctx.needs_input_grad[0]:
        of_image = kernels.elastic_deform_backward_image(grad, grid, affine, ctx.border)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        of_grid, of_affine = kernels.elastic_deform_backward_field(
            grad, image, grid, affine, ctx.border, ctx.fill
        )
    return of_image, of_grid, None if affine is None else of_affine


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_gradients(ctx, grad), None, None)


def _backward_labels(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return (*_gradients(ctx, grad), None, None, None, None)


def _setup_context_of_image(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    grad, grid, affine, ctx.border = inputs
    ctx.save_for_backward(grad, grid, affine)


def _backward_of_image(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
    """Of grad, which is deformed back: v deformed; of the field, as if v were the image."""
    grad, grid, affine = ctx.saved_tensors
    kernels, v = torch.ops.segfuse, v.to(grad.dtype)
    of_grad = of_grid = of_affine = None
    if ctx.needs_input_grad[0]:
        of_grad = kernels.elastic_deform(v, grid, affine, ctx.border, 0.0)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        of_grid, of_affine = kernels.elastic_deform_backward_field(
            grad, v, grid, affine, ctx.border, 0.0
        )
    return of_grad, of_grid, None if affine is None else of_affine, None


def _setup_context_of_field(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    grad, image, grid, affine, ctx.border, ctx.fill = inputs
    ctx.save_for_backward(grad, image, grid, affine)


def _backward_of_field(ctx: Any, of_grid: Tensor, of_affine: Tensor) -> tuple[Tensor | None, ...]:
    """Through the reference: second derivatives are rare."""
    inputs = [t.detach().requires_grad_() for t in ctx.saved_tensors if t is not None]
    grad, image, grid = inputs[:3]
    with torch.enable_grad():
        at_y, at_x = _positions(image, grid, inputs[3] if len(inputs) > 3 else None)  # noqa: PLR2004
        result = _sampled(image, at_y, at_x, BORDERS[ctx.border], ctx.fill)
        moved = inputs[2:]
        first = torch.autograd.grad(result, moved, grad.to(result.dtype), create_graph=True)
        upstream = (of_grid, of_affine)[: len(moved)]
        second = torch.autograd.grad(first, inputs, upstream, materialize_grads=True)
    return (*second, *[None] * (6 - len(second)))


def random_deformation(
    n: int,
    *,
    points: int | tuple[int, int] = 3,
    std: float = 10.0,
    rotation: float = 0.0,
    scale: tuple[float, float] = (1.0, 1.0),
    shift: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw deformations for :func:`segfuse.ops.elastic_deform`, one an image.

    ``grid, affine = random_deformation(n)``, then ``elastic_deform(image, grid, affine=affine)``.
    The defaults are those of Ronneberger, Fischer, Brox 2015, section 3.1:
    displacements of a 3 x 3 grid, normally distributed with a standard deviation of 10 pixels.

    Args:
        n: how many, one an image.
        points: control points along each axis, or a pair: down, across.
        std: standard deviation of the displacements, in pixels.
        rotation: the largest angle, in degrees, to either side; angles are uniform.
        scale: the least and the greatest factor by which what the image shows becomes larger;
            their logarithms are uniform.
        shift: the largest shift along each axis, in pixels, to either side; uniform.
        generator: draws the numbers; the result lies on its device.  None: PyTorch's own, on the
            CPU.  How many numbers are drawn depends on ``n`` and ``points`` alone.

    Returns:
        ``grid (n, 2, points, points)`` and ``affine (n, 2, 3)``, float32.

    Raises:
        ValueError: numbers out of range.
        TypeError: arguments of another type.
    """
    op = "random_deformation"
    n = as_integer(op, "n", n)
    if n < 0:
        raise wrong(op, "n", "a number from 0 on", n)
    pair = points if isinstance(points, (tuple, list)) else (points, points)
    down_across = [as_integer(op, "points", p) for p in pair]
    if len(down_across) != 2 or min(down_across) < 1:  # noqa: PLR2004
        raise wrong(op, "points", "a number from 1 on, or two", points)
    for name, value in (("std", std), ("rotation", rotation), ("shift", shift)):
        if not 0 <= _number(op, name, value) < math.inf:
            raise wrong(op, name, "a finite number from 0 on", value)
    if not isinstance(scale, (tuple, list)) or len(scale) != 2:  # noqa: PLR2004
        raise wrong(op, "scale", "the least and the greatest factor", scale)
    least, greatest = (_number(op, "scale", value) for value in scale)
    if not 0 < least <= greatest < math.inf:
        raise wrong(op, "scale", "0 < least <= greatest", scale)
    if generator is not None and not isinstance(generator, torch.Generator):
        got = type(generator).__name__
        raise TypeError(f"{op}: generator: expected a torch.Generator or None, got {got}")
    device = torch.device("cpu") if generator is None else generator.device

    grid = torch.randn((n, 2, *down_across), generator=generator, device=device) * std
    drawn = torch.rand((4, n), generator=generator, device=device, dtype=torch.float64)
    angle = (2 * drawn[0] - 1) * math.radians(rotation)
    factor = (math.log(least) + drawn[1] * (math.log(greatest) - math.log(least))).exp()
    cos, sin = angle.cos() / factor, angle.sin() / factor
    by_y, by_x = (2 * drawn[2:] - 1) * shift
    affine = torch.stack([cos, -sin, by_y, sin, cos, by_x], dim=-1).view(n, 2, 3)
    return grid.float(), affine.float()


def _number(op: str, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name}: expected a number, got {value!r}")
    return float(value)


def _turn(make: Make, n: int, degrees: float, factor: float, *shift: float) -> Tensor:
    """An affine map, one an image, of float32 or float64."""
    cos = math.cos(math.radians(degrees)) / factor
    sin = math.sin(math.radians(degrees)) / factor
    rows = [[cos, -sin, shift[0]], [sin, cos, shift[1]]]
    like = make(0)
    return torch.tensor([rows] * n, dtype=wide(like.dtype), device=like.device)


def _samples(make: Make) -> Iterator[Sample]:
    def case(
        name: str,
        image: Tensor,
        grid: Tensor,
        *,
        by: float = 1,
        smooth: bool = True,
        **options: Any,
    ) -> Sample:
        smooth = smooth and "labels" not in options and image.numel() > 0
        return Sample((image, grid * by), options, name, differentiable=smooth)

    def labels(*size: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        return (make(*size).float().abs() * 50).to(torch.int64).to(dtype)

    yield case("mirror", make(2, 2, 7, 9), make(2, 2, 3, 3))
    yield case("labels", make(1, 1, 9, 8), make(1, 2, 3, 3), labels=labels(1, 9, 8))
    turned = _turn(make, 2, 20, 1.3, 0.7, -1.6)
    yield case("affine", make(2, 1, 8, 7), make(2, 2, 2, 2), affine=turned)
    yield case("constant", make(1, 2, 6, 9), make(1, 2, 4, 7), by=3, border="constant", fill=2)
    yield case("symmetric", make(1, 2, 5, 6), make(1, 2, 2, 2), by=4, border="symmetric")
    yield case("edge", make(1, 1, 5, 6), make(1, 2, 3, 1), by=4, border="edge")
    yield case("wrap", make(1, 1, 5, 6), make(1, 2, 1, 3), by=4, border="wrap")
    for border in BORDERS:
        options: dict[str, Any] = {"border": border, "fill": 1}
        # Their gradients would be 0, but for rounding.
        flat = {**options, "smooth": False}
        far = flat if border == "edge" else options
        yield case(f"far, {border}", make(1, 1, 3, 5), make(1, 2, 3, 3), by=40, **far)
        yield case(f"one pixel, {border}", make(1, 2, 1, 1), make(1, 2, 2, 2), by=2, **flat)
    quarter = _turn(make, 1, 90, 1, 0, 0)
    yield case("a line", make(1, 1, 1, 13), make(1, 2, 3, 3), by=2)
    yield case("a column", make(2, 1, 6, 1), make(2, 2, 3, 3), by=2, border="symmetric")
    for dtype in (torch.int16, torch.uint32, torch.int64, torch.bool):
        ids = labels(1, 11, 14, dtype=dtype)
        options = {"border": "constant", "fill": (0.5, 1), "labels": ids}
        yield case(f"{dtype}", make(1, 1, 11, 14), make(1, 2, 3, 3), by=3, **options)
    half = torch.tensor([[[1, 0, 0.5], [0, 1, -1.5]]], device=make(0).device)
    still = torch.zeros_like(make(1, 2, 3, 3))
    ids = labels(1, 6, 7)
    yield case("half a pixel", make(1, 1, 6, 7), still, affine=half, labels=ids)
    # On the pixels there is no second derivative.
    yield case("a quarter turn", make(1, 3, 8, 8), still, affine=quarter, smooth=False)
    yield case("dense control points", make(1, 2, 5, 9), make(1, 2, 31, 40))
    many = make(1, 2, 2, 700)
    yield case("very dense control points", make(1, 1, 3, 5), many)
    yield case("more than a thread's share", make(1, 1, 70, 190), make(1, 2, 3, 5), by=8)
    yield case("a long row", make(1, 1, 3, 600), make(1, 2, 2, 90), by=2, labels=labels(1, 3, 600))
    yield case("no images", make(0, 2, 5, 6), make(0, 2, 3, 3))
    yield case("no channels", make(1, 0, 5, 6), make(1, 2, 3, 3), labels=labels(1, 5, 6))
    yield case("no pixels", make(2, 1, 0, 6), make(2, 2, 3, 3), labels=labels(2, 0, 6))


def _failures(make: Make) -> Iterator[tuple[Sample, type[Exception], str]]:
    image, grid, labels = make(2, 3, 6, 7), make(2, 2, 3, 3), make(2, 6, 7).to(torch.uint8)
    affine = make(2, 2, 3)

    def call(*args: Any, **kwargs: Any) -> Sample:
        return Sample(args, kwargs)

    def on(**kwargs: Any) -> Sample:
        return Sample((image, grid), kwargs)

    yield call([1], grid), TypeError, "image: expected a torch.Tensor, got list"
    yield call(image.int(), grid), TypeError, "image: expected float64, float32, float16 or bfloat1"
    yield call(image[0], grid), ValueError, "image: expected (N, C, H, W), got (3, 6, 7)"
    vast = make(1, 1, 1, 1).expand(1, 1, 1, 2**24 + 1)
    yield call(vast, grid[:1]), ValueError, "image: expected axes of at most 2^24 pixels"
    yield call(image, grid[0]), ValueError, "grid: expected (2, 2, gh, gw) with 1 to 2^24"
    yield call(image, grid[:1]), ValueError, "grid: expected (2, 2, gh, gw) with 1 to 2^24"
    yield call(image, grid[..., :0]), ValueError, "grid: expected (2, 2, gh, gw) with 1 to 2^24"
    yield call(image, grid.double()), TypeError, "grid: expected image's dtype torch.float32 or tor"
    yield call(image, grid.to("meta")), ValueError, "grid: expected image's device"
    yield on(affine=[1]), TypeError, "affine: expected a torch.Tensor, got list"
    yield on(affine=affine[:, :1]), ValueError, "affine: expected shape (2, 2, 3), got (2, 1, 3)"
    yield on(affine=affine.half()), TypeError, "affine: expected image's dtype torch.float32 or tor"
    yield on(affine=affine.to("meta")), ValueError, "affine: expected image's device"
    yield on(labels=make(2, 6, 7)), TypeError, "labels: expected an integer dtype or bool, got torc"
    yield on(labels=labels[:, :5]), ValueError, "labels: expected shape (2, 6, 7), got (2, 5, 7)"
    yield on(labels=labels.to("meta")), ValueError, "labels: expected image's device"
    yield on(border="reflect"), ValueError, "border: expected one of mirror, symmetric, edge, wrap"
    yield on(fill="a"), TypeError, "fill: expected a number, got 'a'"
    yield on(fill=(0, 1)), ValueError, "fill: expected a number, or with labels a pair, got (0, 1)"
    yield on(labels=labels, fill=0.5), ValueError, "fill: expected an integer that torch.uint8 and"
    yield on(labels=labels, fill=(0, 256)), ValueError, "fill: expected an integer that torch.uint8"
    yield on(out=make(2, 3, 6, 8)), ValueError, "out: expected shape (2, 3, 6, 7), got (2, 3, 6, 8)"
    yield on(out=make(2, 3, 6, 7).double()), TypeError, "out: expected dtype torch.float32, got"
    yield on(out=make(1, 3, 6, 7).expand(2, 3, 6, 7)), ValueError, "out: expected distinct elements"
    yield on(out=image), ValueError, "out: expected memory apart from image's, got shared memory"
    buffer = make(504)
    columns = buffer[:72].view(2, 2, 3, 6)[..., ::2]  # of which the kernel sees a copy
    shared = call(image, columns, out=buffer[:252].view(2, 3, 6, 7))
    yield shared, ValueError, "out: expected memory apart from grid's, got shared memory"
    yield on(labels=labels, out=make(2, 3, 6, 7)), ValueError, "out: expected with labels a pair of"
    asking = call(image, grid.detach().requires_grad_(), out=make(2, 3, 6, 7))
    yield asking, ValueError, "grid: expected no gradient asked for"


def _benchmarks(make: Make) -> Iterator[Benchmark]:
    side, points = 1024, 3
    # Smooth, since float32 positions of about 1000 err by 6e-5 pixels, in both.
    image = interpolate(make(1, 1, 16, 16).float(), (side, side), mode="bicubic").to(make(0).dtype)
    labels = (image[:, 0].float() > 0).to(torch.uint8)
    grid = make(1, 2, points, points).float() * 10
    result = (torch.empty_like(image), torch.empty_like(labels))

    def sampled() -> Tensor:
        """By torch: the dense field, positions from -1 to 1, and two samplings."""
        field = interpolate(grid, (side, side), mode="bicubic", align_corners=True)
        pixel = torch.arange(side, dtype=grid.dtype, device=grid.device)
        place = torch.stack([pixel + field[:, 1], pixel[:, None] + field[:, 0]], dim=-1)
        place = place * (2 / (side - 1)) - 1
        ids = labels[:, None].float()
        grid_sample(ids, place, "nearest", "reflection", align_corners=True).to(labels.dtype)
        place = place.to(image.dtype)
        return grid_sample(image, place, "bicubic", "reflection", align_corners=True)

    if image.dtype not in (torch.float32, torch.float64):
        return  # torch's positions would be of half precision
    name = f"{side}^2 and labels, {points} x {points} points"
    yield Benchmark(
        f"{name}, out=",
        ours=lambda: elastic_deform(image, grid, labels=labels, out=result)[0],
        peer=sampled,
        bytes_moved=None,
    )
    yield Benchmark(
        f"{name}, fresh",
        ours=lambda: elastic_deform(image, grid, labels=labels)[0],
        peer=sampled,
        bytes_moved=None,
    )


register(
    OpSpec(
        function=elastic_deform,
        kernels=(
            Kernel("elastic_deform", _fake, _backward, _setup_context),
            Kernel("elastic_deform_labels", _fake_labels, _backward_labels, _setup_context_labels),
            Kernel("elastic_deform_out", _fake_out),
            Kernel("elastic_deform_labels_out", _fake_out),
            Kernel(
                "elastic_deform_backward_image",
                _fake,
                _backward_of_image,
                _setup_context_of_image,
            ),
            Kernel(
                "elastic_deform_backward_field",
                _fake_backward_field,
                _backward_of_field,
                _setup_context_of_field,
            ),
        ),
        samples=_samples,
        failures=_failures,
        benchmarks=_benchmarks,
        takes_out=True,
    )
)
