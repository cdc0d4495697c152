"""The training loop: Lightning's, with little around a step."""

from __future__ import annotations

import itertools
import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .course import Course
from .data.augment import Deform
from .devices import channels_last
from .files import whole
from .nn import coarse_scores
from .run import check_shapes, lay_out, load_state, model_state
from .solvers import Solver

__all__ = ["Segmentation", "learn"]

_PRECISIONS: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


class Segmentation(lightning.LightningModule):
    """A model under training.

    Args:
        model: maps images (N, C, *S) to logits (N, classes, *S').
        loss: maps logits (N, classes, *S') float32 and labels to a scalar. If it has ``of_coarse``
            (`nn.WeightedCrossEntropy`), and the model coarse scores (`nn.CoarseScores`), it is
            given these as they are, and logits of the images' size are stored nowhere.
        solver: makes the optimizer.
        rate: the highest learning rate.
        deform: what is done to a batch first.
        encoder: factor on the rate of what an FCN has from its backbone.

    Batches:
        (image, labels): what the model takes, and what the loss does, such as class ids (N, *S')
        uint8, 255 where a pixel does not count; but before `deform`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        solver: Solver,
        rate: float,
        *,
        deform: Deform | None = None,
        encoder: float = 1.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.solver = solver
        self.rate = rate
        self.deform = deform
        self.encoder = encoder

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Compute the batch's loss."""
        image, labels = batch
        if self.deform is not None:
            image, labels = self.deform(image, labels, self.global_step)
        image = channels_last(image)
        coarse, of_coarse = coarse_scores(self.model), getattr(self.loss, "of_coarse", None)
        loss: Tensor
        if coarse is None or of_coarse is None:
            loss = self.loss(self.model(image).float(), labels)
        else:
            loss = of_coarse(coarse.coarse_scores(image), labels, **coarse.upsampling)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer; the learning rate of each step is `Course`'s."""
        return self.solver(self.solver.groups(self.model, self.encoder), self.rate)


