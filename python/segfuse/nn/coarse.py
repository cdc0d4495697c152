"""Networks that give their scores before the last upsampling, which then need not be stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

__all__ = ["CoarseScores", "coarse_scores"]


@runtime_checkable
class CoarseScores(Protocol):
    """What a network may have so that its scores are stored at full resolution nowhere.

    For images (N, C, H, W) ``forward`` is then to be ``coarse_scores``, upsampled to H x W:
    :func:`segfuse.ops.upsample_argmax` and :func:`segfuse.ops.upsample_cross_entropy` make labels
    and the loss of the coarse scores directly, given ``upsampling`` as keyword arguments.
    `segfuse.models.FCN` has it; of a head that ends in bilinear ``F.interpolate`` it is ::

        upsampling = {}  # or {"align_corners": True}

        def coarse_scores(self, images):
            return self.classifier(self.backbone(images))

        def forward(self, images):
            scores = self.coarse_scores(images)
            return F.interpolate(scores, images.shape[2:], mode="bilinear")

    Attributes:
        upsampling: arguments of those operators that say how scores are upsampled: any of factor,
            offset, kernel_size, weight and align_corners. They do not depend on the images' size.
    """

    @property
    def upsampling(self) -> Mapping[str, Any]:
        """See above."""

    def coarse_scores(self, images: Tensor) -> Tensor:
        """Scores (N, K, h, w) of images (N, C, H, W)."""


def coarse_scores(model: nn.Module) -> CoarseScores | None:
    """Return a model whose coarse scores can stand for its output; None of any other.

    They cannot where something else than its class's ``forward`` makes the output: a ``forward``
    of a class derived later than ``coarse_scores``, or of the object (so of ``torch.compile``), or
    hooks.
    """
    if not isinstance(model, CoarseScores) or "forward" in vars(model):
        return None
    if model._forward_hooks or model._forward_pre_hooks:  # noqa: SLF001 - torch has no other way
        return None
    for kind in type(model).__mro__:
        if "coarse_scores" in vars(kind):
            return model
        if "forward" in vars(kind):
            break
    return None
