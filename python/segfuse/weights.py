"""U-Net's weight maps of label files: ``segfuse weights``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .data.files import read_labels, write_maps
from .data.labels import detect
from .data.pairs import find_images
from .errors import UserError
from .files import check_free, whole
from .objects import instances
from .ops import separate_touching, unet_weight_map
from .run import make

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["WeightMaps", "write_weights"]

_TIFF, _PICTURES = (".tif", ".tiff"), (".png", ".pdf")


@dataclass(frozen=True)
class WeightMaps:
    """What `write_weights` did.

    Attributes:
        files: that were written.
        least: of all weights.
        most: of all weights.
        binary: label files whose objects are connected components.
        classes: whether the numbers, each of which was taken for the id of a cell, could as well
            be classes or grey values (`data.detect`).
    """

    files: list[Path]
    least: float
    most: float
    binary: int
    classes: bool


def write_weights(
    labels: str | Path,
    output: str | Path,
    *,
    w0: float = 10.0,
    sigma: float = 5.0,
    separate: bool = True,
    ignore: int | None = None,
    picture: bool = False,
    overwrite: bool = False,
    track: Callable[[list[Path]], Iterator[Path]] = iter,
) -> WeightMaps:
    """Write the weight maps of label pictures by which U-Net learns to separate touching cells.

    ``w_c + w0 exp(-(d1 + d2)^2 / (2 sigma^2))`` on background, equation 2 of Ronneberger, Fischer,
    Brox 2015, with classes balanced picture by picture; see `segfuse.ops.unet_weight_map`.

    Args:
        labels: a folder or file of pictures: ids of cells, 0 = background; of a picture with a
            single number besides 0 the 4-connected components are the cells.
        output: a folder, made if missing, for float32 TIFFs of the labels' names; or of a single
            file a name that ends in .tif, or in .png or .pdf for a picture alone.
        w0: what a border adds at most, at least 0.
        sigma: of its fall, in pixels, above 0.
        separate: put background between cells that touch first; without, their contact has none to
            be weighed.
        ignore: id of pixels that weigh 0 and are no cell.
        picture: draw `<name>.png` of each file too, of a stack its first page.
        overwrite: replace files that are there.
        track: what takes the files one by one.

    Raises:
        UserError: files that cannot be read or written or would be overwritten; a number out of
            range.
    """
    labels, output = Path(labels), Path(output)
    try:
        unet_weight_map(torch.zeros(1, 1, dtype=torch.uint8), w0=w0, sigma=sigma)
    except ValueError as error:
        raise UserError(str(error).removeprefix("unet_weight_map: ")) from error
    sources = find_images(labels)
    targets = _targets(sources, output, picture=picture)
    _check(sources, targets, overwrite=overwrite)
    make(targets[0][0])
    least, most, binary = np.inf, -np.inf, 0
    goals = dict(zip(sources, targets, strict=True))
    for source in track(sources):
        ids, components = _cells(read_labels(source), source, ignore)
        binary += components
        tensor = torch.from_numpy(ids)
        if separate:
            tensor = _separated(tensor, ignore)
        maps = unet_weight_map(tensor, w0=w0, sigma=sigma, ignore_index=ignore).numpy()
        least, most = min(least, float(maps.min())), max(most, float(maps.max()))
        for file in goals[source]:
            if file.suffix.lower() in _PICTURES:
                _draw(file, maps[0])
            else:
                write_maps(file, maps)
    files = [file for files in targets for file in files]
    return WeightMaps(files, least, most, binary, _as_classes(sources, ignore))


def _as_classes(sources: list[Path], ignore: int | None) -> bool:
    try:
        return detect(sources, ignore=ignore).kind == "classes"
    except UserError:  # more classes than there can be
        return True


def _draw(file: Path, weights: NDArray[np.float32]) -> None:
    from .report import weights_picture  # noqa: PLC0415

    with whole(file) as path:
        weights_picture(weights).savefig(path, dpi=150)


def _targets(sources: list[Path], output: Path, *, picture: bool) -> list[list[Path]]:
    """Name the files to write for each source."""
    suffix = output.suffix.lower()
    if suffix in {*_TIFF, *_PICTURES} and not output.is_dir():
        if len(sources) > 1:
            raise UserError(f"{output} is to hold {len(sources)} weight maps: name a folder")
        drawn = [output.with_suffix(".png")] * (picture and suffix in _TIFF)
        return [[output, *drawn]]
    stems = [source.stem.removesuffix(".ome") for source in sources]
    return [[output / f"{stem}.tif", *[output / f"{stem}.png"] * picture] for stem in stems]


def _check(sources: list[Path], targets: list[list[Path]], *, overwrite: bool) -> None:
    """Refuse two results of one name, and files in the way."""
    of: dict[Path, Path] = {}
    labels = {source.resolve() for source in sources}
    for source, files in zip(sources, targets, strict=True):
        for file in files:
            if file in of:
                raise UserError(f"{of[file]} and {source} would both be written to {file}")
            if file.resolve() in labels:
                raise UserError(f"{file} is one of the labels: choose another output")
            if file.exists():
                check_free(file, None, overwrite=overwrite)
            of[file] = source


def _cells(ids: NDArray[Any], source: Path, ignore: int | None) -> tuple[NDArray[Any], bool]:
    """Return ids of cells (P, H, W) in a dtype of torch's, and whether they were numbered here."""
    void = np.zeros(ids.shape, np.bool_) if ignore is None else ids == ignore
    numbers = np.unique(np.where(void, 0, ids))
    if numbers[0] < 0:
        raise UserError(
            f"{source}: id {numbers[0]}: expected 0 or above; set the id to ignore, if it is that"
        )
    if len(numbers) - (0 in numbers) != 1:
        plain = ids.dtype.newbyteorder("=") if ignore is None else np.int64
        return np.ascontiguousarray(ids, plain), False
    pages = zip(ids, void, strict=True)
    cells = np.stack([instances((page != 0) & ~v, holes=0) for page, v in pages]).astype(np.int64)
    if ignore is not None:
        cells += (cells >= ignore) & (cells > 0)  # so that no cell has the number of void
        cells[void] = ignore
    return cells, True


def _separated(ids: torch.Tensor, ignore: int | None) -> torch.Tensor:
    """Separate cells from each other, not from what is ignored."""
    if ignore is None:
        return separate_touching(ids)
    void = ids == ignore
    return separate_touching(ids.masked_fill(void, 0)).masked_fill(void, ignore)