def learn(
    model: nn.Module,
    patches: Dataset[tuple[Tensor, Tensor]],
    loss: nn.Module,
    course: Course,
    *,
    batch: int,
    solver: Solver,
    device: torch.device,
    precision: str = "32",
    workers: int = 0,
    deform: Deform | None = None,
    encoder: float = 1.0,
    checkpoint: Path | None = None,
    progress: bool = False,
) -> int:
    """Train `model` in place until the course's budget is spent.

    On the CPU the result is a function of the arguments, the seeds in them, and the number of
    threads, if the budget is one of steps; on a GPU too, as far as torch's kernels
    are deterministic. torch's generators are left as they were.

    Args:
        model: see `Segmentation`; left in training mode, on `device`, channels last.
        patches: answers any index from 0 on; step s takes s batch ... (s + 1) batch - 1.
        loss: see `Segmentation`.
        course: sets the rate of each step, and ends the training.
        batch: patches a step.
        solver: makes the optimizer.
        device: to train on.
        precision: "32", "bf16" or "16" (CUDA only).
        workers: processes that cut patches; 0: this one does.
        deform: what is done to a step's batch, on `device`; `patches` are wide then.
        encoder: factor on the learning rate of an FCN's encoder.
        checkpoint: of an earlier process that had the same arguments, to go on from.
        progress: show a bar; needs rich.

    Returns:
        Steps taken, with those of earlier processes.

    Raises:
        UserError: a checkpoint that is damaged or of another network; a loss that is not finite; a
            file system that refuses.
        SystemExit: SIGTERM came; with the code 143 that a shell gives.
    """
    step = _step_of(checkpoint, model) if checkpoint else 0
    loader = DataLoader(
        patches,
        batch_sampler=_Batches(step, batch),
        num_workers=workers,
        pin_memory=device.type == "cuda",
    )
    devices = [] if device.type == "cpu" else [device.index or 0]
    with _quiet(), torch.random.fork_rng(devices), _repeatable_convolutions():
        trainer = lightning.Trainer(
            accelerator="gpu" if devices else "cpu",
            devices=devices or 1,
            precision=_PRECISIONS[precision],
            max_epochs=-1,  # the course stops it
            callbacks=[course, _Progress(course)] if progress else [course],
            # The latter keeps Lightning from taking a batch system's variables for a cluster's.
            plugins=[_WholeFiles(), LightningEnvironment()],
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        model = lay_out(model, device)
        module = Segmentation(model, loss, solver, course.rate, deform=deform, encoder=encoder)
        try:
            trainer.fit(module, loader, ckpt_path=checkpoint)
        except (RuntimeError, SIGTERMException):  # the former of a worker that SIGTERM ended too
            if trainer.received_sigterm:
                raise SystemExit(128 + signal.SIGTERM) from None
            raise
    return trainer.global_step


def _step_of(checkpoint: Path, model: nn.Module) -> int:
    """Look at a checkpoint before Lightning does, which checks nothing."""
    state = load_state(checkpoint)
    check_shapes(checkpoint, model, model_state(state))
    return int(state["global_step"])


class _Batches:
    """The indices of each step's patches, without end."""

    def __init__(self, step: int, batch: int) -> None:
        self.step = step
        self.batch = batch

    def __iter__(self) -> Iterator[list[int]]:
        for step in itertools.count(self.step):
            yield list(range(step * self.batch, (step + 1) * self.batch))


class _WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, and loads nothing that could run code.

    Lightning's own writes into the final name, or by way of fsspec's temporary folder, which may
    lie on another disk.
    """

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: Any,
        storage_options: Any = None,  # noqa: ARG002
    ) -> None:
        with whole(Path(path)) as partial, partial.open("wb") as file:
            try:
                torch.save(checkpoint, file)  # given a name, it would hide why the system refuses
            except RuntimeError as error:  # so does closing its archive after that
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise

    def load_checkpoint(
        self,
        path: Any,
        map_location: Any = "cpu",
        weights_only: Any = None,  # noqa: ARG002
    ) -> Any:
        return torch.load(path, map_location=map_location, weights_only=True)


class _Progress(Callback):
    """A line with the bar, the step, the time left, the loss, the rate and the best mean IU."""

    def __init__(self, course: Course) -> None:
        self.course = course
        console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("", total=1.0)

    def on_train_start(self, *_: Any) -> None:
        self.bar.start()

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        course, rate = self.course, trainer.optimizers[0].param_groups[0]["lr"]
        text = f"step {trainer.global_step}, loss {course.loss:.3f}, learning rate {rate:.1e}"
        if "validation_mean_iu" in course.best:
            text += f", mean IU {course.best['validation_mean_iu']:.3f}"
        self.bar.update(self.task, completed=course.spent, description=text)

    def on_train_end(self, *_: Any) -> None:
        self.bar.stop()

    def on_exception(self, *_: Any) -> None:
        self.bar.stop()


@contextmanager
def _repeatable_convolutions() -> Iterator[None]:
    """Let cuDNN choose algorithms that give the same bits every time."""
    cudnn = torch.backends.cudnn
    with cudnn.flags(enabled=cudnn.enabled, benchmark=False, deterministic=True):
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's remarks off the screen, and give Ctrl-C back as KeyboardInterrupt."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    main = threading.current_thread() is threading.main_thread()
    on_interrupt = signal.getsignal(signal.SIGINT)
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PossibleUserWarning)
            # Lightning 2.6 calls what torch 2.13 deprecates.
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            yield
    except SystemExit as end:
        # Lightning turns the one into the other, and ignores SIGINT from then on.
        if isinstance(end.__context__, KeyboardInterrupt):
            raise end.__context__ from None
        raise
    finally:
        logger.setLevel(level)
        if main and on_interrupt is not None:
            signal.signal(signal.SIGINT, on_interrupt)
