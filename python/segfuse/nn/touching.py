"""U-Net's objective for cells that touch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..ops import separate_touching, unet_weight_map
from ..ops.unet_weight_map import ClassWeight
from ..ops.upsample_cross_entropy import upsample_cross_entropy
from ..ops.weighted_cross_entropy import weighted_cross_entropy

__all__ = ["TouchingCrossEntropy"]

_IGNORED = 255  # in the target that is made, which has two classes


class TouchingCrossEntropy(nn.Module):
    """Learn from ids of cells to tell cells from background, and touching cells apart.

    The objective of Ronneberger, Fischer, Brox 2015, section 3, made on the fly, on the batch's
    device, so that it fits labels that were deformed before: pixels of background are put between
    cells that touch (:func:`segfuse.ops.separate_touching`), and the cross-entropy of background
    and cells is weighted by :func:`segfuse.ops.unet_weight_map` of what is left. The loss is the
    sum over all pixels divided by that of their weights, so that neither many borders nor void
    change the size of a step.

    Args:
        w0: the largest weight of a border, at least 0.
        sigma: of its fall, in pixels, above 0.
        class_weight: of background and cells; "balanced" balances each image by itself, None
            weighs all alike. The paper balances over the training set: give the two numbers.
        void: the id of pixels that do not count, a negative number. They do not touch cells.

    Shape:
        logits ``(N, 2, *S)`` of background and cells, ids ``(N, *S)`` of a signed integer dtype,
        0 is the background, to a scalar. One to three spatial axes.

    Raises:
        ValueError: a number out of its range, or shapes that do not go together.
    """

    def __init__(
        self,
        *,
        w0: float = 10.0,
        sigma: float = 5.0,
        class_weight: ClassWeight = "balanced",
        void: int = -1,
    ) -> None:
        super().__init__()
        if void >= 0:
            raise ValueError(f"TouchingCrossEntropy: void: expected a negative number, got {void}")
        self.w0 = w0
        self.sigma = sigma
        self.class_weight = class_weight
        self.void = void

    def forward(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Compute the loss of logits (N, 2, *S) where cells have the ids (N, *S)."""
        target, weight_map = self.target(ids)
        return weighted_cross_entropy(logits, target, weight_map=weight_map, ignore_index=_IGNORED)

    def of_coarse(self, scores: Tensor, ids: Tensor, **upsampling: Any) -> Tensor:
        """Compute the loss of scores (N, 2, H, W) upsampled to the size of ids (N, *S).

        Args:
            scores: coarse ones; see :func:`segfuse.ops.upsample_cross_entropy`.
            ids: of cells.
            upsampling: arguments of the operator that say how scores are upsampled.
        """
        target, weight_map = self.target(ids)
        return upsample_cross_entropy(
            scores, target, **upsampling, weight_map=weight_map, ignore_index=_IGNORED
        )

    def target(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Make the target of ids (N, *S), and the weights of its pixels.

        Returns:
            0 for background, 1 for cells and 255 for void, (N, *S) uint8; and float32 like it, 0
            where void.
        """
        dims = ids.dim() - 1
        void = ids == self.void
        # Void is no cell that another could touch.
        cells = separate_touching(ids.masked_fill(void, 0), dims=dims)
        weight_map = unet_weight_map(
            cells.masked_fill(void, self.void),
            w0=self.w0,
            sigma=self.sigma,
            class_weight=self.class_weight,
            dims=dims,
            ignore_index=self.void,
        )
        return (cells != 0).byte().masked_fill_(void, _IGNORED), weight_map

    def extra_repr(self) -> str:
        """Show the options."""
        return f"w0={self.w0}, sigma={self.sigma}, class_weight={self.class_weight}"
