"""FCN from coarse to fine: 32s, from it 16s, from that 8s, each a run folder of its own.

    stages.toml          which stages there are, and what they are trained on and how
    fcn32s/, fcn16s/, fcn8s/   run folders
    stages.csv           each stage's figures of the held-out pictures
    stages.png           the same few of them: image, each stage's prediction, truth

Long, Shelhamer, Darrell, CVPR 2015, Section 4.2 and table 2.
"""

from __future__ import annotations

import csv
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from . import pictures, training
from . import run as folder
from .course import FIGURES, Validation
from .data.patches import Picture
from .devices import choose
from .devices import threads as use_threads
from .errors import UserError
from .files import whole
from .options import STRIDES
from .prediction import predict
from .preparation import HUBS, Prepared, prepare
from .run import Run

__all__ = ["Stages", "fit_stages", "is_stages", "judged", "resume"]

_SCENES, _SHOWN = 4, 512  # of stages.png, at most; pixels a side of each
_COLUMNS = ("stage", "steps", "seconds", *FIGURES)
_WORDS = {"file", "block", *HUBS}  # in place of paths, whatever a folder holds


def fit_stages(
    images: str | Path,
    labels: str | Path,
    output: str | Path,
    *,
    model: str = "fcn8s",
    overwrite: bool = False,
    progress: bool = False,
    **options: Any,
) -> Stages:
    """Train an FCN from coarse to fine, a run folder a stage in a folder of stages.

    FCN-32s is trained first, then the next finer one from its best weights (`FCN.from_coarser`).
    All stages have the same pictures held out and the same options, and each has the whole budget.
    `segfuse.resume` goes on with what was stopped, and `segfuse.predict` takes the folder for the
    finest stage that is finished.

    Args:
        images: as of `segfuse.fit`, like all that is not named below.
        labels: likewise; some must be held out for validation.
        output: the folder of stages.
        model: "fcn16s" or "fcn8s", the last stage.
        overwrite: take a folder that holds files; an earlier run's are removed.
        progress: show a bar; needs rich.
        options: of `segfuse.fit`. `learning_rate` is every stage's; where it is not given, FCN's
            own solvers lower it from stage to stage. `pretrained` is the first stage's start.

    Raises:
        UserError: as `segfuse.fit`; another model; `coarser` or `at_once`, which do not go with
            stages; nothing held out; files that changed between stages.
        TypeError: an option that `segfuse.fit` does not have.
        SystemExit: see `segfuse.fit`.
    """
    stages = Stages.begin(
        images=images, labels=labels, output=output, model=model, overwrite=overwrite, **options
    )
    for _ in stages.train(progress=progress):
        pass
    return stages


def resume(path: str | Path, *, device: str | None = None, progress: bool = False) -> Run | Stages:
    """Go on with a training that was stopped: of a run folder, or of a folder of stages.

    A run goes on from its last checkpoint, see `training.resume`; stages go on with the one that
    was stopped, and those that are finished are left as they are.

    Args:
        path: the folder.
        device: "auto", "cpu", "cuda", "cuda:N"; None: as the training was begun.
        progress: show a bar; needs rich.

    Returns:
        what `segfuse.fit` or `segfuse.fit_stages` would have.

    Raises:
        UserError, SystemExit: see `training.resume`.
    """
    if not is_stages(path):
        return training.resume(path, device=device, progress=progress)
    stages = Stages.open(path)
    for _ in stages.train(device=device, progress=progress):
        pass
    return stages


def is_stages(path: str | Path) -> bool:
    """Whether a folder holds stages, and is not a run folder itself."""
    return not (Path(path) / folder.CONFIG).exists() and (Path(path) / folder.STAGES).exists()


