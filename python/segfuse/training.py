"""Training: a LightningModule for segmentation, patches to learn from, and the loop."""

from __future__ import annotations

import logging
import warnings
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import lightning
import numpy as np
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

__all__ = ["RandomPatches", "Segmentation", "fit"]


class RandomPatches(Dataset[tuple[Tensor, Tensor]]):
    """Patches of one image at random places, turned, flipped and changed in brightness.

    A patch is turned by a multiple of 90 degrees, flipped or not, its grey values multiplied by
    exp(0.4 z) and shifted by 0.06 z', with z and z' standard normal. Patch i is a function of
    (seed, i) alone, in whichever order or process the patches are drawn.

    Args:
        image: (H, W), normalised to about 0 to 1.
        target: (H, W), class ids; False and True count as 0 and 1.
        size: side of the target patch in pixels, at most H and W.
        margin: pixels a side by which the image patch reaches beyond the target patch; at the
            image's border it is mirrored there.
        count: number of patches.
        seed: a non-negative integer.

    Items:
        image (1, size + 2 margin, size + 2 margin) float32, target (size, size) int64.
    """

    def __init__(
        self,
        image: NDArray[np.floating],
        target: NDArray[Any],
        *,
        size: int,
        margin: int,
        count: int,
        seed: int,
    ) -> None:
        self.image = np.pad(image.astype(np.float32), margin, mode="reflect")
        self.target = target.astype(np.int64)
        self.size = size
        self.margin = margin
        self.count = count
        self.seed = seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        random = np.random.default_rng((self.seed, index))
        top, left = random.integers(0, np.array(self.target.shape) - self.size + 1)
        wide = self.size + 2 * self.margin
        image = self.image[top : top + wide, left : left + wide]
        target = self.target[top : top + self.size, left : left + self.size]
        turns = int(random.integers(4))
        image, target = np.rot90(image, turns), np.rot90(target, turns)
        if random.integers(2):
            image, target = np.flipud(image), np.flipud(target)
        contrast, brightness = np.exp(random.normal(0, 0.4)), random.normal(0, 0.06)
        image = (image * contrast + brightness).astype(np.float32)
        return torch.from_numpy(image[None]), torch.from_numpy(target.copy())


class Segmentation(lightning.LightningModule):
    """A model under training with cross-entropy, AdamW and a one-cycle learning rate.

    Args:
        model: maps images (N, C, H, W) to logits (N, classes, h, w).
        rate: the highest learning rate of the cycle, reached after 30 % of the steps.

    Batches:
        (image, target): what the model takes, and class ids (N, h, w) int64.
    """

    def __init__(self, model: nn.Module, *, rate: float = 4e-3) -> None:
        super().__init__()
        self.model = model
        self.rate = rate

    def forward(self, image: Tensor) -> Tensor:
        """Compute logits (N, classes, h, w) of images (N, C, H, W)."""
        logits: Tensor = self.model(image)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Compute the batch's mean loss; log it, and the learning rate it was reached with."""
        image, target = batch
        loss = F.cross_entropy(self(image), target)
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.log_dict({"loss": loss, "lr": rate})
        return loss

    def configure_optimizers(self) -> Any:
        """Make the optimizer and its schedule over all the steps the trainer expects."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=self.rate,
            total_steps=int(self.trainer.estimated_stepping_batches),
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def fit(
    model: nn.Module,
    patches: Dataset[tuple[Tensor, Tensor]],
    *,
    batch: int,
    seconds: float,
    progress: bool = False,
) -> int:
    """Train `model` in place on the CPU, once over `patches` in their order.

    Nothing is written to disk. Dropout draws from torch's global generator: seed it for a result
    that repeats.

    Args:
        model: see `Segmentation`; left in training mode.
        patches: a dataset with a length.
        batch: patches a step.
        seconds: training stops at the first step that ends later than this.
        progress: show a progress bar with loss and learning rate; needs rich.

    Returns:
        Steps taken: fewer than all when the time was up.
    """
    with _quiet():
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            max_time=timedelta(seconds=seconds),
            callbacks=[_Progress()] if progress else [],
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            logger=False,
        )
        trainer.fit(Segmentation(model), DataLoader(patches, batch_size=batch))
    return trainer.global_step


class _Progress(Callback):
    """A line with the bar, the time left, the batch's loss and the learning rate."""

    def on_train_start(self, trainer: lightning.Trainer, _: lightning.LightningModule) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        self.bar = Progress(
            "training",
            BarColumn(),
            MofNCompleteColumn(),
            "steps",
            TimeRemainingColumn(),
            "{task.description}",
        )
        self.task = self.bar.add_task("", total=trainer.num_training_batches)
        self.bar.start()

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        loss, rate = (float(trainer.callback_metrics[name]) for name in ("loss", "lr"))
        text = f"loss {loss:.3f}, learning rate {rate:.1e}"
        self.bar.update(self.task, advance=1, description=text)

    def on_train_end(self, *_: Any) -> None:
        self.bar.stop()

    def on_exception(self, *_: Any) -> None:
        self.bar.stop()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's remarks on hardware, workers and products off the screen."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PossibleUserWarning)
            # Lightning 2.6 calls what torch 2.13 deprecates.
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)
