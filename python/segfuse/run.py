"""The run folder: all that a training leaves behind, and enough to repeat it.

    config.toml          what was trained on what and how, and what came of it
    model.safetensors    the best weights
    metrics.csv          loss, learning rate and validation figures over the steps
    curves.png           the same, drawn
    overlays.png         a few validation pictures: image, truth, prediction, errors
    checkpoints/         last.ckpt, to go on from; best.ckpt, the state of the best weights

`config.toml` alone, in a folder of its own, lets `training.resume` repeat the training. Weights
that it started from are named in it, with their checksum, and needed until the first checkpoint.

A folder of stages (`segfuse.stages`) has `stages.toml` in place of it, and a run folder a stage.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import tomli_w
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from . import models
from .data.labels import LabelCoding
from .data.normalise import Normalisation
from .data.resize import Resize
from .devices import channels_last
from .errors import UserError
from .files import whole

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["FORMAT", "Run", "claim", "read_config", "save_weights", "write_config"]

FORMAT = 1
CONFIG, WEIGHTS, METRICS = "config.toml", "model.safetensors", "metrics.csv"
CURVES, OVERLAYS = "curves.png", "overlays.png"
LAST, BEST = "checkpoints/last.ckpt", "checkpoints/best.ckpt"
STAGES, TABLE, SCENES = "stages.toml", "stages.csv", "stages.png"  # of a folder of runs
FILES = (CONFIG, WEIGHTS, METRICS, CURVES, OVERLAYS, LAST, BEST, STAGES, TABLE, SCENES)
RESULT = {"steps", "ended", "seconds", "best"}  # what [result] holds at least


@dataclass(frozen=True)
class Run:
    """A finished or interrupted training, opened with `Run.open`.

    Attributes:
        path: the folder.
        config: what ``config.toml`` holds.
        coding: how the labels' files number the classes.
        normalisation: what is done to an image before the network sees it.
    """

    path: Path
    config: dict[str, Any]
    coding: LabelCoding
    normalisation: Normalisation
    _networks: dict[torch.device, nn.Module] = field(
        default_factory=dict, repr=False, compare=False
    )

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Read a run folder's ``config.toml``; the weights are read by `model`.

        Args:
            path: the folder; of a folder of stages the finest that is finished is opened.

        Raises:
            UserError: not a run folder, one of a newer segfuse, or one whose file is damaged; no
                stage that is finished.
        """
        path = finest(Path(path))
        config = read_config(path)
        try:
            data, model = config["data"], config["model"]
            coding = LabelCoding.from_dict(data["coding"])
            normalisation = Normalisation.from_dict(data["normalisation"])
            classes, _ = model["classes"], model["in_channels"]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise damaged(path / CONFIG, error) from error
        if classes != coding.classes:
            raise UserError(
                f"{path / CONFIG}: the model has {classes} classes, its labels {coding.classes}"
            )
        return cls(path, config, coding, normalisation)

    def model(self) -> nn.Module:
        """Build the network with the best weights, on the CPU, in evaluation mode.

        Raises:
            UserError: weights that are missing, damaged or of another network; a network that this
                segfuse cannot build.
        """
        weights = self.path / WEIGHTS
        with torch.random.fork_rng(devices=[]):
            model = build(self.config, self.path)
        if not weights.exists():
            raise UserError(
                f"{weights} is missing: the training was stopped before its first validation; "
                "resume it"
            )
        load_weights(model, weights)
        return model.eval()

    def network(self, device: torch.device) -> nn.Module:
        """Return `model` on a device, laid out for speed; built once and kept, so leave it be."""
        if device not in self._networks:
            self._networks[device] = lay_out(self.model(), device)
        return self._networks[device]

    @property
    def result(self) -> dict[str, Any]:
        """What came of the training.

        Raises:
            UserError: ``config.toml`` is damaged.
        """
        result = self.config.get("result")
        missing = RESULT - result.keys() if isinstance(result, dict) else {"result"}
        if missing:
            raise damaged(self.path / CONFIG, KeyError(min(missing)))
        return dict(self.config["result"])

    @property
    def finished(self) -> bool:
        """Whether the training has come to its end, and its weights are there."""
        return "result" in self.config and (self.path / WEIGHTS).exists()

    @property
    def resize(self) -> Resize | None:
        """What is done to an image's size before the network sees it.

        Raises:
            UserError: ``config.toml`` is damaged.
        """
        try:
            return Resize.of(self.config["data"].get("resize"))
        except (TypeError, ValueError) as error:
            raise damaged(self.path / CONFIG, error) from error

    @property
    def channels(self) -> int:
        """Channels of the images that the network takes."""
        return int(self.config["model"]["in_channels"])

    @property
    def precision(self) -> str:
        """In which it was trained: "32", "bf16" or "16"."""
        return str(self.config.get("training", {}).get("precision", "32"))


