"""The four figures of semantic segmentation, from a confusion matrix of the whole set.

Long, Shelhamer, Darrell: Fully Convolutional Networks for Semantic Segmentation, CVPR 2015,
Section 5. With n_ij the pixels of class i that are predicted as j, t_i = sum_j n_ij and the union
u_i = t_i + sum_j n_ji - n_ii:

    pixel accuracy         sum_i n_ii / sum_i t_i
    mean accuracy          mean of n_ii / t_i
    mean IU                mean of n_ii / u_i
    frequency weighted IU  sum_i t_i n_ii / u_i / sum_i t_i

As in the released score.py, a mean is over the classes for which the fraction exists: a class
without pixels in the target has no accuracy, and one absent from target and prediction no IU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from .. import ops

__all__ = ["ConfusionMatrix", "Scores", "semantic_scores"]


@dataclass(frozen=True)
class Scores:
    """Figures of a confusion matrix, each in 0 to 1, or nan where nothing was counted.

    Attributes:
        pixel_accuracy: fraction of the pixels that are right.
        mean_accuracy: mean of `accuracy`, nan left out.
        mean_iu: mean of `iu`, nan left out.
        frequency_weighted_iu: mean of `iu`, weighted by the classes' pixels in the target.
        iu: intersection over union of each class.
        accuracy: fraction of each class's pixels in the target that are right.
        pixels: that were counted.
    """

    pixel_accuracy: float
    mean_accuracy: float
    mean_iu: float
    frequency_weighted_iu: float
    iu: tuple[float, ...]
    accuracy: tuple[float, ...]
    pixels: int


def semantic_scores(matrix: Tensor) -> Scores:
    """Compute the figures of a confusion matrix, in float64.

    Args:
        matrix: (K, K) counts, rows = target, integer or floating, on any device.

    Raises:
        ValueError: another shape.
    """
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:  # noqa: PLR2004
        raise ValueError(
            f"semantic_scores: matrix: expected shape (K, K), got {tuple(matrix.shape)}"
        )
    counts = matrix.to("cpu", torch.float64)
    right, target = counts.diagonal(), counts.sum(1)  # (K,) n_ii, t_i
    iu, accuracy = right / (target + counts.sum(0) - right), right / target  # 0 / 0 is nan
    return Scores(
        pixel_accuracy=float(right.sum() / target.sum()),
        mean_accuracy=float(accuracy.nanmean()),
        mean_iu=float(iu.nanmean()),
        frequency_weighted_iu=float((target * iu).nansum() / target.sum()),
        iu=tuple(iu.tolist()),
        accuracy=tuple(accuracy.tolist()),
        pixels=int(matrix.sum()),
    )


class ConfusionMatrix(nn.Module):
    """Counts pixels by target and prediction over many batches; used as torchmetrics' are.

    The counts follow the module to its device and are not part of its state dict. Where
    ``torch.distributed`` is initialised, each process counts its own batches and `compute` and
    `scores`, to be called by all of them, sum over the processes of the default group.

    Args:
        num_classes: K.
        ignore_index: the target's id for pixels that do not count, or None.

    Raises:
        ValueError: `num_classes` is no integer >= 1.
    """

    def __init__(self, num_classes: int, *, ignore_index: int | None = 255) -> None:
        super().__init__()
        if not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(
                f"ConfusionMatrix: num_classes: expected an integer >= 1, got {num_classes!r}"
            )
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        # No buffer: DistributedDataParallel would overwrite it with the first process's.
        self._matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def _apply(self, fn: Any, *rest: Any, **options: Any) -> ConfusionMatrix:
        super()._apply(fn, *rest, **options)  # type: ignore[no-untyped-call]
        self._matrix = fn(self._matrix)
        return self

    def extra_repr(self) -> str:
        """Return the arguments, for the module's text."""
        return f"{self.num_classes}, ignore_index={self.ignore_index}"

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Count a batch: what `segfuse.ops.confusion_matrix` takes, and raises."""
        self(prediction, target)

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Count a batch, and return its own matrix (K, K) int64, rows = target."""
        batch = ops.confusion_matrix(
            prediction, target, self.num_classes, ignore_index=self.ignore_index
        )
        self._matrix += batch.to(self._matrix.device)
        return batch

    def compute(self) -> Tensor:
        """Return the matrix (K, K) int64, rows = target, of all batches since the last reset."""
        matrix = self._matrix.clone()
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(matrix)
        return matrix

    def scores(self) -> Scores:
        """Return the figures of `compute`."""
        return semantic_scores(self.compute())

    def reset(self) -> None:
        """Forget all batches."""
        self._matrix.zero_()
