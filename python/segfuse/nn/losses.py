"""Losses as modules, which hold the weights of classes."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from ..ops._losses import REDUCTIONS
from ..ops.weighted_cross_entropy import weighted_cross_entropy

__all__ = ["WeightedCrossEntropy"]


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
            raise ValueError(
                f"WeightedCrossEntropy: reduction: expected one of {REDUCTIONS}, got {reduction!r}"
            )
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

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, "
            f"label_smoothing={self.label_smoothing}"
        )
