"""Predicting images: one in memory, or files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .devices import autocast, channels_last, check_precision, choose
from .devices import threads as use_threads
from .errors import UserError

if TYPE_CHECKING:
    from .run import Run

__all__ = ["predict", "predict_files"]

_KEPT = (".png", ".tif", ".tiff")  # what label files can be written as
_BYTE = 256


def predict(
    model: nn.Module | Run | str | Path,
    image: NDArray[Any] | Tensor,
    *,
    output: Literal["labels", "probabilities", "scores"] = "labels",
    device: str | torch.device | None = None,
    precision: str | None = None,
) -> NDArray[Any]:
    """Segment one image, whole.

    A model with `margin` and `nearest_sizes`, as `segfuse.models.UNet` has, gets the image with as
    much mirrored context around it as it needs, so that any size from one pixel on goes in. Any
    other is given the image as it is, and must return scores of its size.

    Args:
        model: maps images (N, C, *S) to logits (N, K, *S'); or a run, or the path of its folder,
            whose best weights and normalisation are used. A module's mode is put back afterwards.
        image: array (*S) or (*S, C), or tensor (*S) or (C, *S), without (*S) axes of length zero.
            With a run, grey values as in the files that it was trained on; with a module, what it
            takes. The number of axes in S is the model's attribute `dims`, else 2.
        output: "labels": the class of the highest score. "probabilities": softmax of the scores.
        device: None: where the module's parameters are, for a run "auto". A module is moved there.
        precision: "32", "bf16" or "16" (CUDA only). None: for a run that of its training where the
            device can, else "32".

    Returns:
        "labels": (*S) uint8, for more than 256 classes int64. Else (K, *S) float32.

    Raises:
        ValueError: an argument out of its range, an image of another shape or channel count, a
            model that returns another size.
        UserError: a run that cannot be opened, a device that is not there.

    Limits:
        The whole image and its maps must fit into the device's memory: a UNet takes 20 to 25 bytes
        a pixel for each of its `base` channels.
    """
    if output not in {"labels", "probabilities", "scores"}:
        raise ValueError(
            f"predict: output: expected labels, probabilities or scores, got {output!r}"
        )
    if isinstance(model, nn.Module):
        where = choose(device or next(model.parameters(), torch.empty(0)).device)
        network = model.to(where)
        pixels = _channels_first(network, image)
    else:
        run = _opened(model)
        where = choose(device or "auto")
        precision = precision or _supported(run.precision, where)
        network = run.network(where)
        pixels = run.normalisation(_channels_first(network, image))
    scores = _scores(network, pixels, where, check_precision(precision or "32", where))
    if output == "probabilities":
        return np.asarray(scores.softmax(0).cpu().numpy())
    if output == "scores":
        return np.asarray(scores.cpu().numpy())
    labels = scores.argmax(0)
    return np.asarray((labels.byte() if len(scores) <= _BYTE else labels).cpu().numpy())


def predict_files(
    run: Run | str | Path,
    images: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    probabilities: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    threads: int | None = None,
    progress: bool = False,
) -> list[Path]:
    """Segment image files with a run's best weights; write label files like those it learned from.

    The files have the images' names, ``.png`` in place of ``.jpg`` and ``.tif`` in place of
    ``.ome.tif``; a stack's pages are predicted one by one. All names, channels and the folder
    are checked before anything is written.

    Args:
        run: or the path of its folder.
        images: files, and folders whose images are all taken.
        output: the folder for the results; made if missing.
        probabilities: write ``<name>_probabilities.tif`` too, (pages, classes, H, W) float32.
        overwrite: replace files that are there.
        device: "auto", "cpu", "cuda", "cuda:N".
        threads: CPU threads, None as torch has them.
        progress: show a bar; needs rich.

    Returns:
        The files written.

    Raises:
        UserError: a file that cannot be read or has another number of channels, one that would be
            overwritten, two of one name; a folder that cannot be written to; a damaged run.
    """
    from .data.files import image_header, read_image, write_labels, write_scores  # noqa: PLC0415
    from .data.pairs import find_images  # noqa: PLC0415
    from .run import make  # noqa: PLC0415

    run = _opened(run)
    where, output = choose(device), Path(output)
    sources = [images] if isinstance(images, (str, Path)) else list(images)
    files = [file for source in sources for file in find_images(Path(source))]
    if not files:
        raise UserError("images: expected files or folders, got none")
    jobs = {file: _names(file, output, probabilities=probabilities) for file in files}
    _check_names(jobs, overwrite=overwrite)
    for file in files:
        channels = image_header(file)[1]
        if channels != run.channels:
            raise UserError(
                f"{file}: expected {run.channels} channels, as {run.path} was trained on, "
                f"got {channels}"
            )
    written: list[Path] = []
    with use_threads(threads):
        run.network(where)  # damaged weights are found before anything is written
        make(output / "any")
        for file, targets in _shown(jobs, progress=progress):
            pages = [page.transpose(1, 2, 0) for page in read_image(file)]
            if probabilities:
                scores = np.stack([predict(run, p, output="scores", device=where) for p in pages])
                write_scores(targets[1], torch.from_numpy(scores).softmax(1).numpy())
                labels = scores.argmax(1).astype(np.uint8)
            else:
                labels = np.stack([predict(run, page, device=where) for page in pages])
            write_labels(targets[0], run.coding.decode(labels), palette=run.coding.palette)
            written += targets
    return written


def _opened(run: Run | str | Path) -> Run:
    if isinstance(run, (str, Path)):
        from .run import Run  # noqa: PLC0415  # imported late: a module alone needs torch only

        return Run.open(run)
    return run


def _supported(precision: str, device: torch.device) -> str:
    return "32" if precision == "16" and device.type != "cuda" else precision


def _channels_first(model: nn.Module, image: NDArray[Any] | Tensor) -> NDArray[Any]:
    """Return the image as an array (C, *S)."""
    dims, channels = getattr(model, "dims", 2), getattr(model, "in_channels", None)
    if isinstance(image, Tensor):
        array, kind, axis = image.detach().cpu().numpy(), "a tensor", 0
    else:
        array, kind, axis = np.asarray(image), "an array", -1
    if array.ndim == dims:
        array = array[None]
    elif array.ndim == dims + 1:
        array = np.moveaxis(array, axis, 0)
    if array.ndim != dims + 1 or len(array) != (channels or len(array)) or not array.size:
        axes: list[Any] = ["D", "H", "W"][3 - dims :]
        axes.insert(axis if axis == 0 else dims, channels or "C")
        wanted = ", ".join(map(str, axes))
        raise ValueError(
            f"predict: image: expected {kind} ({wanted}), got shape {tuple(image.shape)}"
        )
    return array


@torch.inference_mode()
def _scores(model: nn.Module, image: NDArray[Any], device: torch.device, precision: str) -> Tensor:
    """Compute scores (K, *S) float32, on the device, of an image (C, *S)."""
    size = image.shape[1:]
    padded = hasattr(model, "margin") and hasattr(model, "nearest_sizes")
    if padded:
        framed: Any = model  # tells how much context it needs
        margin = framed.margin
        border = [(margin, framed.nearest_sizes(n + 2 * margin)[1] - n - margin) for n in size]
        image = np.pad(image, [(0, 0), *border], mode="reflect")
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    kind = np.float64 if dtype == torch.float64 else np.float32
    batch = torch.from_numpy(np.ascontiguousarray(image, kind))[None].to(device, dtype)
    with _evaluating(model), autocast(device, precision):
        scores: Tensor = model(channels_last(batch))[0]
    if padded:
        scores = scores[(slice(None), *(slice(n) for n in size))]
    if scores.shape[1:] != size:
        raise ValueError(
            f"predict: model: expected scores of the image's size {tuple(size)}, got "
            f"{tuple(scores.shape[1:])}; if it needs context, it must have `margin` and "
            "`nearest_sizes`"
        )
    return scores.float()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _names(file: Path, output: Path, *, probabilities: bool) -> list[Path]:
    stem = file.stem.removesuffix(".ome")  # what is written has no OME metadata
    labels = stem + (file.suffix if file.suffix.lower() in _KEPT else ".png")
    return [output / labels] + [output / f"{stem}_probabilities.tif"] * probabilities


def _check_names(jobs: dict[Path, list[Path]], *, overwrite: bool) -> None:
    """Refuse two results of one name, a result in an image's place, and what is there already."""
    of: dict[Path, Path] = {}
    images = {file.resolve() for file in jobs}
    for file, targets in jobs.items():
        for target in targets:
            if target in of:
                raise UserError(f"{of[target]} and {file} would both be predicted to {target}")
            if target.resolve() in images:
                raise UserError(f"{target} is an image to predict: choose another output folder")
            if target.exists() and not overwrite:
                raise UserError(
                    f"{target} exists: choose another output folder, or overwrite (--overwrite)"
                )
            of[target] = file


def _shown(jobs: dict[Path, list[Path]], *, progress: bool) -> Iterator[tuple[Path, list[Path]]]:
    if not progress:
        yield from jobs.items()
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import track  # noqa: PLC0415

    console = Console(stderr=True)
    quiet = not console.is_terminal
    yield from track(jobs.items(), description="predicting", console=console, disable=quiet)
