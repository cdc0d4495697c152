"""Predicting images of any size: one in memory or on disk, or files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .devices import choose
from .devices import threads as use_threads
from .errors import UserError
from .tiling.job import Asked, Job, Result, expected
from .tiling.progress import Progress
from .tiling.sources import sources

if TYPE_CHECKING:
    from .run import Run

__all__ = ["predict", "predict_files"]

_KEPT = (".png", ".tif", ".tiff")  # what label files can be written as


def predict(
    model: nn.Module | Run | str | Path,
    image: Any,
    *,
    out: Any = None,
    axes: str | None = None,
    tile: int | Sequence[int] | Literal["auto"] = "auto",
    memory: int | str | None = None,
    batch: int | Literal["auto"] = "auto",
    border: Literal["mirror", "symmetric", "edge", "constant"] = "mirror",
    output: Literal["labels", "scores", "probabilities"] = "labels",
    blend: Literal["gaussian", "hann"] | None = None,
    overlap: float | Sequence[int] | None = None,
    augment: Literal["d4"] | None = None,
    margin: int | Sequence[int] | None = None,
    stride: int | Sequence[int] | None = None,
    device: str | torch.device | None = None,
    precision: str | None = None,
    progress: bool = True,
    resume: bool = False,
    overwrite: bool = False,
) -> Any:
    """Segment an image of any size with any convolutional network, tile by tile, without a seam.

    The overlap-tile strategy of Ronneberger, Fischer and Brox 2015, section 2, made exact: the
    margin by which tiles must overlap and the grid on which they must start are derived from the
    network (:mod:`segfuse.geometry`), so that the result is that of the whole image at once, up to
    rounding. An image at which the network runs and gives scores of the image's size is taken as it
    is; any other is continued beyond its border, by as much as the network eats and up to the next
    size that it takes.

    Args:
        model: maps images (N, C, *S), one to three spatial axes, to scores (N, K, *S') of the same
            resolution (of several outputs, the first tensor is taken); or a run, or the path of its
            folder, whose best weights and normalisation are used.
        image: tensor (C, *S) or (N, C, *S); array, memory map, zarr or dask array, or whatever else
            has shape, dtype and slices, (*S) or (*S, C); or the path of a TIFF, zarr, PNG or JPEG.
            With a run, grey values as in the files that it was trained on; with a module, what it
            takes.
        out: where the result goes: an array of its shape, or a path that ends in ".tif" (tiled
            BigTIFF) or ".zarr" (zarr 3 with OME-Zarr's axes). None: an array is returned.
        axes: the image's axes, if they are not as above: a letter each of Z, Y, X (space), C or S
            (channels), N or T (a batch of images; Z too where the network has two dimensions).
        tile: the network's input size, margins included, an axis; the next size is taken that the
            network's stride allows, and at least one stride is left after the margins. "auto": the
            image at once if `memory` allows, else the tiles with the least to compute that fit.
        memory: bytes, or a text such as "1.5GB", for the network's maps and the bands that are read
            and written. None: 1 GiB on a CPU, 80 % of what is free on a GPU. An estimate: the
            libraries' own workspaces come on top.
        batch: tiles that are computed together. "auto": 1 on a CPU, on a GPU as `memory` allows.
        border: how the image is continued where the network needs context: "mirror" (the border
            pixel not repeated), "symmetric", "edge", or "constant" (zeros).
        output: "labels": the class of the highest score; "probabilities": softmax of the scores.
        blend: for networks that look everywhere (instance normalisation, attention, ...) no tiling
            is exact. "gaussian" and "hann" average overlapping tiles by that window instead.
        overlap: with `blend`, of neighbouring tiles: a share of the tile below 1, or pixels.
        augment: "d4": average the probabilities (for "scores" the scores) of the eight turned and
            mirrored copies (section 3.1 of the paper averages seven turned ones); the last two axes
            are turned.
        margin: take the user's word in place of the network's graph: pixels a side that an output
            pixel may depend on.
        stride: with `margin`: the step on which tiles must start.
        device: None: where the module's parameters are, for a run "auto". A module is moved there.
        precision: "32", "bf16", "16" (CUDA only) or "auto". None: for a run that of its training
            where the device can, else "32".
        progress: show a bar on a terminal, and say what happens; the bar needs rich.
        resume: go on with what was killed, where `out` is a path; the same model, image and options
            are required, and the result is the same to the bit.
        overwrite: where `out` is a path, replace what is there.

    Returns:
        `out`, a path as `Path`, or an array: NumPy, for a tensor a tensor on its device. "labels":
        (*S) uint8, from 257 classes int16, from 32769 int32. Else (K, *S) float32, float64 for a
        network in float64. With a batch axis (N, *S) and (N, K, *S).

    Raises:
        ValueError: an argument out of its range, axes that can be read two ways, another channel
            count, a network that cannot be tiled exactly while the image does not fit as a whole;
            the text names the layer.
        UserError: a file that cannot be read or written, a device that is not there, an image,
            model or option that changed since the run that is to be resumed.

    Limits:
        The network's output must have the image's resolution, and must not depend on the values in
        ways that its graph does not show. Interpolation that depends on the size of the image
        (``align_corners=True``) is sampled at positions of the whole image; such tiles are computed
        one by one. The eight copies are turned tiles of the continued image. In three dimensions a
        band holds whole planes.
    """
    path = Path(out) if isinstance(out, (str, Path)) else None
    if path is None and (resume or overwrite):
        raise ValueError("predict: out: expected a path with resume or overwrite")
    asked = Asked(output, border, tile, memory, batch, blend, overlap, augment, margin, stride)
    job = Job.of(model, asked, device, precision)
    channels, dims = expected(job.model)
    images, batched = sources(image, axes=axes, channels=channels, dims=dims)
    work = job.prepare(images, batched=batched)
    with Progress(sum(prod(i.shape[1:]) for i in images), shown=progress) as show:
        if path is not None:
            with closing(work.file(path, resume=resume, overwrite=overwrite)) as target:
                work.run(target, show)
            return path
        if out is not None:
            work.run(work.array(out), show)
            return out
        result = Result(work)
        work.run(result, show)
    filled = result.filled()
    return filled.to(image.device) if isinstance(image, Tensor) else filled.numpy()


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
                scores = np.stack(
                    [predict(run, p, output="scores", device=where, progress=False) for p in pages]
                )
                write_scores(targets[1], torch.from_numpy(scores).softmax(1).numpy())
                labels = scores.argmax(1).astype(np.uint8)
            else:
                labels = np.stack(
                    [predict(run, page, device=where, progress=False) for page in pages]
                )
            write_labels(targets[0], run.coding.decode(labels), palette=run.coding.palette)
            written += targets
    return written


def _opened(run: Run | str | Path) -> Run:
    if isinstance(run, (str, Path)):
        from .run import Run  # noqa: PLC0415  # imported late: a module alone needs torch only

        return Run.open(run)
    return run


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
