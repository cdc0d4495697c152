"""The course of a training: its budget, and all that happens between the steps."""

from __future__ import annotations

import csv
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from .data.labels import LabelCoding
from .data.patches import Picture
from .errors import UserError
from .files import whole
from .metrics import ConfusionMatrix, Overlaps, overlaps, panoptic_quality
from .objects import instances
from .prediction import predict
from .run import BEST, LAST, METRICS, WEIGHTS, save_weights

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Budget", "Course", "Validation"]

VALIDATIONS = 10  # in a budget, less where they would take more than SHARE of the time
SHARE = 0.1
FEWEST = 4  # validations, over fewer pixels where need be
SLACK = 0.5  # of the seconds, for which they wait where steps are given too
ROWS = 200  # of metrics.csv
CHECKPOINT_SECONDS = 60.0  # between two, if no validation brings one earlier
PROBE = 256  # pixels a side of the picture by which a validation's cost is measured
FIGURES = ("pixel_accuracy", "mean_accuracy", "mean_iu", "frequency_weighted_iu")
OBJECTS = "panoptic_quality"  # counts where the labels tell objects apart
COLUMNS = (
    *("step", "seconds", "loss", "learning_rate"),
    *(f"validation_{figure}" for figure in (*FIGURES, OBJECTS)),
)


@dataclass(frozen=True)
class Budget:
    """When a training ends: with the first of the two.

    Where both are given, the seconds count from their middle on only, so that they are of no effect
    on the fraction that is spent where the steps are done by then.

    Attributes:
        steps: number of optimizer steps.
        seconds: from `Course`'s start on, with all validations.
    """

    steps: int | None = None
    seconds: float | None = None

    def spent(self, steps: int, seconds: float, reserve: float = 0.0) -> float:
        """Fraction of the budget that is gone, `reserve` seconds being kept for what comes last."""
        by_steps = steps / self.steps if self.steps else 0.0
        by_time = seconds / max(self.seconds - reserve, 1e-9) if self.seconds else 0.0
        if self.steps:
            by_time = (by_time - SLACK) / (1 - SLACK)
        return min(1.0, max(by_steps, by_time))


