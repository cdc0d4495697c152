"""Losses as modules, which hold the weights of classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from ..ops._losses import REDUCTIONS
from ..ops.upsample_cross_entropy import upsample_cross_entropy
from ..ops.weighted_cross_entropy import weighted_cross_entropy

__all__ = ["UpsampleCrossEntropy", "WeightedCrossEntropy"]


class WeightedCrossEntropy(nn.Module):
    """U-Net's loss as a module: :func:`segfuse.ops.weighted_cross_entropy`.

    Args:
        class_weight: ``(C,)``, a buffer of the module; None means 1 for every class.
        ignore_index: the target whose pixels have no loss, even where it is a class.
        reduction: "none", "sum" or "mean", which divides by the weights of the pixels.
        label_smoothing: 0 to 1.

    Shape:
        logits ``(N, C, *S)``, target ``(N, *S)``, weight_map ``(N, *S)`` or ``(N, 1, *S)`` to a
        scalar, or ``(N, *S)`` for "none".
    """

    class_weight: Tensor | None

    def __init__(
        self,
        *,
        class_weight: Tensor | None = None,
        ignore_index: int | None = 255,
        reduction: Literal["none", "mean", "sum"] = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            name = type(self).__name__
            raise ValueError(f"{name}: reduction: expected one of {REDUCTIONS}, got {reduction!r}")
        self.register_buffer("class_weight", class_weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, target: Tensor, weight_map: Tensor | None = None) -> Tensor:
        """Compute the loss of logits (N, C, *S) where target (N, *S) is true."""
        return weighted_cross_entropy(
            logits,
            target,
            weight_map=weight_map,
            class_weight=self.class_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )

    def of_coarse(
        self, scores: Tensor, target: Tensor, weight_map: Tensor | None = None, **upsampling: Any
    ) -> Tensor:
        """Compute the loss of scores (N, C, H, W) upsampled to the target's size.

        Args:
            scores: coarse ones; see :func:`segfuse.ops.upsample_cross_entropy`.
            target: class ids (N, *S).
            weight_map: (N, *S) or (N, 1, *S).
            upsampling: arguments of the operator that say how scores are upsampled.
        """
        return upsample_cross_entropy(
            scores,
            target,
            **upsampling,
            weight_map=weight_map,
            class_weight=self.class_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, "
            f"label_smoothing={self.label_smoothing}"
        )


class UpsampleCrossEntropy(WeightedCrossEntropy):
    """The loss of a head's coarse scores: :func:`segfuse.ops.upsample_cross_entropy`.

    In place of ``F.interpolate(scores, target.shape[1:], mode="bilinear")`` and ``F.cross_entropy``
    of what it gives, which is not stored; save that an ignored target is 255 where theirs is -100,
    and that the mean over no pixel is 0, not NaN.

    Args:
        factor: None: interpolate to the target's size; else the stride of a transposed convolution,
            see :func:`segfuse.ops.deconv_upsample`.
        kernel_size: with a factor: of its filter; ``2 factor - factor % 2`` by default.
        offset: with a factor: elements to crop from the start, a number or one an axis.
        align_corners: of the interpolation.
        class_weight: see `WeightedCrossEntropy`, like the options that follow.
        ignore_index: the target whose pixels have no loss, even where it is a class.
        reduction: "none", "sum" or "mean".
        label_smoothing: 0 to 1.

    Shape:
        scores ``(N, C, H, W)``, target ``(N, *S)``, weight_map ``(N, *S)`` or ``(N, 1, *S)``, and
        with a factor the weight ``(C, k, k)`` of a filter that is learned, to a scalar, or ``(N,
        *S)`` for "none". Two spatial axes.
    """

    def __init__(
        self,
        *,
        factor: int | None = None,
        kernel_size: int | None = None,
        offset: int | Sequence[int] = 0,
        align_corners: bool = False,
        class_weight: Tensor | None = None,
        ignore_index: int | None = 255,
        reduction: Literal["none", "mean", "sum"] = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(
            class_weight=class_weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
        self.factor = factor
        self.kernel_size = kernel_size
        self.offset = offset
        self.align_corners = align_corners

    def forward(
        self,
        scores: Tensor,
        target: Tensor,
        weight_map: Tensor | None = None,
        *,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss of scores (N, C, H, W), upsampled, where target (N, *S) is true."""
        return self.of_coarse(
            scores,
            target,
            weight_map,
            factor=self.factor,
            kernel_size=self.kernel_size,
            offset=self.offset,
            weight=weight,
            align_corners=self.align_corners,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        how = f"align_corners={self.align_corners}"
        if self.factor is not None:
            how = f"factor={self.factor}, kernel_size={self.kernel_size}, offset={self.offset}"
        return f"{how}, {super().extra_repr()}"
