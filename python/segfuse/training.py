"""Training from image and label files to a run folder, and going on with one that was stopped."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

from . import pictures
from . import run as folder
from .course import Budget, Course, Validation
from .data.augment import Deform
from .data.labels import LabelCoding
from .data.normalise import Method
from .data.pairs import number
from .data.patches import Patches, Picture
from .devices import check_precision, choose
from .devices import threads as use_threads
from .errors import UserError
from .files import whole
from .loop import learn
from .nn import TouchingCrossEntropy, WeightedCrossEntropy
from .ops import separate_touching
from .options import Options
from .prediction import predict
from .preparation import Prepared, begun, plain, prepare
from .run import Run
from .solvers import SOLVERS

__all__ = ["fit", "resume", "train"]

_DRAWN, _SHOWN = 4, 512  # pictures of overlays.png, at most; pixels a side of each
_FEW = 10  # steps, of which nothing can be expected
_LOG = logging.getLogger("segfuse")


def fit(
    images: str | Path,
    labels: str | Path,
    output: str | Path,
    *,
    model: str = "unet",
    backbone: str | None = None,
    pretrained: str | Path | None = None,
    coarser: str | Path | None = None,
    solver: str = "modern",
    objective: str = "classes",
    steps: int | None = None,
    epochs: float | None = None,
    time: float | None = None,
    batch: int | None = None,
    patch: int | None = None,
    learning_rate: float | None = None,
    encoder_rate: float = 1.0,
    class_weight: str | None = None,
    deform: float | None = None,
    rotate: float = 0.0,
    scale: float = 1.0,
    symmetry: str | None = None,
    validation: float = 0.2,
    split: str | Path = "file",
    kind: str = "auto",
    classes: int | None = None,
    names: Sequence[str] | None = None,
    colours: str | Path | None = None,
    ignore: int | None = None,
    resize: float | Sequence[int] | None = None,
    normalise: Method | None = None,
    precision: str = "auto",
    device: str = "auto",
    seed: int = 0,
    patience: int | None = None,
    threads: int | None = None,
    workers: int | None = None,
    base: int | None = None,
    depth: int | None = None,
    padding: str | None = None,
    norm: str | None = None,
    dropout: float | None = None,
    up: str | None = None,
    width: float | None = None,
    layout: str | None = None,
    upsample: str | None = None,
    at_once: bool | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Run:
    """Train a network on images and their labels, and leave all that came of it in a run folder.

    The training ends with the first of `steps`, `epochs` and `time`; the learning rate follows the
    fraction of the budget that is spent. About ten times in the budget, and at its end, the whole
    validation pictures are predicted, and the weights of the highest mean IU are kept, or, of
    objective "touching", of the highest panoptic quality of the objects. With a
    budget of time, validations take about a tenth of it at most, by being fewer or, where that is
    not enough, of fewer pictures. What is None below is `solvers.DEFAULTS`'s.

    On the CPU, the same arguments, files and torch give the same weights, if no time is given:
    besides ending the training, it decides how many validations of how many pixels there are.

    Args:
        images: folder, or a single file.
        labels: folder, or a single file; matched by name (`data.pair`).
        output: the run folder, made if missing; see `segfuse.run`.
        model: a name of `models.MODELS`.
        backbone: of an FCN or UnpoolNet, a name of `models.backbones.BACKBONES`.
        pretrained: file of the backbone's weights, or "torchvision" or "timm" (see
            `models.backbones.backbone`); it is needed until the first checkpoint.
        coarser: run folder of an FCN of twice the stride, whose weights this one starts from, and
            whose options of the network it has (`FCN.from_coarser`); needed as long.
        solver: "modern", "unet-paper", "fcn-paper" or "fcn-released", of `solvers.SOLVERS`.
        objective: "classes" learns each pixel's class; "touching", from labels that are instances,
            the paper's target of cells with gaps between those that touch, where gaps weigh most
            (`nn.TouchingCrossEntropy`); validation closes them again (`segfuse.instances`).
        steps: to take.
        epochs: passes over the training pictures, counted in pixels, void too.
        time: seconds from the call on, with reading, validations and drawing.
        batch: patches a step.
        patch: pixels a side that a patch labels, of those that fit the network.
        learning_rate: the highest.
        encoder_rate: factor on it for what an FCN has from its backbone; 0 leaves that as it is,
            but for normalisation's statistics.
        class_weight: "balanced" lets all classes count alike in the loss, over all pictures to
            train on, so that few pixels of a class weigh the more; edges then lie farther out in
            its favour. "none" weighs classes alike. None: as in the paper "balanced" for
            "unet-paper" with "touching", else "none".
        deform: standard deviation in pixels of the displacements of a 3 x 3 grid by which a patch,
            margins included, is deformed; 0: not; a twelfth of its side at most, or it may fold
            (`data.augment.Deform`). None: 10 for "unet-paper" and for "touching", else 0.
        rotate: the largest angle in degrees by which patches are turned, besides right angles.
        scale: the largest factor by which patches are made larger or smaller, from 1 on.
        symmetry: in which poses scenes are likely, and so patches are shown: "d4", turned by right
            angles and mirrored; "mirror", left and right exchanged, as of photographs; "none".
            None: "d4" of U-Net, "mirror" of the others, but "none" by FCN's own solvers.
        validation: fraction of the pictures to hold out; 0 holds out none, and the last weights
            are kept.
        split: "file", "block", or a file that lists the held out (`data.split`).
        kind: of labels: "auto", "classes", "binary" or "instances" (`data.detect`).
        classes: number of classes; None: found in the labels.
        names: of the classes.
        colours: file of the classes' colours, a line each, in pictures and palettes of predicted
            labels (`data.read_colours`); None: the labels' palette, or colours of our own.
        ignore: the labels' id of pixels that do not count.
        resize: factor, or rows and columns, that images and labels are brought to first
            (`data.Resize`); images to predict are too, and the result back to their size.
        normalise: "percentile", "meanstd" or "none" (`data.Normalisation`). None: "percentile" of
            U-Net; "none" of the other networks, which scale colours themselves as their backbone's
            weights want it.
        precision: "32"; "bf16", mixed; "16", mixed, on CUDA only; "auto": the fastest of them
            (`devices.check_precision`).
        device: "auto", "cpu", "cuda", "cuda:N".
        seed: of weights, patches, dropout and the choice of validation pictures.
        patience: stop after so many validations in a row without better weights; not without
            validation.
        threads: CPU threads; None as torch has them.
        workers: processes that cut patches; None: none on the CPU, up to 4 for a GPU.
        base: see `models.UNet`, like the options that follow.
        depth: poolings.
        padding: "valid" or "same".
        norm: "batch" or "none".
        dropout: probability.
        up: "deconv", "bilinear" or "unpool"; of UnpoolNet too.
        width: factor on the channels of the backbone.
        layout: "published" or "aligned", see `models.FCN`, like the options that follow.
        upsample: "learned", "fixed" or "bilinear".
        at_once: scale what the finer maps add, to train all strides at once.
        overwrite: take a folder that holds files; an earlier run's are removed.
        progress: show a bar; needs rich.

    Raises:
        UserError: files or options that cannot be worked with, found before anything is written; a
            file system that refuses, or a loss that is not finite, later.
        SystemExit: SIGTERM came while it trained; the code is 143.

    Limits:
        All pictures are kept in memory, 4 bytes a pixel and channel, and a byte a label, 5 for
        "touching".
    """
    given = dict(locals())
    output = Path(given.pop("output")).absolute()
    del given["overwrite"], given["progress"]
    folder.check_free(output, overwrite=overwrite)
    prepared = prepare(given)
    with folder.locked(output):
        return train(prepared, output, overwrite=overwrite, progress=progress)


def train(prepared: Prepared, output: Path, *, overwrite: bool, progress: bool) -> Run:
    """Train what was prepared into a run folder, which is locked.

    Raises:
        UserError, SystemExit: see `fit`.
    """
    folder.claim(output, overwrite=overwrite)
    folder.write_config(output, prepared.config)
    run, (_, sides, began, model) = Run.open(output), prepared
    return _train(run, sides, began, model=model, progress=progress)


def resume(path: str | Path, *, device: str | None = None, progress: bool = False) -> Run:
    """Go on with a training that was stopped, from its last checkpoint.

    On the CPU, a training by steps ends with the weights it would have had undisturbed. Where there
    is no checkpoint yet, or nothing but ``config.toml``, it starts from the beginning, and a
    finished one is left as it is, but for weights that are lost, which its best checkpoint has;
    all is said through the logger "segfuse".

    Args:
        path: the run folder.
        device: "auto", "cpu", "cuda", "cuda:N"; None: as the training was begun.
        progress: show a bar; needs rich.

    Raises:
        UserError: no run folder, or a damaged one; one that another process trains into; files that
            are gone or have changed; a device that is not there; a file system that refuses.
        SystemExit: see `fit`.
    """
    began, run = perf_counter(), Run.open(path)
    with folder.locked(run.path):
        if folder.mend(run):
            _LOG.warning("%s had lost its weights: written from its best checkpoint", path)
        if run.finished:
            steps, ended = (run.result[name] for name in ("steps", "ended"))
            _LOG.warning("%s is finished, after %s steps (%s): nothing to do", path, steps, ended)
            return run
        sides = _read_again(run)
        folder.make(run.path / folder.LAST)
        folder.clear_partial(run.path)
        if not (run.path / folder.LAST).exists():
            _LOG.warning("%s has no checkpoint yet: starting from the beginning", path)
        return _train(run, sides, began, device=device, progress=progress)


def _read_again(run: Run) -> list[list[Picture]]:
    """Read the pictures that a run was begun with."""
    data = run.config["data"]
    try:
        touching = run.config["training"].get("objective") == "touching"
        sides = [
            pictures.read(
                [pictures.as_pair(p) for p in data[side]],
                run.coding,
                run.normalisation,
                instances=touching,
                resize=run.resize,
            )
            for side in ("train", "validation")
        ]
        checksum = data["checksum"]
    except (AttributeError, KeyError, TypeError) as error:
        raise folder.damaged(run.path / folder.CONFIG, error) from error
    if pictures.checksum(chain(*sides)) != checksum:
        raise UserError(f"the images or labels have changed since {run.path} was begun: train anew")
    return sides


def _train(
    run: Run,
    sides: list[list[Picture]],
    began: float,
    *,
    model: nn.Module | None = None,
    device: str | None = None,
    progress: bool,
) -> Run:
    """Train as the run's config says, and write what came of it."""
    try:
        options = Options(**run.config["training"])
    except (KeyError, TypeError, ValueError) as error:
        raise folder.damaged(run.path / folder.CONFIG, error) from error
    train, held_out = sides
    where, solver = choose(device or options.device), SOLVERS[options.solver]
    check_precision(options.precision, where)
    with use_threads(options.threads), torch.random.fork_rng(devices=[]), plain():
        torch.default_generator.manual_seed(options.seed)
        checkpoint = run.path / folder.LAST
        if model is None:
            new = run.config.get("start") and not checkpoint.exists()
            model = begun(run.config) if new else folder.build(run.config, run.path)
        validation = None
        if held_out:
            validation = Validation(held_out, run.coding.classes, where, options.precision)
        course = Course(
            Budget(options.steps, options.time),
            rate=options.learning_rate,
            schedule=solver.schedule,
            seed=options.seed,
            folder=run.path,
            validation=validation,
            patience=options.patience,
            began=began,
        )
        margin, seed = getattr(model, "margin", 0), options.seed
        deform = None
        if options.deforms:
            deform = Deform(
                std=options.deform,
                rotation=options.rotate,
                scale=options.scale,
                margin=margin,
                seed=seed,
            )
        learn(
            model,
            Patches(
                train,
                size=options.patch,
                margin=margin,
                seed=seed,
                gain=options.gain,
                shift=options.shift,
                wide=deform is not None,
                symmetry=options.symmetry,
            ),
            _loss(options, train, run.coding.classes),
            course,
            batch=options.batch,
            solver=solver,
            device=where,
            precision=options.precision,
            workers=options.workers,
            deform=deform,
            encoder=options.encoder_rate,
            checkpoint=checkpoint if checkpoint.exists() else None,
            progress=progress,
        )
        _draw(run, validation.pictures if validation else train, where)
    if course.ended == "time" and (steps := int(course.rows[-1]["step"])) < _FEW:
        told = number(steps, "step")
        _LOG.warning("%s: the time sufficed for %s: train for longer", run.path, told)
    result: dict[str, Any] = {"steps": course.rows[-1]["step"], "ended": course.ended}
    result |= {"seconds": round(course.seconds, 3), "best": course.best}
    if validation:
        result["validated"] = validation.pixels / sum(picture.target.size for picture in held_out)
    folder.write_config(run.path, {**run.config, "result": result})
    return Run.open(run.path)


