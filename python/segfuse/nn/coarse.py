"""Networks that give their scores before the last upsampling, which then need not be stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

__all__ = ["CoarseScores", "coarse_scores"]

# Where torch keeps what runs beside a module's forward; it has no other way to ask.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


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
    hooks of the model or of all modules. Hooks of a module that only ``forward`` calls, as of
    ``FCN.up``, are not looked for, and do not run.
    """
    if not isinstance(model, CoarseScores) or "forward" in vars(model):
        return None
    if _has_any_global_hook() or any(vars(model)[hooks] for hooks in _HOOKS):
        return None
    for kind in type(model).__mro__:
        if "coarse_scores" in vars(kind):
            return model
        if "forward" in vars(kind):
            break
    return None
