"""A prediction from its options to its result: what was asked, the network, the images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from math import ceil, prod
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..devices import check_precision, choose
from ..geometry import GeometryError, input_frame
from ..geometry.glance import evaluating, first_tensor, glance, line, output_size
from ..nn import coarse_scores
from ..ops._checks import label_dtype
from .engine import Engine, TooLarge, empty
from .options import Asked, overlaps, wrong
from .plan import Plan, Traffic, Wish, blended, exact
from .progress import Progress
from .sources import Source
from .targets import ArrayTarget, Target, open_target

if TYPE_CHECKING:
    from ..data.normalise import Normalisation
    from ..data.resize import Resize
    from ..run import Run

__all__ = ["Job", "Result", "Work", "expected"]

_BUDGET = 2**30  # bytes on a CPU: larger tiles waste less, and gain less and less
_SHARE = 0.8  # of a GPU's free memory
_WORKSPACE = 1.5  # of the maps: what oneDNN and cuDNN need beside them, measured
_MOST_TILES = 16  # in a batch
_SAMPLED = 2**26  # pixels above which an image's percentiles are those of some of its rows
_SAMPLES, _SAMPLE_ROWS = 16, 32
_TURNED_AXES = 2
_PLANE = 2  # axes of images whose coarse scores can be upsampled
_CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


@dataclass(frozen=True)
class Job:
    """A network on its device, and what is wanted of it."""

    model: nn.Module
    asked: Asked
    device: torch.device
    dtype: torch.dtype
    precision: str
    normalisation: Normalisation | None = None
    resize: Resize | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module | Run | str | Path,
        asked: Asked,
        device: str | torch.device | None = None,
        precision: str | None = None,
    ) -> Job:
        """Bring a module, or a run's network, to its device.

        Raises:
            UserError: a run that cannot be opened, a device that is not there.
        """
        normalisation = resize = None
        if isinstance(model, nn.Module):
            where = choose(device or next(model.parameters(), torch.empty(0)).device)
            network = model.to(where)
        else:
            if isinstance(model, (str, Path)):
                from ..run import Run  # noqa: PLC0415 - a module alone needs torch only

                model = Run.open(model)
            where = choose(device or "auto")
            trained = "32" if model.precision == "16" and where.type != "cuda" else model.precision
            precision = precision or trained
            network, normalisation = model.network(where), model.normalisation
            resize = model.resize
        floating = (p.dtype for p in network.parameters() if p.is_floating_point())
        dtype = next(floating, torch.float32)
        chosen = check_precision(precision or "32", where)
        return cls(network, asked, where, dtype, chosen, normalisation, resize)

    def prepare(self, images: Sequence[Source], *, batched: bool) -> Work:
        """Plan images of one shape.

        Raises:
            ValueError: the network cannot be tiled exactly, or not within the memory.
        """
        shape = images[0].shape
        dims = len(shape) - 1
        if self.asked.tile != "auto":
            self.lengths(dims)
        if self.asked.augment and dims < _TURNED_AXES:
            raise wrong("augment", "two spatial axes at least with 'd4'", f"{dims}")
        probe = (shape[0], *self.lengths(dims)) if self.asked.blend else shape
        classes = _classes(self.model, (1, *probe), self.dtype, self.device)
        work = Work(self, tuple(images), batched, classes)
        work.plan = work.cut(self.asked.memory)
        return work

    def lengths(self, dims: int) -> tuple[int, ...]:
        """The tile that was asked for, an axis."""
        tile: Any = self.asked.tile
        lengths = tuple(map(int, [tile] * dims if isinstance(tile, Integral) else tile))
        if len(lengths) != dims:
            raise wrong("tile", f"an integer, or {dims} of them", tile)
        return lengths

    def budget(self, memory: int | None) -> int:
        """Bytes that may be used."""
        if memory is not None:
            return memory
        if self.device.type == "cuda":
            return int(torch.cuda.mem_get_info(self.device)[0] * _SHARE)
        return _BUDGET

    def digest(self) -> str:
        """What the network computes, by its layers and numbers."""
        options = [
            (name, key, value)
            for name, module in self.model.named_modules()
            for key, value in sorted(vars(module).items())
            if key != "training" and isinstance(value, (bool, int, float, str, tuple, list))
        ]
        found = hashlib.sha256(repr((self.model, options, self.normalisation)).encode())
        hidden = dict(self.model.named_buffers())  # those that are not saved count, too
        for name, value in {**hidden, **self.model.state_dict()}.items():
            found.update(name.encode())
            if isinstance(value, Tensor) and value.numel():
                flat = value.detach().cpu().contiguous().reshape(-1)
                found.update(flat.view(torch.uint8).numpy().data)
        return found.hexdigest()


@dataclass
class Work:
    """Images of one shape, their plan, and what comes out.

    Attributes:
        job: the network.
        images: each is predicted on its own.
        batched: whether the result has an axis that counts them.
        classes: channels of the scores.
        plan: the tiles.
    """

    job: Job
    images: tuple[Source, ...]
    batched: bool
    classes: int
    plan: Plan = field(init=False)

    @property
    def size(self) -> tuple[int, ...]:
        """Pixels of an image, an axis."""
        return tuple(self.images[0].shape[1:])

    @property
    def labels(self) -> bool:
        """Whether classes come out, not scores."""
        return self.job.asked.output == "labels"

    @property
    def dtype(self) -> torch.dtype:
        """Of the result."""
        if self.labels:
            return label_dtype(self.classes)
        return torch.float64 if self.job.dtype == torch.float64 else torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the result."""
        counted = (len(self.images),) * self.batched
        return (*counted, *((self.classes,) * (not self.labels)), *self.size)

    @property
    def axes(self) -> str:
        """A letter an axis of the result."""
        return "N" * self.batched + "C" * (not self.labels) + "ZYX"[3 - len(self.size) :]

    def cut(self, memory: int | None) -> Plan:
        """Choose the tiles.

        Raises:
            ValueError: as `Job.prepare`.
        """
        job, asked = self.job, self.job.asked
        shape = (1, *self.images[0].shape)
        tile = None if asked.tile == "auto" else job.lengths(len(self.size))
        try:
            if asked.blend and tile is not None:
                shared = overlaps(asked.overlap, tile)
                return blended(job.model, shape, tile, shared, asked.blend)
            wish = Wish(
                tile=tile,
                memory=job.budget(memory),
                most=memory or _available(job.device),
                strict=memory is not None,
                traffic=self._traffic(),
                turned=asked.augment is not None,
                margin=asked.margin,
                stride=1 if asked.stride is None else asked.stride,
            )
            return self._coarse(shape, wish) or exact(job.model, shape, wish)
        except GeometryError as error:
            raise ValueError(
                f"predict: model: {error}. Give more memory; or the margin, if you know it; or let "
                "overlapping tiles be averaged (blend='gaussian', tile=512, overlap=0.5)"
            ) from error

    def _coarse(self, shape: tuple[int, ...], wish: Wish) -> Plan | None:
        """Plan labels from coarse scores; None where the network or the tiles are not for that."""
        model, wanted = self.job.model, self.labels and not wish.turned
        if not wanted or len(self.size) != _PLANE or coarse_scores(model) is None:
            return None
        wish = replace(wish, traffic=self._traffic(coarse=True), method="coarse_scores")
        plan = exact(model, shape, wish)
        if plan.resizes is not None or output_size(model, (*shape[:2], *plan.tile)) != plan.tile:
            return None
        return replace(plan, coarse=True)

    def _traffic(self, *, coarse: bool = False) -> Traffic:
        image, job = self.images[0], self.job
        channels, element = image.shape[0], job.dtype.itemsize
        scores = self.dtype.itemsize if coarse else element * self.classes
        out = self.dtype.itemsize * (1 if self.labels else self.classes)
        return Traffic(
            workspace=_WORKSPACE,
            pixel=element * channels + scores * (2 if job.asked.augment else 1),
            row=prod(self.size[1:]) * 2 * (channels * image.dtype.itemsize + out),
        )

    def memory_for(self, peak: int) -> int:
        """Bytes that the image at once is reckoned to take, whose maps have `peak` bytes."""
        return self._traffic(coarse=self.plan.coarse).bytes(peak, self.size)

    def recipe(self) -> dict[str, Any]:
        """All that must be the same for a prediction to be resumed."""
        job, asked = self.job, asdict(self.job.asked)
        for name in ("batch", "memory"):  # of no account, but for the tile that was chosen
            asked.pop(name)
        asked["tile"] = self.plan.tile
        return {
            "image": hashlib.sha256(
                "".join(i.identity() for i in self.images).encode()
            ).hexdigest(),
            "model": job.digest(),
            "precision": job.precision,
            "device": job.device.type,
            **{k: list(v) if isinstance(v, tuple) else v for k, v in asked.items()},
        }

    def array(self, out: Any) -> ArrayTarget:
        """Let the result go into memory, or into whatever takes `out[...] = band`."""
        return ArrayTarget(
            out,
            shape=self.shape,
            dtype=_numpy(self.dtype),
            axes=self.axes,
            dims=len(self.size),
        )

    def file(self, path: Path, *, resume: bool, overwrite: bool) -> Target:
        """Let the result go into a TIFF or zarr; tiles that were begun with are gone on with."""
        return open_target(
            path,
            shape=self.shape,
            dtype=_numpy(self.dtype),
            axes=self.axes,
            dims=len(self.size),
            plan=self.recipe(),
            resume=resume,
            overwrite=overwrite,
        )

    def run(self, target: Any, show: Progress) -> None:
        """Predict all images into a target, and finish it."""
        for index, image in enumerate(self.images):
            part = target.part(index)
            show.advance(part.done * prod(self.size[1:]))
            self._one(image, part, show)
        target.finish()

    def _one(self, image: Source, part: Any, show: Progress) -> None:
        """Predict one image; by smaller tiles, if the device turns out to have less memory."""
        done: int | None = part.done
        while done is not None:
            done = self._some(image, part, done, show)

    def _some(self, image: Source, part: Any, done: int, show: Progress) -> int | None:
        """Predict from row `done` on; give the row to go on from with another plan, or None."""
        try:
            self._engine(image, show).run(self.plan, image, part, done)
        except TooLarge as error:
            refused = self.plan
            if self.job.asked.tile == "auto" and refused.peak:
                traffic = self._traffic(coarse=refused.coarse)
                self.plan = self.cut(traffic.bytes(refused.peak, refused.tile) // 2)
            if prod(self.plan.tile) >= prod(refused.tile):
                raise ValueError(
                    f"predict: tile: {refused.tile} does not fit into the memory of "
                    f"{self.job.device}"
                ) from error
            show.say(f"out of memory: going on with tiles of {_times(self.plan.tile)}")
            return error.done
        return None

    def _engine(self, image: Source, show: Progress) -> Engine:
        job = self.job
        scale, shift = self._terms(image)
        batch: Any = job.asked.batch
        if batch == "auto":
            batch = 1
            if job.device.type != "cpu" and self.plan.peak:
                room = job.budget(job.asked.memory) // ceil(_WORKSPACE * self.plan.peak)
                batch = max(1, min(_MOST_TILES, room))
        return Engine(
            job.model,
            job.device,
            job.dtype,
            job.precision,
            job.asked.output,
            job.asked.border,
            turned=job.asked.augment is not None,
            batch=batch,
            scale=scale,
            shift=shift,
            say=show.say,
            advance=show.advance,
        )

    def _terms(self, image: Source) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
        """What the normalisation multiplies by and adds, a channel.

        Of images above 2**26 pixels, 16 times 32 rows stand for all.
        """
        normalisation = self.job.normalisation
        if normalisation is None:
            return None, None
        rows = image.shape[1]
        if prod(self.size) <= _SAMPLED or rows <= _SAMPLES * _SAMPLE_ROWS:
            pixels = image.read(0, rows)
        else:
            starts = np.linspace(0, rows - _SAMPLE_ROWS, _SAMPLES).astype(int).tolist()
            pixels = np.concatenate([image.read(s, s + _SAMPLE_ROWS) for s in starts], axis=1)
        offset, scale = normalisation.terms(pixels.reshape(len(pixels), -1))
        return tuple((1 / scale).tolist()), tuple((-offset / scale).tolist())


def expected(model: nn.Module) -> tuple[int | None, int]:
    """Channels (None: unknown) and number of spatial axes that a network takes.

    Its attributes `in_channels` and `dims` say so, else its first convolution.
    """
    convolutions = (module for module in model.modules() if isinstance(module, _CONVOLUTIONS))
    first = next(convolutions, None)
    channels = getattr(model, "in_channels", getattr(first, "in_channels", None))
    dims = getattr(model, "dims", first.weight.dim() - 2 if first is not None else 2)
    return channels, dims


class Result:
    """Memory of its own for a result; a single band's memory is taken as it comes."""

    def __init__(self, work: Work) -> None:
        self.work, self.done = work, 0
        self.tensor: Tensor | None = None
        self.target: ArrayTarget | None = None
        if work.batched or len(work.plan.cuts[0]) > 1:
            self._allocate()

    def _allocate(self) -> ArrayTarget:
        self.tensor = empty(self.work.shape, self.work.dtype)
        self.target = self.work.array(self.tensor)
        return self.target

    def part(self, index: int) -> Any:
        """One of the images."""
        return self if self.target is None else self.target.part(index)

    def room(self, start: int, stop: int) -> Tensor | None:
        """See `Target`."""
        return None if self.target is None else self.target.room(start, stop)

    def write(self, start: int, band: NDArray[Any]) -> None:
        """See `Target`; a plan of one band may have been given up for one of several."""
        if band.shape == self.work.shape:
            self.tensor = torch.from_numpy(band)
        else:
            (self.target or self._allocate()).write(start, band)

    def finish(self) -> None:
        """Nothing is left to do."""

    def filled(self) -> Tensor:
        """The result, after all bands were written."""
        if self.tensor is None:
            raise ValueError("predict: expected bands that were written, got none")
        return self.tensor


def _classes(
    model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> int:
    """Channels of the scores: by shapes alone, or, of networks that hide them, from zeros."""
    size = shape[2:]
    try:
        frames = input_frame(model, shape)
        size = tuple(n + f.before + f.after for n, f in zip(size, frames, strict=True))
        seen = glance(model, (*shape[:2], *size))
    except GeometryError:
        seen = None
    if seen:
        scores = seen.output
    else:
        with evaluating(model), torch.inference_mode():
            x = torch.zeros((*shape[:2], *size), dtype=dtype, device=device)
            try:
                scores = tuple(first_tensor(model(x)).shape)
            except RuntimeError as error:
                raise ValueError(
                    "predict: model: it runs neither at the image's shape "
                    f"{shape} nor at larger ones: {line(error)[:200]}"
                ) from error
    if len(scores) != len(shape):
        raise ValueError(f"predict: model: expected scores (N, K, *S), got shape {scores}")
    return scores[1]


def _available(device: torch.device) -> int:
    """Bytes that can be had at all."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _SHARE)
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 2 * _BUDGET
    return int(free * 2**10 * _SHARE)


def _times(lengths: Sequence[int]) -> str:
    return " x ".join(map(str, lengths))


def _numpy(dtype: torch.dtype) -> np.dtype[Any]:
    return torch.empty(0, dtype=dtype).numpy().dtype
