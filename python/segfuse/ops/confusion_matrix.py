"""Count how pixels of each class were classified."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..registry import (
    FLOATING,
    Benchmark,
    Kernel,
    Make,
    OpSpec,
    Sample,
    defined_by,
    register,
    runs_reference,
)
from ._checks import as_integer, check_classes, check_ids, check_tensor, wrong

MOST_CLASSES = 32768


def _reference(
    prediction: Tensor,
    target: Tensor,
    num_classes: int,
    *,
    ignore_index: int | None = 255,
    validate: bool = False,  # noqa: ARG001  (it always does)
) -> Tensor:
    if prediction.dim() > target.dim():
        prediction = prediction.argmax(1)
    _check_values(prediction, target, num_classes, ignore_index)
    counted = torch.ones_like(target, dtype=torch.bool)
    if ignore_index is not None:
        counted = target.long() != ignore_index
    bins = target[counted].long() * num_classes + prediction[counted].long()
    counts = torch.bincount(bins, minlength=num_classes**2)
    return counts.view(num_classes, num_classes)


@defined_by(_reference)
def confusion_matrix(
    prediction: Tensor,
    target: Tensor,
    num_classes: int,
    *,
    ignore_index: int | None = 255,
    validate: bool = False,
) -> Tensor:
    """Count the pixels of class ``t`` that were taken for class ``p``, for all ``t`` and ``p``.

    ``n_ij`` of Long, Shelhamer and Darrell 2015, section 5, of which all four of its metrics are
    made (:func:`segfuse.metrics.semantic_scores`).  Matrices of parts of a set add up to that of
    the set.  Given scores, their argmax is taken in the same pass and stored nowhere: of equal
    scores the lowest class wins, and a NaN before everything, as in ``torch.argmax``.

    Args:
        prediction: class ids ``(N, *S)``, uint8, int8, int16, int32 or int64; or scores
            ``(N, num_classes, *S)``, floating.
        target: class ids ``(N, *S)``, one to three spatial axes, of the dtypes above.
        num_classes: 1 to 32768.
        ignore_index: pixels with this target are not counted, even where it is a class, and their
            prediction may be anything; None counts all.
        validate: on CUDA, look for ids out of range before counting, which waits for the GPU, so
            that they raise; otherwise they end in a device-side assert.  The CPU always looks.
            Not within ``torch.compile(fullgraph=True)``.

    Returns:
        ``(num_classes, num_classes)`` int64, exact; the rows are the target's classes.

    Raises:
        ValueError: shapes or devices that do not fit, or an id that is no class; the text names the
            first one.
        TypeError: dtypes other than those above.

    Limits: within ``torch.func`` the reference runs, and ``torch.vmap`` cannot trace that.
    """
    op = "confusion_matrix"
    num_classes = as_integer(op, "num_classes", num_classes)
    if ignore_index is not None:
        ignore_index = as_integer(op, "ignore_index", ignore_index)
    _check(prediction, target, num_classes)
    if validate:
        _check_values(prediction, target, num_classes, ignore_index)
    if runs_reference(op, prediction):
        return _reference(prediction, target, num_classes, ignore_index=ignore_index)
    result: Tensor = torch.ops.segfuse.confusion_matrix(
        prediction, target, num_classes, ignore_index
    )
    return result


def _check_values(
    prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int | None
) -> None:
    for argument, ids in {"target": target, "prediction": prediction}.items():
        if not ids.is_floating_point():
            check_classes(
                "confusion_matrix",
                argument,
                ids,
                classes=num_classes,
                target=target,
                ignore_index=ignore_index,
            )


def _check(prediction: Tensor, target: Tensor, num_classes: int) -> None:
    op = "confusion_matrix"
    check_tensor(op, "prediction", prediction)
    check_ids(op, "target", target)
    if target.dim() not in (2, 3, 4):
        raise wrong(op, "target", "2 to 4 dimensions (N, *S)", tuple(target.shape))
    if not 1 <= num_classes <= MOST_CLASSES:
        raise wrong(op, "num_classes", f"1 to {MOST_CLASSES}", num_classes)
    if prediction.device != target.device:
        raise wrong(op, "target", f"prediction's device {prediction.device}", target.device)
    if prediction.is_floating_point():
        check_tensor(op, "prediction", prediction, floating=True)
        size = (target.shape[0], num_classes, *target.shape[1:])
        if tuple(prediction.shape) != size:
            raise wrong(op, "prediction", f"scores {size}", tuple(prediction.shape))
    else:
        check_ids(op, "prediction", prediction)
        if prediction.shape != target.shape:
            expected = f"target's shape {tuple(target.shape)}"
            raise wrong(op, "prediction", expected, tuple(prediction.shape))


def _fake(
    prediction: Tensor,
    target: Tensor,  # noqa: ARG001
    num_classes: int,
    ignore_index: int | None,  # noqa: ARG001
) -> Tensor:
    return prediction.new_empty((num_classes, num_classes), dtype=torch.int64)


def _ids(make: Make, *size: int, classes: int, ignore: int | None = None) -> Tensor:
    """Class ids from a tensor of any dtype and content, some of them ignored."""
    numbers = make(*size)
    bits = numbers.contiguous().view(torch.uint8).view(*size, numbers.element_size())
    ids = bits.sum(-1) % (classes + (ignore is not None))
    return ids.masked_fill(ids == classes, ignore) if ignore is not None else ids


def _samples(make: Make) -> Iterator[Sample]:
    def case(name: str, classes: int, *size: int, dtype: torch.dtype = torch.uint8) -> Sample:
        batch, *spatial = size
        target = _ids(make, *size, classes=classes, ignore=255)
        if make(0).is_floating_point():
            prediction = make(batch, classes, *spatial)
        else:
            prediction = _ids(make, *size, classes=classes).to(make(0).dtype)
        return Sample((prediction, target.to(dtype), classes), {"ignore_index": 255}, name)

    yield case("picture", 3, 2, 9, 13)
    yield case("pictures", 21, 2, 17, 33, dtype=torch.int64)
    yield case("two classes", 2, 1, 40, 67, dtype=torch.int32)
    yield case("one class", 1, 1, 5, 7, dtype=torch.int16)
    yield case("signal", 4, 3, 19)
    yield case("volume", 5, 2, 3, 4, 5, dtype=torch.int64)
    yield case("many classes", 100, 1, 6, 11)
    yield case("more than a thread's share", 4, 1, 70, 131)
    yield case("one pixel", 2, 1, 1, 1)
    yield case("empty batch", 3, 0, 4, 4)
    yield case("no pixels", 3, 2, 0, 4)


def _failures(make: Make) -> Iterator[tuple[Sample, type[Exception], str]]:
    scores, ids = make(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.uint8, device=make(0).device)

    def call(*args: Any, **kwargs: Any) -> Sample:
        return Sample(args, kwargs)

    yield call([1], ids, 3), TypeError, "prediction: expected a torch.Tensor, got list"
    yield call(scores, ids.float(), 3), TypeError, "target: expected uint8, int8, int16, int32 or"
    yield call(ids.bool(), ids, 3), TypeError, "prediction: expected uint8, int8, int16, int32 or"
    yield call(scores, ids, 4), ValueError, "prediction: expected scores (2, 4, 4, 5), got"
    yield call(scores, ids, 0), ValueError, "num_classes: expected 1 to 32768, got 0"
    yield call(scores, ids, 3.0), TypeError, "num_classes: expected an integer, got 3.0"
    yield call(scores, ids, 3, ignore_index=2**63), ValueError, "ignore_index: expected an integer"
    wide = scores.to(torch.float8_e5m2)
    yield call(wide, ids, 3), TypeError, "prediction: expected float64, float32, float16 or bf"
    yield call(ids, ids[:1], 3), ValueError, "prediction: expected target's shape (1, 4, 5), got"
    yield call(ids[0, 0], ids[0, 0], 3), ValueError, "target: expected 2 to 4 dimensions"
    yield call(scores, ids.to("meta"), 3), ValueError, "target: expected prediction's device"
    yield (
        call(scores, ids, 3, ignore_index=0.5),
        TypeError,
        "ignore_index: expected an integer, got 0.5",
    )
    beyond = ids.clone()
    beyond[1, 2, 3] = 3
    ids_0_to_2, at = "expected class ids 0 to 2", "got 3 at (1, 2, 3)"
    text = f"target: {ids_0_to_2} or ignore_index 255, {at}"
    yield call(scores, beyond, 3, validate=True), ValueError, text
    yield call(beyond, ids, 3, validate=True), ValueError, f"prediction: {ids_0_to_2}, {at}"


def _benchmarks(make: Make) -> Iterator[Benchmark]:
    from torchmetrics.functional.classification import (  # noqa: PLC0415  (only to be timed)
        multiclass_confusion_matrix,
    )

    classes, size = 21, (4, 512, 512)

    def compare(name: str, prediction: Tensor, target: Tensor) -> Benchmark:
        def peer() -> Tensor:
            scores = prediction.is_floating_point()
            ids = prediction.argmax(1) if scores else prediction
            return multiclass_confusion_matrix(
                ids, target, classes, ignore_index=255, validate_args=False
            )

        return Benchmark(
            f"{name}, 4 x 512^2, 21 classes, fresh",
            ours=lambda: confusion_matrix(prediction, target, classes),
            peer=peer,
            bytes_moved=sum(t.numel() * t.element_size() for t in (prediction, target)),
        )

    for dtype in (torch.int64, torch.uint8):
        target = _ids(make, *size, classes=classes, ignore=255).to(dtype)
        kind = str(dtype).removeprefix("torch.")
        ids = _ids(make, *size, classes=classes).to(dtype)
        yield compare(f"ids {kind}", ids, target)
        if make(0).is_floating_point():
            yield compare(f"scores, target {kind}", make(size[0], classes, *size[1:]), target)


register(
    OpSpec(
        function=confusion_matrix,
        kernels=(Kernel("confusion_matrix", _fake),),
        samples=_samples,
        failures=_failures,
        benchmarks=_benchmarks,
        dtypes=(*FLOATING, torch.uint8, torch.int64),
        exact=True,
        differentiable=False,
    )
)