class Validation:
    """Predicts whole pictures and compares them with their targets.

    Args:
        pictures: see `data.patches.Picture`; at least one. Where they have ids, the objects of
            what is predicted are compared too, gaps between them closed (`segfuse.instances`).
        classes: of the model.
        device: to predict on.
        precision: to predict in.

    Attributes:
        pixels: of all pictures together, void too.
    """

    def __init__(
        self, pictures: Sequence[Picture], classes: int, device: torch.device, precision: str
    ) -> None:
        self.pictures = list(pictures)
        self.classes = classes
        self.device = device
        self.precision = precision
        self.pixels = sum(picture.target.size for picture in self.pictures)

    def __call__(self, model: nn.Module) -> tuple[dict[str, float], list[float]]:
        """Return the figures over all pictures together, by name, and the IU of each class."""
        matrix, tables = ConfusionMatrix(self.classes), []
        for picture in self.pictures:
            labels, ids = self._predict(model, picture.image), picture.ids
            matrix.update(torch.from_numpy(labels)[None], torch.from_numpy(picture.target)[None])
            if ids is not None:
                counts = ids != LabelCoding.NO_INSTANCE
                found = instances(labels, grow="gaps")
                tables.append(overlaps(found[counts], ids[counts]))
        scores = matrix.scores()
        figures = {name: float(getattr(scores, name)) for name in FIGURES}
        if tables:
            figures[OBJECTS] = panoptic_quality(Overlaps.join(tables)).pq
        return figures, list(scores.iu)

    def cost(self, model: nn.Module) -> float:
        """Measure the seconds that a pixel takes."""
        image = self.pictures[0].image[:, :PROBE, :PROBE]
        self._predict(model, image)  # the first call of a shape is slower
        began = time.perf_counter()
        self._predict(model, image)
        return (time.perf_counter() - began) / int(image[0].size)

    def limit(self, pixels: float) -> None:
        """Keep evenly spaced pictures of about so many pixels together, cropped if one has more."""
        if self.pixels <= pixels:
            return
        count = max(1, int(len(self.pictures) * pixels / self.pixels))
        chosen = np.linspace(0, len(self.pictures) - 1, count + 2)[1:-1].round().astype(int)
        self.pictures = [self.pictures[i] for i in chosen]
        if count == 1:
            side = max(PROBE, math.isqrt(int(pixels)))
            (whole,) = self.pictures
            image, target = whole.image[:, :side, :side], whole.target[:side, :side]
            ids = None if whole.ids is None else whole.ids[:side, :side]
            self.pictures = [Picture(image, target, whole.name, ids)]
        self.pixels = sum(picture.target.size for picture in self.pictures)

    def _predict(self, model: nn.Module, image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        tensor = torch.from_numpy(image)
        found = predict(model, tensor, device=self.device, precision=self.precision, progress=False)
        return np.asarray(found)


class Course(Callback):
    """Sets the learning rate, seeds each step, validates, keeps the books, saves, and stops.

    What it knows is in each checkpoint, so that a training that was killed goes on as if nothing
    had happened: patches, dropout and learning rate of a step follow from seed, step and, with a
    time budget, the time spent since the first step.

    Args:
        budget: when to stop.
        rate: the highest learning rate.
        schedule: see `solvers.Solver`; over the part of the budget that the first step finds. A
            group of parameters has it times its "scale".
        seed: of what a step draws from torch's generators.
        folder: the run folder, for ``metrics.csv``, weights and checkpoints; None writes nothing.
        validation: None: the last weights count as the best.
        patience: stop after so many validations in a row without a better mean IU; of objects,
            panoptic quality.
        began: what `time.perf_counter` gave when the seconds began to count; None: now.

    Attributes:
        rows: of ``metrics.csv``.
        best: the row of the best weights, and `iu`, of each class.
        ended: why the training ended: "steps", "time", "patience"; empty before.
        spent: fraction of the budget that is gone.
        loss: the last known, a mean over some steps.
    """

    def __init__(
        self,
        budget: Budget,
        *,
        rate: float,
        schedule: Callable[[float], float],
        seed: int,
        folder: Path | None = None,
        validation: Validation | None = None,
        patience: int | None = None,
        began: float | None = None,
    ) -> None:
        self.budget = budget
        self.rate = rate
        self.schedule = schedule
        self.seed = seed
        self.folder = folder
        self.validation = validation
        self.patience = patience

        self.rows: list[dict[str, float]] = []
        self.best: dict[str, Any] = {}
        self.ended = ""
        self.spent = 0.0
        self.loss = math.nan
        self._validations = VALIDATIONS
        self._pixels = math.inf  # of a validation
        self._reserve = 0.0  # seconds for what comes after the last step
        self._start = 0.0  # the fraction spent before the first step, by reading
        self._mark = 0.0  # the fraction spent when it was last asked what was due
        self._stale = 0  # validations without a better one
        self._losses: list[torch.Tensor] = []  # since the last row
        self._began = time.perf_counter() if began is None else began
        self._saved = self._step_began = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Time spent, in all processes that took part."""
        return time.perf_counter() - self._began

    # What a checkpoint holds

    def state_dict(self) -> dict[str, Any]:
        """Return what a later process needs to go on."""
        return {
            "rows": self.rows,
            "best": self.best,
            "ended": self.ended,
            "stale": self._stale,
            "validations": self._validations,
            "pixels": self._pixels,
            "reserve": self._reserve,
            "start": self._start,
            "mark": self._mark,
            "losses": [float(loss) for loss in self._losses],
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, the clock too."""
        self.rows = state["rows"]
        self.best = state["best"]
        self.ended = state["ended"]
        self._stale = state["stale"]
        self._validations = state["validations"]
        self._pixels = state["pixels"]
        self._reserve = state["reserve"]
        self._start = state.get("start", 0.0)  # of an older checkpoint: none
        self._mark = state["mark"]
        self._losses = [torch.tensor(loss) for loss in state["losses"]]
        self._began = time.perf_counter() - state["seconds"]

    # What Lightning calls

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Plan the validations, or take up where an earlier process was killed."""
        step, model = trainer.global_step, cast("Any", module).model
        if self.validation:
            if not step and self.budget.seconds:
                self._plan(self.validation, model, self.budget.seconds)
            self.validation.limit(self._pixels)
        if not step:
            self._start = self.budget.spent(0, self.seconds, self._reserve)
        if step and self.best.get("step") == step:  # killed between the checkpoint and its copies
            self._keep_best(model)
        self._write_rows()
        trainer.should_stop = bool(self.ended)
        self._saved = self._step_began = time.perf_counter()

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Make the step a function of seed, step and fraction spent."""
        step = trainer.global_step
        self.spent = self.budget.spent(step, self.seconds, self._reserve)
        # A schedule is of what reading has left, be it nothing.
        fraction = (self.spent - self._start) / max(1 - self._start, 1e-9)
        rate = self.rate * self.schedule(fraction)
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = rate * group.get("scale", 1.0)
        drawn = int(np.random.SeedSequence((self.seed, step)).generate_state(1, np.uint64)[0])
        torch.default_generator.manual_seed(drawn)  # torch.manual_seed takes 0.1 ms
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed(drawn)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        module: lightning.LightningModule,
        outputs: Any,
        *_: Any,
    ) -> None:
        """Keep the books; validate and save when it is time; stop at the budget's end."""
        self._losses.append(outputs["loss"].detach())
        step, model, now = trainer.global_step, cast("Any", module).model, time.perf_counter()
        # A step is not begun if the middle of it would lie beyond the end.
        ahead = self.seconds + (now - self._step_began) / 2
        self.spent = self.budget.spent(step, ahead, self._reserve)
        if self.spent >= 1:
            self.ended = "steps" if step == self.budget.steps else "time"
        row_due, validation_due = (
            self.ended or int(self.spent * n) > int(self._mark * n)
            for n in (ROWS, self._validations)
        )
        self._mark = self.spent
        improved = False
        if row_due or validation_due:
            self._add_row(step, trainer.optimizers[0].param_groups[0]["lr"])
        if validation_due:
            improved = self._validate(model)
        if row_due or validation_due:
            self._write_rows()
        if validation_due or now - self._saved > CHECKPOINT_SECONDS:
            self._save(trainer, model, improved=improved)
        trainer.should_stop = bool(self.ended)
        self._step_began = time.perf_counter()

    def _plan(self, validation: Validation, model: nn.Module, seconds: float) -> None:
        """Choose how many validations of how many pixels fit into their share of the time."""
        cost = validation.cost(model)  # seconds a pixel
        affordable = SHARE * seconds / cost
        self._validations = min(VALIDATIONS, max(FEWEST, int(affordable / validation.pixels)))
        self._pixels = affordable / self._validations
        # The last validation, and predicting what is drawn of its pictures.
        self._reserve = 2 * min(validation.pixels, self._pixels) * cost

    def _add_row(self, step: int, rate: float) -> None:
        loss = self.loss = math.fsum(map(float, self._losses)) / len(self._losses)
        self._losses.clear()
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {step}: take a lower learning rate")
        self.rows.append(
            {"step": step, "seconds": round(self.seconds, 3), "loss": loss, "learning_rate": rate}
        )

    def _validate(self, model: nn.Module) -> bool:
        """Complete the last row; return whether it is the best."""
        row = self.rows[-1]
        if self.validation:
            figures, iu = self.validation(model)
            row.update({f"validation_{name}": value for name, value in figures.items()})
            figure = f"validation_{OBJECTS if OBJECTS in figures else 'mean_iu'}"
            # Where the pictures show void alone the figure is nan, and the last weights are kept.
            if not (math.isnan(row[figure]) or row[figure] > self.best.get(figure, -math.inf)):
                self._stale += 1
                if self.patience and self._stale >= self.patience and not self.ended:
                    self.ended = "patience"
                return False
            self.best = {**row, "iu": iu}
        else:
            self.best = dict(row)
        self._stale = 0
        return True

    # Files

    def _write_rows(self) -> None:
        if self.folder is None:
            return
        with whole(self.folder / METRICS) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)

    def _save(self, trainer: lightning.Trainer, model: nn.Module, *, improved: bool) -> None:
        if self.folder is None:
            return
        trainer.save_checkpoint(self.folder / LAST)
        if improved:
            self._keep_best(model)
        self._saved = time.perf_counter()

    def _keep_best(self, model: nn.Module) -> None:
        """Make the last checkpoint the best one too, and write its weights."""
        if self.folder is None:
            return
        with whole(self.folder / BEST) as partial:
            try:
                os.link(self.folder / LAST, partial)
            except OSError:  # a file system without hard links
                shutil.copyfile(self.folder / LAST, partial)
        save_weights(self.folder / WEIGHTS, model)
