"""What cross-entropies share: the arguments beside the scores, and checks of them."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ._checks import as_integer, check_classes, check_ids, check_tensor, wrong
from ._tiles import wide

Reduction: TypeAlias = Literal["none", "mean", "sum"]
REDUCTIONS = ("none", "mean", "sum")  # as csrc numbers them


def checked_loss(  # noqa: C901  (one check after the other)
    op: str,
    leading: str,
    scores: Tensor,
    target: Tensor,
    size: tuple[int, ...],
    *,
    weight_map: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int | None,
    reduction: str,
    label_smoothing: float,
    validate: bool,
) -> tuple[Tensor | None, Tensor | None, int | None]:
    """Check what goes beside scores (N, C, ...), which ``leading`` names.

    Args:
        op: the operator.
        leading: the name of the argument that scores are.
        scores: of which dtype, device and number of classes count; checked before.
        target: class ids.
        size: that of the target.
        weight_map: as the operators have it.
        class_weight: as the operators have it.
        ignore_index: as the operators have it.
        reduction: as the operators have it.
        label_smoothing: as the operators have it.
        validate: look for ids that are no class, which waits for a GPU.

    Returns:
        The map as (N, *S), the weights as kernels read them, and the id that is ignored.
    """
    if ignore_index is not None:
        ignore_index = as_integer(op, "ignore_index", ignore_index)
    check_ids(op, "target", target)
    if tuple(target.shape) != size:
        raise wrong(op, "target", f"shape {size}", tuple(target.shape))
    if target.device != scores.device:
        raise wrong(op, "target", f"{leading}' device {scores.device}", target.device)
    if reduction not in REDUCTIONS:
        raise wrong(op, "reduction", "'none', 'mean' or 'sum'", repr(reduction))
    if not isinstance(label_smoothing, (int, float, torch.SymFloat)):
        raise TypeError(f"{op}: label_smoothing: expected a number, got {label_smoothing!r}")
    if not 0 <= label_smoothing <= 1:
        raise wrong(op, "label_smoothing", "0 to 1", label_smoothing)
    if weight_map is not None:
        _check_companion(op, leading, scores, "weight_map", weight_map)
        weight_map = _as_map(op, weight_map, size)
    if class_weight is not None:
        _check_companion(op, leading, scores, "class_weight", class_weight)
        if tuple(class_weight.shape) != (scores.shape[1],):
            got = tuple(class_weight.shape)
            raise wrong(op, "class_weight", f"shape {(scores.shape[1],)}", got)
        # Few, so that a copy costs nothing.
        class_weight = class_weight.detach().to(wide(scores.dtype)).contiguous()
    if validate:
        check_classes(
            op,
            "target",
            target,
            classes=scores.shape[1],
            target=target,
            ignore_index=ignore_index,
        )
    return weight_map, class_weight, ignore_index


def _check_companion(op: str, leading: str, scores: Tensor, name: str, value: Tensor) -> None:
    check_tensor(op, name, value)
    if value.dtype not in (scores.dtype, torch.float32):
        other = "" if scores.dtype == torch.float32 else " or torch.float32"
        expected = f"{leading}' dtype {scores.dtype}{other}"
        raise TypeError(f"{op}: {name}: expected {expected}, got {value.dtype}")
    if value.device != scores.device:
        raise wrong(op, name, f"{leading}' device {scores.device}", value.device)


def _as_map(op: str, weight_map: Tensor, size: tuple[int, ...]) -> Tensor:
    if weight_map.dim() == len(size) + 1 and weight_map.shape[1] == 1:
        weight_map = weight_map[:, 0]
    if tuple(weight_map.shape) != size:
        expected = f"shape {size} or {(size[0], 1, *size[1:])}"
        raise wrong(op, "weight_map", expected, tuple(weight_map.shape))
    return weight_map.detach()
