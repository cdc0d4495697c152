"""Predicting files: what there is, what is made of it, and how a killed prediction goes on."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from tifffile import PHOTOMETRIC
from torch import Tensor

from . import ops
from .data.files import (
    _as_image,
    _opened,
    _Tiff,
    image_header,
    read_image,
    write_labels,
    write_scores,
)
from .data.pairs import _natural, find_images, number
from .data.resize import restored
from .devices import threads as use_threads
from .errors import UserError
from .journal import JOURNAL, Journal, staged, state_of
from .objects import REACH
from .objects import instances as find_instances
from .run import Run
from .tiling.job import Job, Result, Work
from .tiling.options import Asked
from .tiling.progress import Progress
from .tiling.sources import _ZARR_FILES, Source, resized, sources, zarr_module
from .tiling.targets import Part, Target, open_target

__all__ = ["Prediction", "predict_files", "prepare"]

Growth: TypeAlias = Literal["gaps", "everywhere", "none"]

_LARGE = 2**28  # bytes of decoded pixels from which on a file is read and written by bands
_LARGE_SCORES = 2**30  # or of scores that are to be written
_TWO = 2  # classes
_MOST_SHORT = 2**16 - 1  # objects that uint16 numbers
_TIFF, _ZARR = (".tif", ".tiff"), ".zarr"


def predict_files(
    run: Run | str | Path,
    images: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    scores: bool = False,
    probabilities: bool = False,
    instances: bool = False,
    smallest: int = 1,
    holes: int | None = None,
    grow: Growth | None = None,
    reach: float = REACH,
    tile: int | Sequence[int] | Literal["auto"] = "auto",
    memory: int | str | None = None,
    batch: int | Literal["auto"] = "auto",
    augment: Literal["d4"] | None = None,
    border: Literal["mirror", "symmetric", "edge", "constant"] = "mirror",
    blend: Literal["gaussian", "hann"] | None = None,
    overlap: float | Sequence[int] | None = None,
    overwrite: bool = False,
    resume: bool = False,
    device: str = "auto",
    precision: str | None = None,
    threads: int | None = None,
    progress: bool = False,
) -> list[Path]:
    """Segment image files with a run's best weights; write label files like those it learned from.

    The files have the images' names, ``.png`` in place of ``.jpg`` and ``.tif`` in place of
    ``.ome.tif``; a stack's pages are predicted one by one. All names, channels, plans and the
    folder are checked before anything is written.

    Files whose pixels, decoded, have 256 MiB or more, or whose scores that are to be written have
    1 GiB, and zarr, are read, predicted and written by bands of rows, as `segfuse.predict` does, to
    tiled BigTIFF (``.tif``) or, of a zarr, to zarr: labels coded alike, but without a palette.

    Args:
        run: or the path of its folder.
        images: files (PNG, JPEG, TIFF, zarr arrays, OME-Zarr images), and folders whose images are
            all taken.
        output: the folder for the results, made if missing; or of a single image the file of its
            labels, ".tif", ".tiff", ".zarr" or, if it is not large, ".png".
        scores: write ``<name>_scores.tif`` too, float32, (pages, classes, H, W); ``.zarr`` where
            the labels are.
        probabilities: likewise ``<name>_probabilities.tif``, the softmax of the scores. All results
            come of one pass, but with `blend` or `augment`, whose scores are averaged another way.
        instances: of a run of two classes, write the ids of the foreground's objects, page by page,
            each with ids of its own, as `segfuse.instances` finds them: uint16, from 65,536 objects
            on uint32, which a PNG does not hold. Not of images that are predicted by bands, as the
            components of an image are known when all of it is. It takes up to 33 bytes a pixel of
            a page besides `memory`.
        smallest: with `instances`: objects of fewer pixels are dropped.
        holes: with `instances`: background that one object encloses is given to it where it has at
            most so many pixels; None: whatever its size.
        grow: with `instances`: "gaps" gives the background between two objects to them, which a
            training with separated contacts leaves; "everywhere" all around them; "none" nothing.
            None: "gaps" of a run of objective "touching", else "none".
        reach: with `grow`: pixels.
        tile: the network's input size, as of `segfuse.predict`.
        memory: bytes for the network and the bands, likewise.
        batch: tiles that are computed together.
        augment: "d4" averages eight turned and mirrored copies.
        border: how the image is continued: "mirror", "symmetric", "edge" or "constant".
        blend: "gaussian" or "hann", for networks that look everywhere; with tile and overlap.
        overlap: with `blend`, a share of the tile below 1, or pixels.
        overwrite: replace files that are there, and begin anew what was interrupted.
        resume: go on with what was interrupted: finished files are kept, large ones go on where
            they stopped, and the results are the same to the bit. With `overwrite` what cannot be
            gone on with is begun anew. If nothing was begun, begin.
        device: "auto", "cpu", "cuda", "cuda:N".
        precision: "32", "bf16", "16" (CUDA only) or "auto"; None: as in training, where it can be.
        threads: CPU threads, None as torch has them.
        progress: show a bar; needs rich.

    Returns:
        The files of results, those that were kept among them.

    Raises:
        UserError: a file that cannot be read or has another number of channels, one that would be
            overwritten, two of one name; a folder that cannot be written to; a damaged run; with
            `resume`, a run, an option or a finished image that has changed.
        ValueError: options out of their range, or a network that cannot be tiled so.

    Limits:
        Until all is done, the journal ``.segfuse-predict.json`` beside the results tells what is
        finished; one process at a time predicts into a folder.
    """
    prediction = prepare(
        run,
        images,
        output,
        asked=Asked(
            border=border,
            tile=tile,
            memory=memory,
            batch=batch,
            blend=blend,
            overlap=overlap,
            augment=augment,
        ),
        scores=scores,
        probabilities=probabilities,
        objects=Objects.of(
            instances=instances, smallest=smallest, holes=holes, grow=grow, reach=reach
        ),
        overwrite=overwrite,
        resume=resume,
        device=device,
        precision=precision,
        threads=threads,
    )
    return prediction.run(progress=progress)


@dataclass(frozen=True)
class Objects:
    """How objects are made of a class map: the arguments of `segfuse.instances`.

    Attributes:
        grow: "none" is their None; None is as the run was trained.
    """

    smallest: int
    holes: int | None
    grow: Growth | None
    reach: float

    @classmethod
    def of(
        cls,
        *,
        instances: bool,
        smallest: int,
        holes: int | None,
        grow: Growth | None,
        reach: float,
    ) -> Objects | None:
        """Check the options of `predict_files`; None without instances.

        Raises:
            UserError: options that need `instances`.
            ValueError, TypeError: as `segfuse.instances`.
        """
        if not instances:
            for name, given in [
                ("smallest", smallest != 1),
                ("holes", holes is not None),
                ("grow", grow),
                ("reach", reach != REACH),
            ]:
                if given:
                    raise UserError(f"{name} goes with instances only")
            return None
        objects = cls(smallest, holes, grow, reach)
        objects.find(np.zeros((1, 1), np.uint8))
        return objects

    def of_run(self, run: Run) -> Objects:
        """As a run was trained, where nothing else was asked for."""
        touching = run.config.get("training", {}).get("objective") == "touching"
        grow = self.grow or ("gaps" if touching else "none")
        if grow == "none" and self.reach != REACH:
            raise UserError("reach goes with grow only")
        return replace(self, grow=grow)

    def find(self, labels: NDArray[Any]) -> NDArray[np.int32]:
        """Number the objects of a page (H, W)."""
        grow = None if self.grow == "none" else self.grow
        return find_instances(
            labels, smallest=self.smallest, holes=self.holes, grow=grow, reach=self.reach
        )

    def write(self, path: Path, labels: NDArray[Any]) -> None:
        """Write the ids of the objects of pages (P, H, W), 0 being background."""
        pages = np.stack([self.find(page) for page in labels])
        most = int(pages.max())
        if most > _MOST_SHORT and path.suffix.lower() == ".png":
            raise UserError(
                f"{path}: {most:,} objects, where a PNG holds {_MOST_SHORT:,}: drop small ones "
                "(smallest), or write the image's labels to a .tif"
            )
        write_labels(path, pages.astype(np.uint16) if most <= _MOST_SHORT else pages)


@dataclass(frozen=True)
class _File:
    """An image, and what is made of it.

    Attributes:
        path: a file, or the folder of a zarr.
        pages: images in it.
        shape: of each as the network sees it, (C, H, W).
        dtype: as it is given to the normalisation.
        streamed: whether it is read and written by bands.
        results: files to write, by what they hold: labels, scores, probabilities.
    """

    path: Path
    pages: int
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    streamed: bool
    results: dict[str, Path]

    @property
    def pixels(self) -> int:
        return self.pages * prod(self.shape[1:])


def prepare(
    run: Run | str | Path,
    images: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    asked: Asked,
    scores: bool = False,
    probabilities: bool = False,
    objects: Objects | None = None,
    overwrite: bool = False,
    resume: bool = False,
    device: str = "auto",
    precision: str | None = None,
    threads: int | None = None,
) -> Prediction:
    """Check all that `predict_files` needs, and plan; nothing is written.

    Raises:
        UserError, ValueError: as `predict_files`.
    """
    run = Run.open(run) if isinstance(run, (str, Path)) else run
    output = Path(output)
    if objects is not None and run.coding.classes != _TWO:
        raise UserError(
            f"{run.path} tells {run.coding.classes} classes apart: expected 2 for instances, "
            "background and foreground; predict classes, and let segfuse.instances find the "
            "objects of one"
        )
    objects = objects and objects.of_run(run)
    kinds = ["labels", *["scores"] * scores, *["probabilities"] * probabilities]
    with use_threads(threads):
        job = Job.of(run, asked, device, precision)
        paths = _find([images] if isinstance(images, (str, Path)) else images)
        single = output.suffix.lower() in {".png", *_TIFF, _ZARR} and not (
            output.is_dir() and output.suffix.lower() != _ZARR
        )
        if single and len(paths) > 1:
            raise UserError(f"{output} is to hold {len(paths)} images: name a folder")
        files = [_described(path, run, output, kinds, single=single) for path in paths]
        streamed = [file.path for file in files if file.streamed]
        if streamed and objects is not None:
            raise UserError(
                f"{streamed[0]} would be predicted by bands, as zarr, images of 256 MiB and more, "
                "and scores of 1 GiB and more are: instances need the whole label map in memory; "
                "predict classes, and let segfuse.instances find the objects, a part at a time"
            )
        if streamed and job.resize is not None:
            raise UserError(
                f"{streamed[0]} would be predicted by bands, as zarr, images of 256 MiB and more, "
                "and scores of 1 GiB and more are: a run that resizes images needs the whole in "
                "memory"
            )
        if streamed:
            zarr_module("a large image")
        hidden = f".{output.name}.{JOURNAL}" if single else f".{JOURNAL}"
        journal = Journal(
            (output.parent if single else output) / hidden,
            {
                "model": job.digest(),
                "precision": job.precision,
                "device": job.device.type,
                "results": kinds,
                "instances": objects and asdict(objects),
                **({"resize": job.resize.plain()} if job.resize is not None else {}),
                **_plain({k: v for k, v in asdict(asked).items() if k not in {"output", "batch"}}),
            },
        )
        _check_names(files)
        journal.open(files, resume=resume, overwrite=overwrite)
        prediction = Prediction(
            run, job, files=files, kinds=kinds, objects=objects, journal=journal, threads=threads
        )
        prediction.plan()
    return prediction


class Prediction:
    """Files that are to be predicted: checked and planned.

    Attributes:
        files: in the order in which they are predicted.
        journal: tells which of them are finished.
        pixels: that `run` predicted, or is to predict.
        seconds: that it took.
    """

    def __init__(
        self,
        run: Run,
        job: Job,
        *,
        files: Sequence[_File],
        kinds: Sequence[str],
        objects: Objects | None,
        journal: Journal,
        threads: int | None,
    ) -> None:
        self._objects = objects
        self.files, self.journal = files, journal
        self.pixels, self.seconds = 0, 0.0
        self._run, self._threads, self._job = run, threads, job
        self._passes = _passes(kinds, job.asked)
        self._jobs = {
            output: replace(job, asked=replace(job.asked, output=output)) for output in self._passes
        }
        self._works: dict[tuple[str, tuple[int, ...], str], Work] = {}

    @property
    def left(self) -> list[_File]:
        """Files that are not finished."""
        return [file for file in self.files if file.path not in self.journal.finished]

    def plan(self) -> None:
        """Find the tiles for each size of image, the largest first; see which files are finished.

        Raises:
            UserError: a large result that is not of this prediction.
            ValueError: a network that cannot be tiled so.
        """
        for file in sorted(self.left, key=lambda f: prod(f.shape), reverse=True):
            for output in self._passes:
                self._work(output, [file], batched=False)
        if self.journal.resumed and not self.journal.overwrite:
            for file in self.left:
                if file.streamed and self._is_finished(file):
                    self.journal.finished.add(file.path)

    def _is_finished(self, file: _File) -> bool:
        """Whether large results are there, which tell themselves what they are of."""
        there = [p for p in file.results.values() if p.exists() and not staged(p).exists()]
        if not there:
            return False
        images, batched = _lazily(file.path, self._run.channels)
        for output, kinds in self._passes.items():
            work = self._work(output, images, batched=batched)
            for kind in kinds:
                if file.results[kind] in there:
                    self._target(file.results[kind], kind, work).close()
        return len(there) == len(file.results)

    def sentence(self) -> str:
        """What will be done: files and pixels, and of tiled ones how many tiles of which size."""
        left = self.left
        at_once = 0
        tiles: dict[tuple[int, ...], list[float]] = defaultdict(lambda: [0, 0, 0.0, 0.0])
        for file in left:
            plan = self._work(next(iter(self._passes)), [file], batched=False).plan
            if plan.count == 1:
                at_once += 1
                continue
            work = float(file.pages * plan.count * prod(plan.tile))
            group = tiles[plan.tile]
            for i, more in enumerate((1, file.pages * plan.count, work, work * plan.wasted)):
                group[i] += more
        ways = [f"{at_once:,} whole"] * (at_once > 0)
        ways += [
            f"{files:,.0f} by {count:,.0f} tiles of {' x '.join(f'{n:,}' for n in tile)}, "
            f"{wasted / work:.1%} of the work is overlap"
            for tile, (files, count, work, wasted) in tiles.items()
        ]
        kept = len(self.files) - len(left)
        head = f"{number(len(left), 'file')}, {megapixels(sum(f.pixels for f in left))}"
        if kept:
            head += f", {kept:,} finished before"
        copies = ["8 turned and mirrored copies of each"] if self._job.asked.augment else []
        rounds = [f"{len(self._passes)} passes"] * (len(self._passes) > 1)
        machine = f"on {self._job.device}, precision {self._job.precision}"
        return "; ".join([head, *ways, *copies, *rounds, machine])

    def run(self, *, progress: bool = False) -> list[Path]:
        """Predict and write the files; give the names of all results.

        Raises:
            UserError: as `predict_files`. What is finished is kept, to be resumed from.
        """
        began, left = time.monotonic(), self.left
        self.pixels = sum(file.pixels for file in left)
        with (
            use_threads(self._threads),
            self.journal.held(),
            Progress(self.pixels * len(self._passes), shown=progress) as show,
        ):
            for file in left:
                state = state_of(file.path)
                (self._stream if file.streamed else self._read)(file, show)
                self.journal.finish(file, state)
        self.seconds = time.monotonic() - began
        return [path for file in self.files for path in file.results.values()]

    def _read(self, file: _File, show: Progress) -> None:
        """Predict a file that is read and written whole."""
        pages = read_image(file.path)
        images, _ = sources(pages, axes="NCYX", channels=self._run.channels, dims=2)
        resize, size = self._job.resize, pages.shape[2:]
        if resize is not None:
            images = resized(images, resize)
        for output, kinds in self._passes.items():
            work = self._work(output, images, batched=True)
            result = Result(work)
            work.run(result, show)
            computed = result.filled().numpy()
            for kind in kinds:
                turn = self._turn(kind, output)
                values = np.stack([turn(page) for page in computed])
                if resize is not None:
                    values = restored(values, size, scores=kind != "labels")
                if kind == "labels" and self._objects is not None:
                    self._objects.write(file.results[kind], values)
                elif kind == "labels":
                    palette = self._run.coding.palette
                    write_labels(file.results[kind], values, palette=palette)
                else:
                    write_scores(file.results[kind], values)

    def _stream(self, file: _File, show: Progress) -> None:
        """Predict a file by bands of rows."""
        images, batched = _lazily(file.path, self._run.channels)
        for output, kinds in self._passes.items():
            work = self._work(output, images, batched=batched)
            with ExitStack() as opened:
                targets = []
                for kind in kinds:
                    target = self._target(file.results[kind], kind, work)
                    targets.append(opened.enter_context(closing(target)))
                turns = [self._turn(kind, output) for kind in kinds]
                result = _Targets(targets, turns, work.size[0])
                if output == next(iter(self._passes)):
                    self.pixels -= result.done * work.size[1]  # from before
                work.run(result, show)

    def _target(self, path: Path, kind: str, work: Work) -> Target:
        labels = kind == "labels"
        return open_target(
            path,
            shape=(*[len(work.images)] * work.batched, *[work.classes] * (not labels), *work.size),
            dtype=np.uint8 if labels else np.float32,
            axes="N" * work.batched + "C" * (not labels) + "YX",
            dims=2,
            plan={**work.recipe(), "coding": self._run.coding.kind},
            resume=self.journal.resumed,
            overwrite=self.journal.overwrite,
        )

    def _turn(self, kind: str, output: str) -> Callable[[NDArray[Any]], NDArray[Any]]:
        """What makes labels (H, W), as files hold them, or scores (K, H, W) of a pass's output."""

        def turned(computed: NDArray[Any]) -> NDArray[Any]:
            if kind == "labels":
                ids = computed if output == "labels" else _argmax(computed)
                return self._run.coding.decode(ids)
            if kind == output:
                return computed
            return np.asarray(torch.from_numpy(computed).softmax(0).numpy())

        return turned

    def _work(self, output: str, images: Sequence[Any], *, batched: bool) -> Work:
        """Work on images of one shape, or on a `_File` that stands for its own; planned once."""
        image = images[0]
        key = output, tuple(image.shape), image.dtype.name
        if key not in self._works:
            self._works[key] = self._jobs[output].prepare([image], batched=False)
        known = self._works[key]
        return _alike(known, images, batched=batched)