def build(config: dict[str, Any], path: Path) -> nn.Module:
    """Make the untrained network of a run, from torch's generator as it stands.

    Raises:
        UserError: `config`, of the run folder `path`, does not describe a network.
    """
    try:
        return models.build(**config["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(path / CONFIG, error) from error


def lay_out(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a network to a device, its 2-D convolutions channels last."""
    for parameter in model.parameters():
        parameter.data = channels_last(parameter.data)
    return model.to(device)


def save_weights(path: Path, model: nn.Module) -> None:
    """Write a network's state to a safetensors file, whole or not at all.

    Raises:
        UserError: the file system refuses.
    """
    state = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    with whole(path) as partial:
        partial.write_bytes(save(state))  # save_file would hide why the file system refuses


def load_weights(model: nn.Module, path: Path) -> None:
    """Read what `save_weights` wrote into a network of the same make.

    Raises:
        UserError: the file is damaged or of another network.
    """
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise damaged(path, error) from error
    check_shapes(path, model, state)
    model.load_state_dict(state)


def mend(run: Run) -> bool:
    """Write the weights anew where they are lost but the best checkpoint is there.

    Returns:
        whether they were.

    Raises:
        UserError: the checkpoint is damaged or of another network; the file system refuses.
    """
    weights, best = run.path / WEIGHTS, run.path / BEST
    if weights.exists() or not best.exists():
        return False
    with torch.random.fork_rng(devices=[]):
        model = build(run.config, run.path)
    state = model_state(load_state(best))
    check_shapes(best, model, state)
    model.load_state_dict(state)
    save_weights(weights, model)
    return True


def check_shapes(path: Path, model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """See that the state that `path` holds is of a network like `model`.

    Raises:
        UserError: it is not.
    """
    expected, found = (
        {name: tuple(value.shape) for name, value in tensors.items()}
        for tensors in (model.state_dict(), state)
    )
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{path} is of another network than {CONFIG} says: {name}: expected shape "
                f"{expected.get(name)}, got {found.get(name)}"
            )


def load_state(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint of a training, without taking its tensors into memory.

    Raises:
        UserError: the file is damaged or no such checkpoint.
    """
    try:
        state = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)
    except (EOFError, OSError, RuntimeError, UnpicklingError, ValueError) as error:
        raise damaged(checkpoint, error) from error
    found = state.keys() if isinstance(state, dict) else set()
    if missing := {"global_step", "state_dict", "pytorch-lightning_version"} - found:
        raise damaged(checkpoint, KeyError(min(missing)))
    return dict(state)


def model_state(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the network's part of what `load_state` read."""
    start = "model."
    return {
        name.removeprefix(start): value
        for name, value in state["state_dict"].items()
        if name.startswith(start)
    }


def finest(path: Path) -> Path:
    """Return the finest finished run of a folder of stages; any other folder as it is.

    Raises:
        UserError: no stage is finished, or the file that lists them is damaged.
    """
    if (path / CONFIG).exists() or not (path / STAGES).exists():
        return path
    config = read_config(path, STAGES)
    names = config.get("stages")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise damaged(path / STAGES, KeyError("stages"))
    for name in reversed(names):
        if (path / name / CONFIG).exists() and Run.open(path / name).finished:
            return path.joinpath(name)
    raise UserError(
        f"{path} holds the stages {', '.join(names)}, of which none is finished: resume it, or "
        "name the folder of one"
    )


def read_config(path: Path, name: str = CONFIG) -> dict[str, Any]:
    """Read the ``config.toml`` of a run folder, or another file like it, of this format.

    Raises:
        UserError: see `Run.open`.
    """
    file = path / name
    if not file.is_file():
        raise UserError(f"{path} is not a run folder: it has no {name}")
    try:
        config = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # what is no UTF-8 or no TOML is a ValueError
        raise damaged(file, error) from error
    version = config.get("format")
    if not isinstance(version, int):
        raise UserError(f"{path} is not a run folder: its {name} has no format number")
    if version > FORMAT:
        raise UserError(
            f"{file}: of format {version}, written by segfuse {config.get('segfuse')}; this one "
            f"reads formats up to {FORMAT}: update segfuse"
        )
    return config


def write_config(path: Path, config: dict[str, Any], name: str = CONFIG) -> None:
    """Write the ``config.toml`` of a run folder, whole or not at all; None is left out.

    Raises:
        UserError: the file system refuses.
    """
    text = encoded(config)
    with whole(path / name) as partial:
        partial.write_bytes(text)


def encoded(config: dict[str, Any]) -> bytes:
    """Give what `write_config` writes.

    Raises:
        UserError: a file's name is not UTF-8, as of old archives, and TOML cannot hold it.
    """
    text = tomli_w.dumps(_without_none(config))
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        line = text[text.rfind("\n", 0, error.start) + 1 :].partition("\n")[0].strip()
        raise UserError(f"expected names in UTF-8, rename {line!a}") from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes from training into a run folder, which is made if it is missing.

    The lock ends with the process, however that ends. Where the file system knows no locks, there
    is none.

    Raises:
        UserError: another process has it, or the file system refuses.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot write into {path}: {error.strerror}") from error
    _locks.add(lock)
    try:
        with suppress(OSError):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"{path} is being trained by another process") from error
        yield
    finally:
        if lock in _locks:
            _locks.remove(lock)
            os.close(lock)


_locks: set[int] = set()  # descriptors


def _let_go() -> None:
    while _locks:
        os.close(_locks.pop())


os.register_at_fork(after_in_child=_let_go)  # or workers would hold it a while after a kill


def claim(path: Path, *, overwrite: bool) -> None:
    """Make sure that a folder can take a run: make it, or see that it is empty and writable.

    Args:
        path: the folder.
        overwrite: take a folder that holds files. An earlier run's are removed, others stay.

    Raises:
        UserError: it holds files and `overwrite` is not set, or the file system refuses.
    """
    check_free(path, overwrite=overwrite)
    make(path / LAST)
    clear_partial(path)
    remove(path)


def remove(path: Path) -> None:
    """Remove the files of an earlier run; others stay.

    Raises:
        UserError: the file system refuses.
    """
    try:
        for name in FILES:
            (path / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot remove {error.filename}: {error.strerror}") from error


def check_free(path: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds files, unless they may be overwritten; write nothing."""
    first = None
    try:
        with suppress(FileNotFoundError):
            first = min((file.name for file in path.iterdir()), default=None)
        there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    except OSError as error:
        raise UserError(f"cannot write into {path}: {error.strerror}") from error
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"cannot write into {there}: no permission")
    if first is not None and not overwrite:
        raise UserError(
            f"{path} holds files ({first}): choose another folder, resume the run that is there, "
            "or overwrite (--overwrite)"
        )


def make(file: Path) -> None:
    """Make the folder that is to hold `file`, and see that it can be written to."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into {file.parent}: {error.strerror}") from error
    with whole(file.with_name("probe")) as partial:
        partial.touch()
    file.with_name("probe").unlink()


def clear_partial(path: Path) -> None:
    """Remove what processes that were killed while writing left in a run folder."""
    for folder in (path, (path / LAST).parent):
        for file in folder.glob(".partial-*"):
            file.unlink(missing_ok=True)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_without_none(item) for item in value]
    return value


def damaged(file: Path, error: Exception) -> UserError:
    """Say that a file of a run folder is not as segfuse wrote it, and in what."""
    reason = " ".join(str(error).split()).partition(". ")[0] or type(error).__name__
    if isinstance(error, KeyError):
        reason = f"no {reason}"
    return UserError(f"{file} is damaged: {reason}")
