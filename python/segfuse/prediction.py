"""Predicting images of any size, in memory or on disk."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from .tiling.job import Job, Result, expected
from .tiling.options import Asked
from .tiling.progress import Progress
from .tiling.sources import resized, sources

if TYPE_CHECKING:
    from .run import Run

__all__ = ["predict"]


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
            takes. A run that was trained on resized images resizes it, and the result back.
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
            Of a network that has `segfuse.nn.CoarseScores`, as `segfuse.models.FCN`, labels are
            made of the coarse scores directly, upsampled in float32, and full ones never stored.
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
            are required, and the result is the same to the bit. A tile that was chosen by what was
            free on a GPU is refused where another would be chosen now: name it, as the error does.
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
        one by one, and labels made of full scores; so are those of averages, by `blend` or
        `augment`. The eight copies are turned tiles of the continued image. In three dimensions a
        band holds whole planes. An image that a run resizes is in memory as a whole; of the result
        scores are interpolated, and labels are the nearest.
    """
    path = Path(out) if isinstance(out, (str, Path)) else None
    if path is None and (resume or overwrite):
        raise ValueError("predict: out: expected a path with resume or overwrite")
    asked = Asked(output, border, tile, memory, batch, blend, overlap, augment, margin, stride)
    job = Job.of(model, asked, device, precision)
    channels, dims = expected(job.model)
    images, batched = sources(image, axes=axes, channels=channels, dims=dims)
    size = images[0].shape[1:]
    if job.resize is not None:
        if out is not None:
            raise ValueError("predict: out: expected None with a run that resizes images")
        images = resized(images, job.resize)
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
    if job.resize is not None:
        from .data.resize import restored  # noqa: PLC0415 - a module alone needs torch only

        filled = torch.from_numpy(restored(filled.numpy(), size, scores=not work.labels))
    return filled.to(image.device) if isinstance(image, Tensor) else filled.numpy()