def megapixels(pixels: int) -> str:
    """Say 1,234 Mpx, 12.3 Mpx or 0.00173 Mpx."""
    millions = pixels / 1e6
    return f"{millions:,.0f} Mpx" if millions >= 100 else f"{millions:.3g} Mpx"  # noqa: PLR2004


def _alike(known: Work, images: Sequence[Any], *, batched: bool) -> Work:
    work = Work(known.job, tuple(images), batched, known.classes)
    work.plan = known.plan
    return work


def _passes(kinds: Sequence[str], asked: Asked) -> dict[str, list[str]]:
    """What is to be computed, and which files come of it.

    The softmax of blended scores, or of scores averaged over turned copies, is not what `predict`
    gives as probabilities; and of turned copies, labels are those of the highest probability.
    """
    origin = {
        "scores": "scores",
        "probabilities": "probabilities" if asked.blend or asked.augment else "scores",
        "labels": "probabilities" if asked.augment else "scores",
    }
    found: dict[str, list[str]] = {}
    for kind in kinds:
        if kind != "labels":
            found.setdefault(origin[kind], []).append(kind)
    found.setdefault(origin["labels"] if origin["labels"] in found else "labels", []).insert(
        0, "labels"
    )
    return found


def _argmax(scores: NDArray[Any]) -> NDArray[Any]:
    """Class ids (H, W) of scores (K, H, W), ties as in all of `predict`."""
    tiles, corners = torch.from_numpy(scores)[None], torch.zeros(1, 2, dtype=torch.int64)
    return np.asarray(ops.stitch_tiles(tiles, corners, scores.shape[1:], argmax=True).numpy())