def _loss(options: Options, pictures: Sequence[Picture], classes: int) -> nn.Module:
    balanced = options.class_weight == "balanced"
    touching = options.objective == "touching"
    weights = _balance(pictures, classes, gaps=touching) if balanced else None
    if touching:
        of_both = None if weights is None else (weights[0], weights[1])
        return TouchingCrossEntropy(class_weight=of_both, void=LabelCoding.NO_INSTANCE)
    return WeightedCrossEntropy(
        class_weight=None if weights is None else torch.tensor(weights),
        reduction=SOLVERS[options.solver].reduction,
    )


def _balance(pictures: Sequence[Picture], classes: int, *, gaps: bool) -> list[float]:
    """Weigh classes so that all there are count alike over all pictures together.

    The w_c of Ronneberger, Fischer, Brox 2015, section 3. Of each patch by itself, the few pixels
    of a cell that its edge cuts would weigh as much as all others.
    """
    pixels = torch.zeros(classes, dtype=torch.float64)
    for picture in pictures:
        target = torch.from_numpy(picture.target)
        if gaps:
            ids = torch.from_numpy(picture.ids)
            void = ids == LabelCoding.NO_INSTANCE
            cells = separate_touching(ids.masked_fill(void, 0)) != 0
            target = cells.byte().masked_fill_(void, LabelCoding.VOID)
        pixels += torch.bincount(target.ravel().int(), minlength=256)[:classes]
    found = pixels > 0
    weights = pixels.sum() / (found.sum() * pixels)
    return torch.where(found, weights, 1.0).tolist()


def _draw(run: Run, shown: Sequence[Picture], device: torch.device) -> None:
    """Write the figures of a run that has its weights."""
    from .report import curves, overlays

    with whole(run.path / folder.CURVES) as path:
        curves(run.path / folder.METRICS).savefig(path)
    items = []
    for picture in shown[:: -(-len(shown) // _DRAWN)]:
        part = picture.image[:, :_SHOWN, :_SHOWN]
        labels = np.asarray(
            predict(
                run.network(device),
                torch.from_numpy(part),
                precision=run.precision,
                progress=False,
            )
        )
        items.append((picture.name, part, picture.target[:_SHOWN, :_SHOWN], labels))
    with whole(run.path / folder.OVERLAYS) as path:
        overlays(items, run.coding.names, palette=run.coding.palette).savefig(path)
