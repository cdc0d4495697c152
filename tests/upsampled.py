"""Scores, ways to upsample them, and how near a result must be to what they give in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from backends import BACKENDS
from hypothesis import strategies as st
from torch import Tensor

# Where another order of threads tells nothing new, and takes as long.
IN_ONE_ORDER = [name for name in BACKENDS if name not in {"emulated-1", "emulated-2"}]
ULPS = 4  # of the largest value, that a result may err beside twice what plain PyTorch errs


@dataclass(frozen=True)
class Case:
    """Scores (N, C, H, W), the size that they are upsampled to, and how, as operators take it."""

    scores: Tensor
    size: tuple[int, int]
    how: dict[str, Any] = field(default_factory=dict)
    name: str = ""

    @property
    def classes(self) -> int:
        return self.scores.shape[1]

    @property
    def weight(self) -> Tensor | None:
        return self.how.get("weight")

    @property
    def largest(self) -> float:
        """Of the finite inputs, and 1."""
        inputs = [self.scores] if self.weight is None else [self.scores, self.weight]
        return max(1.0, *(t[t.isfinite()].abs().max().item() for t in inputs))

    def to(self, *where: Any) -> Case:
        """In another dtype, or on another device."""
        return self._with(lambda t: t.to(*where))

    def asking(self) -> Case:
        """With gradients asked for."""
        return self._with(lambda t: t.detach().clone().requires_grad_())

    def _with(self, change: Callable[[Tensor], Tensor]) -> Case:
        how = {k: change(v) if isinstance(v, Tensor) else v for k, v in self.how.items()}
        return replace(self, scores=change(self.scores), how=how)

    def upsampled(self) -> Tensor:
        """In plain PyTorch, (N, C, *size); of halves in float32."""
        scores = self.scores.float() if self.scores.element_size() < 4 else self.scores
        if "factor" not in self.how:
            return F.interpolate(scores, self.size, mode="bilinear", **self.how)
        factor, weight = self.how["factor"], self.weight
        if weight is None:
            weight = _bilinear(self.how.get("kernel_size") or 2 * factor - factor % 2)
            weight = weight.expand(self.classes, -1, -1)
        full = F.conv_transpose2d(
            scores, weight[:, None].to(scores), stride=factor, groups=self.classes
        )
        offset = self.how.get("offset", 0)
        top, left = offset if isinstance(offset, tuple) else (offset, offset)
        height, width = self.size
        return full[:, :, top : top + height, left : left + width]


def _bilinear(size: int) -> Tensor:
    reach = (size + 1) // 2
    centre = reach - 1 if size % 2 else reach - 0.5
    taps = 1 - (torch.arange(size, dtype=torch.float64) - centre).abs() / reach
    return taps[:, None] * taps


def assert_near(
    got: Tensor, plain: Tensor, truth: Tensor, *, largest: float, somewhere: bool = False
) -> None:
    """At most twice as far from the truth as plain PyTorch, and some ulps; NaN and inf where it is.

    Args:
        got: what is to be judged.
        plain: the reference's result of the same inputs.
        truth: the same in float64.
        largest: value that goes in, of which an ulp is counted; of a gradient times its own.
        somewhere: where plain PyTorch is not finite anything may be.
    """
    assert got.shape == plain.shape
    assert got.dtype == plain.dtype
    finite = plain.isfinite()
    if not somewhere:
        torch.testing.assert_close(got[~finite], plain[~finite], equal_nan=True)
    assert got[finite].isfinite().all()
    both = finite & truth.isfinite()
    if not both.any():
        return
    got, true = got[both].double(), truth[both]
    error = (plain[both].double() - true).abs().max()
    ulp = largest * max(1.0, true.abs().max().item()) * torch.finfo(plain.dtype).eps
    assert (got - true).abs().max() <= 2 * error + ULPS * ulp


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Of few cells; to more, to fewer, and to a single pixel."""
    batch, classes = draw(st.integers(1, 2)), draw(st.integers(1, 9))
    coarse = draw(st.tuples(st.integers(1, 6), st.integers(1, 9)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    scores = 3 * torch.randn(batch, classes, *coarse, generator=generator)
    if draw(st.booleans()):
        size = draw(st.tuples(st.integers(1, 17), st.integers(1, 33)))
        return Case(scores, size, {"align_corners": draw(st.booleans())})
    factor, kernel = draw(st.integers(1, 5)), draw(st.integers(1, 11))
    how: dict[str, Any] = {"factor": factor, "kernel_size": kernel}
    if draw(st.booleans()):
        how["weight"] = torch.randn(classes, kernel, kernel, generator=generator)
    full = [(n - 1) * factor + kernel for n in coarse]
    offset = tuple(draw(st.integers(0, n - 1)) for n in full)
    size = tuple(draw(st.integers(1, n - o)) for n, o in zip(full, offset, strict=True))
    return Case(scores, size, {**how, "offset": offset})  # type: ignore[arg-type]


def extremes() -> Iterator[Case]:
    """Large scores, classes and cells that are ruled out, NaN and infinity; upsampled in each way.

    In ratios of powers of two, where all positions are exact: `F.interpolate` gives NaN where it
    multiplies an infinite score by a weight of zero, and so does a filter with a tap of zero.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    learned = random(4, 4, 4)
    learned[1, 0, 2] = 0
    ways: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
        "interpolated": ((20, 24), {}),
        "corners": ((9, 11), {"align_corners": True}),
        "to fewer": ((5, 3), {}),
        "by a factor": ((8, 11), {"factor": 2, "offset": (1, 0)}),
        "odd kernel": ((15, 19), {"factor": 4, "kernel_size": 7, "offset": (3, 2)}),
        "learned": ((9, 10), {"factor": 2, "weight": learned}),
    }
    for name, (size, how) in ways.items():
        scores = random(1, 4, 5, 6)

        def changed(what: str, change: Callable[[Tensor], Any]) -> Case:
            new = scores.clone()  # noqa: B023 - called at once
            change(new)
            return Case(new, size, how, f"{name}, {what}")  # noqa: B023

        yield changed("large", lambda s: s.mul_(1e4))
        yield changed("far apart", lambda s: s.sign_().mul_(3e4))
        yield changed("a class is out", lambda s: s[:, 1].fill_(-math.inf))
        yield changed("all but one are out", lambda s: s[:, :3].fill_(-math.inf))
        yield changed("cells are out", lambda s: s[0, 2, 1:3, 3].fill_(-math.inf))
        yield changed("nothing is left of cells", lambda s: s[0, :, 3, 4].fill_(-math.inf))
        yield changed("infinite", lambda s: s[0, 1, 2, 3].fill_(math.inf))
        yield changed("not a number", lambda s: s[0, 2, 2, 3].fill_(math.nan))