class _Targets:
    """The files of one pass: of each band, each takes the rows that it lacks, turned its way."""

    def __init__(
        self,
        targets: Sequence[Target],
        turns: Sequence[Callable[[NDArray[Any]], NDArray[Any]]],
        rows: int,
    ) -> None:
        self.done = min(target.done for target in targets)
        self._targets, self._turns, self._rows = targets, turns, rows
        self._at = [target.done for target in targets]

    def room(self, start: int, stop: int) -> Tensor | None:  # noqa: ARG002
        return None

    def write(self, start: int, band: NDArray[Any]) -> None:
        stop = start + band.shape[-2]
        for i, (target, turn) in enumerate(zip(self._targets, self._turns, strict=True)):
            begin = max(start, self._at[i])
            if begin < stop:
                target.write(begin, turn(band[..., begin - start :, :]))
                self._at[i] = stop

    def finish(self) -> None:
        for target in self._targets:
            target.finish()

    def close(self) -> None:
        for target in self._targets:
            target.close()

    def part(self, image: int) -> Part:
        return Part(self, image * self._rows, self._rows)


# Which files there are, and what their results are called.


def _find(given: Sequence[str | Path]) -> list[Path]:
    """Images, and those of folders, each once."""
    found = [path for source in given for path in _within(Path(source))]
    if not found:
        raise UserError("images: expected files or folders, got none")
    return list({path.resolve(): path for path in reversed(found)}.values())[::-1]


