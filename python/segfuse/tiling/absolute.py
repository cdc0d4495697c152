"""Interpolation that samples a tile where it would have sampled the whole image.

With ``align_corners=True``, or to a given size that is no multiple, the step from one sample to the
next depends on the size of the whole map; and torch computes positions in float32, so that by
factors other than powers of two they drift along a map, and a tile's drift is another.  Here the
positions are those of the whole map, by torch's own arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .plan import Resizes

__all__ = ["AbsolutePositions", "resampled"]

_CUBIC = -0.75  # torch's and OpenCV's coefficient


class AbsolutePositions(TorchDispatchMode):
    """While active, the network's interpolations sample at positions of the whole image.

    Args:
        resizes: geometries of the tile and of the whole image.
        start: pixel of the whole, context included, on which the tile starts, an axis.
    """

    def __init__(self, resizes: Resizes, start: Sequence[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        pairs = zip(resizes.tile.resizes, resizes.whole.resizes, strict=True)
        self.resizes = {tile.number: (tile, whole) for tile, whole in pairs}
        self.number = -1  # of the interpolation that was met last
        self.start = start

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not name.removeprefix("_").startswith("upsample_"):
            return func(*args, **(kwargs or {}))
        self.number += 1
        if self.number not in self.resizes:
            return func(*args, **(kwargs or {}))
        tile, whole = self.resizes[self.number]
        named = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)}  # noqa: SLF001
        named |= kwargs or {}
        x: Tensor = named["input"] if "input" in named else args[0]
        scales = [named.get(key) for key in ("scales", "scales_d", "scales_h", "scales_w")]
        given = [scale for scale in scales if scale is not None]
        given = given if len(given) == len(tile.before) else [None] * len(tile.before)
        for k, (a, b) in enumerate(zip(whole.before, whole.after, strict=True)):
            begin_in, begin_out = (int(self.start[k] / axis.scale) for axis in (a, b))
            length = tile.after[k].size
            x = resampled(
                x,
                2 + k,
                torch.arange(begin_out, begin_out + length, device=x.device),
                begin_in,
                (a.size, b.size),
                given[k],
                mode=name,
                corners=bool(named.get("align_corners")),
            )
        return x


def resampled(  # noqa: PLR0917
    x: Tensor,
    dim: int,
    at: Tensor,
    begin: int,
    sizes: tuple[int, int],
    scale: float | None,
    *,
    mode: str,
    corners: bool,
) -> Tensor:
    """Interpolate one axis; `at`: elements of the whole result, `begin`: x's first in the whole."""
    old, new = sizes
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    if corners:
        step = torch.tensor((old - 1) / (new - 1) if new > 1 else 0.0, dtype=kind)
    else:
        step = torch.tensor(1 / scale if scale else old / new, dtype=kind)
    # torch rounds a position once: its compilers contract step * (i + 1/2) - 1/2.  In float64 the
    # product is exact, and that many bits are far more than a float32 position has.
    at, step = at.double(), step.double()
    if "nearest" in mode and "exact" not in mode:
        place = (at * step).to(kind)
    else:
        place = (at * step if corners else (at + 0.5) * step - 0.5).to(kind)
        if "cubic" not in mode:
            place = place.clamp(min=0)
    # floorf: in float32 whatever the map's dtype is
    if "nearest" in mode:
        half = 0.5 if "exact" in mode else 0.0
        index = (place.double() + half).float().floor().long().clamp(max=old - 1)
        return x.index_select(dim, (index - begin).clamp(0, x.shape[dim] - 1))
    base = place.float().floor().clamp(max=old - 1)
    part = (place - base).clamp(0, 1)
    if "cubic" in mode:
        taps, weights = [base.long() + i for i in (-1, 0, 1, 2)], _cubic(part)
    else:
        taps, weights = [base.long(), base.long() + 1], [1 - part, part]
    shape = [1] * x.dim()
    shape[dim] = -1
    result = torch.zeros((), dtype=kind, device=x.device)
    for tap, weight in zip(taps, weights, strict=True):
        index = (tap.clamp(0, old - 1) - begin).clamp(0, x.shape[dim] - 1)
        result = result + x.index_select(dim, index) * weight.view(shape)
    return result.to(x.dtype)


def _cubic(t: Tensor) -> list[Tensor]:
    def near(s: Tensor) -> Tensor:
        return ((_CUBIC + 2) * s - (_CUBIC + 3)) * s * s + 1

    def far(s: Tensor) -> Tensor:
        return ((_CUBIC * s - 5 * _CUBIC) * s + 8 * _CUBIC) * s - 4 * _CUBIC

    return [far(t + 1), near(t), near(1 - t), far(2 - t)]