@dataclass(frozen=True)
class Stages:
    """A training in stages, begun or to be begun.

    Attributes:
        path: the folder.
        names: of the stages' models and folders, the coarsest first.
        arguments: of `training.fit`, without model, output and coarser.
        fresh: nothing is written yet, and what the folder holds of an earlier run will be removed.
    """

    path: Path
    names: tuple[str, ...]
    arguments: dict[str, Any]
    fresh: bool = False

    @classmethod
    def begin(
        cls, *, output: str | Path, model: str, overwrite: bool = False, **given: Any
    ) -> Stages:
        """Check what `fit_stages` takes, all but what the first stage's `fit` will check.

        Raises:
            UserError, TypeError: see `fit_stages`.
        """
        names = tuple(name for name in STRIDES if STRIDES[name] >= STRIDES.get(model, 32))
        if len(names) == 1:
            raise UserError(f"model: expected fcn16s or fcn8s for stages, got {model}")
        for name in ("coarser", "at_once"):
            if given.get(name):
                raise UserError(f"{name}: does not go with stages, which start from each other")
        if given.get("validation") == 0 and given.get("split", "file") in {"file", "block"}:
            raise UserError("validation: stages are compared by pictures held out: expected some")
        try:
            inspect.signature(training.fit).bind(output=output, **given)
        except TypeError as error:
            raise TypeError(f"fit_stages: {error}") from error
        arguments = {**_defaults(), **given}
        arguments.pop("coarser", None)
        arguments.pop("progress", None)
        for name in ("images", "labels", "pretrained", "colours", "split"):
            value = arguments[name]
            if value is not None and value not in _WORDS and Path(value).exists():
                arguments[name] = str(Path(value).absolute())
        folder.check_free(Path(output), overwrite=overwrite)
        return cls(Path(output).absolute(), names, arguments, fresh=True)

    @classmethod
    def open(cls, path: str | Path) -> Stages:
        """Read the file of a folder of stages.

        Raises:
            UserError: it is not there or damaged.
        """
        path = Path(path)
        config = folder.read_config(path, folder.STAGES)
        try:
            names, arguments = tuple(config["stages"]), dict(config["arguments"])
            strange = {*names} - {*STRIDES} or {*arguments} - {*_defaults(), "images", "labels"}
        except (KeyError, TypeError, ValueError) as error:
            raise folder.damaged(path / folder.STAGES, error) from error
        if strange or not {"images", "labels"} <= arguments.keys() or not names:
            what = (
                f"{min(strange)} is unknown" if strange else "images, labels or stages are missing"
            )
            raise folder.damaged(path / folder.STAGES, ValueError(what))
        return cls(path.absolute(), names, {**_defaults(), **arguments})

    def train(self, *, device: str | None = None, progress: bool = False) -> Iterator[Run]:
        """Train the stages that are not finished, and give each stage's run when it is.

        Args:
            device: of what is trained now; None: as it was begun.
            progress: show a bar; needs rich.

        Raises:
            UserError, SystemExit: see `fit_stages`.
        """
        arguments = {**self.arguments, **({"device": device} if device else {})}
        prepared = None
        if self.fresh:  # what is refused is refused before anything is written
            prepared = _prepared(arguments, self.names[0], None)
        with folder.locked(self.path):
            if self.fresh:
                self._claim()
                object.__setattr__(self, "fresh", False)
            runs: list[Run] = []
            for name in self.names:
                path, run = self.path / name, self._finished(name)
                new = run is None
                if run is None and (path / folder.CONFIG).exists() and _is_begun(path):
                    run = training.resume(path, device=device, progress=progress)
                elif run is None:
                    prepared = prepared or _prepared(arguments, name, runs[-1] if runs else None)
                    with folder.locked(path):
                        run = training.train(prepared, path, overwrite=True, progress=progress)
                prepared = None
                if new or name not in self.figures():
                    self._note(run, device)
                runs.append(run)
                yield run
            if not (self.path / folder.SCENES).exists():
                self._draw(runs, device)

    def runs(self) -> list[Run]:
        """Open the run of each stage that is finished, the coarsest first."""
        return [run for run in map(self._finished, self.names) if run is not None]

    def figures(self) -> dict[str, dict[str, float]]:
        """Return each finished stage's figures of the held-out pictures, by stage and column.

        Raises:
            UserError: ``stages.csv`` is damaged.
        """
        try:
            return {
                row["stage"]: {name: float(row[name]) for name in _COLUMNS[1:]}
                for row in self._rows()
            }
        except (KeyError, TypeError, ValueError) as error:
            raise folder.damaged(self.path / folder.TABLE, error) from error

    def _rows(self) -> list[dict[str, Any]]:
        file = self.path / folder.TABLE
        if not file.exists():
            return []
        with file.open(newline="", encoding="utf-8") as lines:
            return list(csv.DictReader(lines))

    def table(self) -> list[tuple[str, ...]]:
        """Return a head and a row a stage: its name and FCN's four figures."""
        return [
            ("stage", "pixel accuracy", "mean accuracy", "mean IU", "f.w. IU"),
            *(
                (name, *(f"{row[figure]:.4f}" for figure in FIGURES))
                for name, row in self.figures().items()
            ),
        ]

    def written(self) -> list[Path]:
        """Return what the folder has besides the stages' own."""
        files = (self.path / name for name in (folder.TABLE, folder.SCENES))
        return [file for file in files if file.exists()]

    def _claim(self) -> None:
        """Remove an earlier run's files, and write ``stages.toml``."""
        for path in (self.path, *(self.path / name for name in STRIDES)):
            if path.exists():
                folder.remove(path)
        config = {
            "format": folder.FORMAT,
            "segfuse": version("segfuse"),
            "stages": list(self.names),
            "arguments": self.arguments,
        }
        folder.write_config(self.path, config, folder.STAGES)

    def _finished(self, name: str) -> Run | None:
        if not (self.path / name / folder.CONFIG).exists():
            return None
        run = Run.open(self.path / name)
        return run if run.finished else None

    def _note(self, run: Run, device: str | None) -> None:
        """Write a stage's figures into the table."""
        found = judged(run, device=device)
        rows = {row["stage"]: row for row in self._rows()}
        rows[run.path.name] = {**run.result, **found, "stage": run.path.name}
        with whole(self.path / folder.TABLE) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, _COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows[name] for name in self.names if name in rows)

    def _draw(self, runs: list[Run], device: str | None) -> None:
        """Draw what each stage makes of the same pictures."""
        from .report import scenes  # noqa: PLC0415, as in training

        run = runs[0]
        where, held_out = choose(device or run.config["training"]["device"]), _held_out(run)
        items = []
        with use_threads(run.config["training"]["threads"]):
            for picture in held_out[:: -(-len(held_out) // _SCENES)]:
                image, truth = picture.image[:, :_SHOWN, :_SHOWN], picture.target[:_SHOWN, :_SHOWN]
                tensor = torch.from_numpy(image)
                found = [
                    predict(r.network(where), tensor, precision=r.precision, progress=False).numpy()
                    for r in runs
                ]
                items.append((picture.name, image, truth, found))
        titles = [run.path.name for run in runs]
        with whole(self.path / folder.SCENES) as path:
            scenes(items, run.coding.names, titles, palette=run.coding.palette).savefig(path)


def _defaults() -> dict[str, Any]:
    """Return the arguments of `training.fit` that are the same for all stages."""
    parameters = inspect.signature(training.fit).parameters.values()
    own = {"model", "coarser", "overwrite", "progress"}
    return {p.name: p.default for p in parameters if p.default is not p.empty and p.name not in own}


def judged(run: Run, *, device: str | None = None) -> dict[str, float]:
    """Return a run's figures of all the pictures that it held out, as large as it sees them.

    Args:
        run: with its weights; of its own figures those of a budget of time may be of fewer pixels.
        device: None: as it was trained.

    Raises:
        UserError: pictures that are gone, or a device that is not there.
    """
    options = run.config["training"]
    where = choose(device or options["device"])
    with use_threads(options["threads"]):
        validation = Validation(_held_out(run), run.coding.classes, where, run.precision)
        return validation(run.network(where))[0]


def _is_begun(path: Path) -> bool:
    """Whether a stage has checkpoints; else what it starts from may have been moved since."""
    return any((path / name).exists() for name in (folder.LAST, folder.BEST))


def _prepared(arguments: dict[str, Any], name: str, coarser: Run | None) -> Prepared:
    """Prepare the training of a stage: the first, or one that starts from another."""
    if coarser is None:
        return prepare({**arguments, "model": name, "coarser": None})
    prepared = prepare({**arguments, "pretrained": None, "model": name, "coarser": coarser.path})
    if prepared.config["data"]["checksum"] != coarser.config["data"]["checksum"]:
        raise UserError(
            f"the images or labels have changed since {coarser.path} was trained: train anew"
        )
    return prepared


def _held_out(run: Run) -> list[Picture]:
    """Read the pictures that a run validated with."""
    pairs = [pictures.as_pair(p) for p in run.config["data"]["validation"]]
    return pictures.read(pairs, run.coding, run.normalisation, resize=run.resize)