def _within(path: Path) -> list[Path]:
    """Pictures and zarrs of a folder, or the one that is named."""
    if not path.is_dir():
        return find_images(path)
    if _is_zarr(path):
        return [path]
    try:
        zarrs = [e for e in path.iterdir() if not e.name.startswith(".") and _is_zarr(e)]
    except OSError:
        zarrs = []
    try:
        pictures = find_images(path)
    except UserError:
        if not zarrs:
            raise
        pictures = []
    return sorted([*pictures, *zarrs], key=_natural)


def _is_zarr(path: Path) -> bool:
    return any((path / name).is_file() for name in _ZARR_FILES)


def _described(path: Path, run: Run, output: Path, kinds: Sequence[str], *, single: bool) -> _File:
    """Read an image's header, and name its results."""
    if path.is_dir():
        images, _ = _lazily(path, run.channels)
        pages, shape, dtype = len(images), images[0].shape, images[0].dtype
    else:
        pages, *sizes, name = image_header(path)
        shape, dtype = tuple(sizes), np.dtype(name)
    channels, height, width = shape
    if channels != run.channels:
        raise UserError(
            f"{path}: expected {run.channels} channels, as {run.path} was trained on, "
            f"got {channels}"
        )
    pixels = pages * height * width
    numbers = run.coding.classes * (len(kinds) > 1)
    large = pixels * channels * dtype.itemsize >= _LARGE or pixels * numbers * 4 >= _LARGE_SCORES
    labels = output if single else output / _label_name(path, pages, large=large)
    suffix = labels.suffix.lower()
    streamed = large or path.is_dir() or suffix == _ZARR
    if suffix == ".png" and (streamed or pages > 1):
        raise UserError(f"{labels}: {path} is too large for a PNG: name a .tif or .zarr")
    if run.resize is not None:
        height, width = run.resize.target(height, width)
    results = {"labels": labels}
    for kind in kinds[1:]:
        ending = _ZARR if suffix == _ZARR else ".tif"
        results[kind] = labels.with_name(f"{_stem(labels)}_{kind}{ending}")
    return _File(path, pages, (channels, height, width), dtype, streamed, results)


def _label_name(path: Path, pages: int, *, large: bool) -> str:
    if path.is_dir():
        return _stem(path) + _ZARR
    kind, png = path.suffix.lower(), not large and pages == 1
    if kind in _TIFF or (kind == ".png" and png):
        return _stem(path) + path.suffix
    return _stem(path) + (".png" if png else ".tif")


def _stem(path: Path) -> str:
    return path.stem.removesuffix(".ome")  # what is written has other metadata


def _check_names(files: Sequence[_File]) -> None:
    """Refuse two results of one name, and a result in an image's place."""
    of: dict[Path, Path] = {}
    images = {file.path.resolve() for file in files}
    for file in files:
        for target in file.results.values():
            if target in of:
                raise UserError(f"{of[target]} and {file.path} would both be predicted to {target}")
            if target.resolve() in images:
                raise UserError(f"{target} is an image to predict: choose another output folder")
            of[target] = file.path


# Large images, opened so that they give the pixels that `read_image` would.


def _lazily(path: Path, channels: int) -> tuple[list[Source], bool]:
    """The pages of a file, and whether they are counted."""
    if path.is_dir() or _is_plain_tiff(path):
        opened, batched = sources(path, axes=None, channels=channels, dims=2)
    else:
        pages = read_image(path)
        opened, _ = sources(pages, axes="NCYX", channels=channels, dims=2)
        batched = len(pages) > 1
    return [_AsRead(source, path) for source in opened], batched


def _is_plain_tiff(path: Path) -> bool:
    with _opened(path) as picture:
        return isinstance(picture, _Tiff) and picture.first.photometric != PHOTOMETRIC.PALETTE


class _AsRead:
    """An image in a dtype that `read_image` gives: uint8, uint16 or float32, all finite."""

    def __init__(self, source: Source, path: Path) -> None:
        self._source, self._path = source, path
        self.shape = source.shape
        self.dtype = _as_image(np.empty(0, source.dtype)).dtype
        self.direct = source.direct and self.dtype == source.dtype

    def read(self, start: int, stop: int) -> NDArray[Any]:
        rows = _as_image(self._source.read(start, stop))
        if rows.dtype == np.float32 and not np.isfinite(rows).all():
            raise UserError(f"{self._path} holds NaN, infinity or numbers beyond float32")
        return rows

    def identity(self) -> str:
        return sha256(f"{state_of(self._path)} {self._source.identity()}".encode()).hexdigest()


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives them back."""
    found: dict[str, Any] = json.loads(json.dumps(values))
    return found
