"""``segfuse train``: its options, what it says before and after."""
# ruff: noqa: PLC0415, what is heavy is imported when it is needed

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .errors import UserError
from .solvers import DEFAULTS, ELASTIC
from .terminal import (
    Classes,
    ClassNames,
    Device,
    Ignore,
    Kind,
    Overwrite,
    Threads,
    UsageError,
    auto,
    duration,
    fail,
    option,
    say,
    tabulate,
)
from .terminal import seed as check_seed

__all__ = ["train"]

_TERMINATED = 128 + signal.SIGTERM


def _by_solver(name: str) -> str:
    """Tell the defaults of an option: of the first network that has it, and by what others."""
    told: dict[str, list[str]] = {}
    for (kind, solver, device), row in DEFAULTS.items():
        if device == "cpu" and name in row:
            cpu, gpu = _shown(row[name]), _shown(DEFAULTS[kind, solver, "cuda"][name])
            text = cpu if gpu == cpu else f"{cpu}, on a GPU {gpu}"
            told.setdefault(text, []).append(kind if solver == "modern" else solver)
    first, *others = told
    return "; ".join([first, *(f"{', '.join(told[text])} {text}" for text in others)])


def _size(text: str) -> Any:
    """A factor such as "0.5", or rows and columns such as "180x240"."""
    if re.fullmatch(r"[1-9]\d*x[1-9]\d*", str(text)):
        return tuple(map(int, str(text).split("x")))
    if not re.fullmatch(r"\d+\.?\d*|\.\d+", str(text)) or not float(text):
        raise typer.BadParameter(f"expected a factor such as 0.5, or 180x240, got {text!r}")
    return float(text)


def _shown(value: object) -> str:
    if value is None or isinstance(value, bool):
        return "yes" if value else "none" if value is None else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def train(
    ctx: typer.Context,
    *,
    images: Annotated[Path | None, option("Data", help="Folder of images, or one.")] = None,
    labels: Annotated[
        Path | None, option("Data", help="Folder of label pictures, matched by name, or one.")
    ] = None,
    output: Annotated[
        Path | None, option("Data", "--output", "-o", help="Run folder, to be made.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Go on with a run that was stopped; no option but --device beside it."),
    ] = None,
    overwrite: Overwrite = False,
    validation: Annotated[
        float, option("Data", min=0, max=0.99, help="Fraction of the pictures to hold out.")
    ] = 0.2,
    split: Annotated[
        str,
        option(
            "Data",
            help="What is held out: random files, the last block of the series, or those that a "
            "text file (a name a line) or CSV (columns id and split) lists.",
            metavar="file|block|PATH",
        ),
    ] = "file",
    kind: Kind = "auto",
    classes: Classes = None,
    ignore: Ignore = None,
    class_names: ClassNames = None,
    colours: Annotated[
        Path | None,
        auto(
            "Data",
            "Colours of classes in pictures: a text file with #RRGGBB or three numbers a line.",
            "the labels' palette, or our own",
        ),
    ] = None,
    resize: Annotated[
        Any,
        auto(
            "Data",
            "Bring images and labels to another size first, and what is predicted back to the "
            "image's: a factor, or rows x columns.",
            "none",
            parser=_size,
            metavar="FACTOR|ROWSxCOLUMNS",
        ),
    ] = None,
    normalise: Annotated[
        Literal["percentile", "meanstd", "none"] | None,
        auto(
            "Data",
            "Of grey values, an image and channel at a time; none divides uint8 by 255 and "
            "uint16 by 65535, and leaves other numbers as they are.",
            _by_solver("normalise"),
        ),
    ] = None,
    model: Annotated[
        Literal["unet", "fcn32s", "fcn16s", "fcn8s", "unpoolnet"],
        option("Model", help="Network."),
    ] = "unet",
    stages: Annotated[
        bool,
        option(
            "Model",
            "--stages",
            help="Of fcn16s and fcn8s: train fcn32s, then each finer one from the one before, to "
            "a run folder each, with all steps or time for each.",
        ),
    ] = False,
    coarser: Annotated[
        Path | None,
        auto("Model", "Run folder of an FCN of twice the stride to start from.", "none"),
    ] = None,
    backbone: Annotated[
        Literal["alexnet", "googlenet", "squeezenet1_0", "vgg16", "vgg16_bn"] | None,
        auto("Model", "Classifier that an FCN is made of.", _by_solver("backbone")),
    ] = None,
    pretrained: Annotated[
        str | None,
        auto(
            "Model",
            "Its weights: a file (.pth, .safetensors, .npz), torchvision or timm.",
            "drawn at random",
        ),
    ] = None,
    width: Annotated[
        float | None, auto("Model", "Factor on its channels.", _by_solver("width"), min=0.01)
    ] = None,
    layout: Annotated[
        Literal["published", "aligned"] | None,
        auto("Model", "Of FCN's padding.", _by_solver("layout")),
    ] = None,
    upsample: Annotated[
        Literal["learned", "fixed", "bilinear"] | None,
        auto("Model", "How FCN's scores double in size.", _by_solver("upsample")),
    ] = None,
    at_once: Annotated[
        bool | None,
        auto("Model", "Scale what FCN's finer maps add, to train all at once.", "no"),
    ] = None,
    base: Annotated[
        int | None, auto("Model", "Channels of the first level.", _by_solver("base"), min=1)
    ] = None,
    depth: Annotated[
        int | None, auto("Model", "Poolings.", _by_solver("depth"), min=1, max=12)
    ] = None,
    padding: Annotated[
        Literal["valid", "same"] | None, auto("Model", "Of convolutions.", _by_solver("padding"))
    ] = None,
    norm: Annotated[
        Literal["batch", "none"] | None, auto("Model", "Normalisation.", _by_solver("norm"))
    ] = None,
    dropout: Annotated[
        float | None, auto("Model", "Probability.", _by_solver("dropout"), min=0, max=0.99)
    ] = None,
    up: Annotated[
        Literal["deconv", "bilinear", "unpool"] | None,
        auto("Model", "How levels double in size.", _by_solver("up")),
    ] = None,
    solver: Annotated[
        Literal["modern", "unet-paper", "fcn-paper", "fcn-released"],
        option(
            "Training", help="AdamW with a cosine, or SGD as published, for the network published."
        ),
    ] = "modern",
    objective: Annotated[
        Literal["classes", "touching"],
        option(
            "Training",
            help="Each pixel's class; or, of labels that are instances, U-Net's target that keeps "
            "touching cells apart: gaps between them, weighted.",
        ),
    ] = "classes",
    class_weight: Annotated[
        Literal["none", "balanced"] | None,
        auto(
            "Training",
            "Whether classes of few pixels weigh the more in the loss, so that all count alike.",
            "none; unet-paper with objective touching balanced",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        auto(
            "Training",
            "Stop after so many steps.",
            f"without other limits {_by_solver('steps')}",
            min=1,
        ),
    ] = None,
    epochs: Annotated[
        float | None, auto("Training", "Stop after so many passes.", "no limit")
    ] = None,
    time: Annotated[
        float | None,
        auto(
            "Training",
            "Stop after 90 (seconds), 300s, 5m or 1h.",
            "no limit",
            parser=duration,
            metavar="DURATION",
        ),
    ] = None,
    patience: Annotated[
        int | None,
        auto("Training", "Stop after so many validations without gain.", "no limit", min=1),
    ] = None,
    batch: Annotated[
        int | None, auto("Training", "Patches a step.", _by_solver("batch"), min=1)
    ] = None,
    patch: Annotated[
        int | None,
        auto(
            "Training",
            "Labelled pixels a side.",
            f"{_by_solver('patch')}; of an FCN no more than the pictures have",
            min=1,
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        auto(
            "Training",
            "The highest.",
            f"{_by_solver('learning_rate')}; fcn-paper, fcn-released as published",
        ),
    ] = None,
    encoder_rate: Annotated[
        float,
        option("Training", min=0, help="Factor on it for the layers that are an FCN's backbone's."),
    ] = 1.0,
    deform: Annotated[
        float | None,
        auto(
            "Training",
            "Elastic deformation: standard deviation in pixels of random displacements on a 3 x 3 "
            "grid a patch; 0 is off.",
            f"{_by_solver('deform')}, objective touching {ELASTIC:g}, of a patch below 120 a "
            "twelfth of it",
            min=0,
        ),
    ] = None,
    rotate: Annotated[
        float,
        option(
            "Training",
            min=0,
            max=180,
            help="Turn patches by up to so many degrees, besides right angles and flips.",
        ),
    ] = 0.0,
    scale: Annotated[
        float,
        option("Training", min=1, max=16, help="Scale patches by up to this factor, up and down."),
    ] = 1.0,
    symmetry: Annotated[
        Literal["d4", "mirror", "none"] | None,
        auto(
            "Training",
            "Poses in which patches are shown: d4, turned by right angles and mirrored; mirror, "
            "left and right exchanged, as of photographs.",
            _by_solver("symmetry"),
        ),
    ] = None,
    seed: Annotated[
        int, option("Training", callback=check_seed, help="Of all that is drawn at random.")
    ] = 0,
    precision: Annotated[
        Literal["auto", "32", "bf16", "16"],
        option("Machine", help="Mixed, but for 32; 16 runs on a GPU only; auto is the fastest."),
    ] = "auto",
    device: Device = "auto",
    threads: Threads = None,
    workers: Annotated[
        int | None, auto("Machine", "Processes that cut patches.", "by device", min=0, max=256)
    ] = None,
) -> None:
    """Train a network on images and label pictures; all that comes of it goes to a run folder."""
    given = dict(locals())
    del given["ctx"], given["resume"], given["stages"]
    sources = {name: ctx.get_parameter_source(name) for name in given}
    chosen = [name for name, source in sources.items() if source and source.name != "DEFAULT"]
    chosen += ["stages"] * stages
    if resume is not None:
        if others := [name for name in chosen if name != "device"]:
            raise typer.BadParameter(
                f"goes alone or with --device, as the run knows the rest, got {_spelt(others)} too",
                param_hint="--resume",
            )
    elif missing := [n for n in ("images", "labels", "output") if given[n] is None]:
        raise UsageError(f"Missing {_spelt(missing)}, or --resume.")
    given["names"] = given.pop("class_names")

    new = device if "device" in chosen else None
    try:
        _train(given, resume, stages=stages, device=new)
    except (KeyboardInterrupt, SystemExit) as end:
        word, code = "interrupted", 130
        if isinstance(end, SystemExit):
            if end.code != _TERMINATED:
                raise
            word, code = "terminated", _TERMINATED
        path = resume or output
        names = "config.toml", "stages.toml"
        begun = path is not None and any((path / name).exists() for name in names)
        fail(f"{word}; go on with --resume {path}" if begun else word, code)


def _train(given: dict[str, Any], resume: Path | None, *, stages: bool, device: str | None) -> None:
    """Train a network, or stages of one; begin or go on."""
    from . import training
    from .stages import Stages, is_stages

    if resume is not None and is_stages(resume):
        found = Stages.open(resume)
    elif resume is not None:
        say(*_outcome(training.resume(resume, device=device, progress=True)))
        return
    elif stages:
        found = Stages.begin(**given)
        say(*_plan({**given, "model": found.names[0]}))
        say(f"stages: {', '.join(found.names)}, each trained so")
    else:
        say(*_plan(given))
        say(*_outcome(training.fit(**given, progress=True)))
        return
    for run in found.train(device=device, progress=True):
        say(f"stage {run.path.name}", *_outcome(run))
    first, *rows = found.table()
    tabulate(rows, first)
    say(f"written: {', '.join(str(file) for file in found.written())}")


def _spelt(names: list[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def _plan(given: dict[str, Any]) -> list[str]:
    """Say what there is to train on, and how; refuse what `training.fit` would refuse first."""
    import torch

    from . import models
    from .data import pair, split
    from .data.inspection import inspect as look_at
    from .options import fill
    from .run import check_free

    check_free(given["output"], overwrite=given["overwrite"])
    files = given["images"], given["labels"]
    train, held_out = split(pair(*files), given["split"], given["validation"], given["seed"])
    network, options = fill(given)
    found = look_at(*files, **{n: given[n] for n in ("kind", "classes", "ignore", "names")})
    lines = [*found.lines(), *(f"problem: {problem}" for problem in found.problems)]
    lines.append(f"pages: {len(train)} to train on, {len(held_out)} held out for validation")
    if found.coding is not None:
        channels = next(iter(found.channels))
        try:
            with torch.device("meta"):
                net = models.build(given["model"], channels, found.coding.classes, **network)
        except ValueError as error:
            raise UserError(str(error)) from error
        count = sum(parameter.numel() for parameter in net.parameters())
        details = ", ".join(f"{name} {_shown(value)}" for name, value in network.items())
        lines.append(f"model: {given['model']}, {count:,} parameters; {details}")
        lines += [f"starts from {given[n]}" for n in ("pretrained", "coarser") if given[n]]
    limits = [
        f"{number:g} {unit}"
        for number, unit in [
            (options.steps, "steps"),
            (options.epochs, "epochs"),
            (options.time, "seconds"),
        ]
        if number
    ]
    lines.append(
        f"training: {options.solver}, {' or '.join(limits)}, "
        f"{options.batch} patches a step{_besides(options)}, "
        f"learning rate {options.learning_rate:g}, precision {options.precision}, "
        f"on {options.device}, {options.threads} threads"
    )
    return lines


def _besides(options: Any) -> str:
    """Say what else is done to patches, and learnt from them, if anything is."""
    told = [
        text
        for text, is_so in [
            (f"deformed by {options.deform:g} pixels", options.deform > 0),
            (f"turned by up to {options.rotate:g} degrees", options.rotate > 0),
            (f"scaled by up to {options.scale:g}", options.scale > 1),
            (f"symmetry {options.symmetry}", options.symmetry != "d4"),
            (f"objective {options.objective}", options.objective != "classes"),
            (f"classes {options.class_weight}", options.class_weight != "none"),
        ]
        if is_so
    ]
    return "".join(f", {text}" for text in told)


def _outcome(run: Any) -> list[str]:
    """Say what came of a training, and what the run folder holds."""
    from .run import FILES

    result = run.result
    best = result["best"]
    lines = [f"{result['steps']} steps in {result['seconds']:.0f} s, ended by {result['ended']}"]
    figures = [
        f"{name.removeprefix('validation_').replace('_', ' ').replace(' iu', ' IU')} {value:.4f}"
        for name, value in best.items()
        if name.startswith("validation_")
    ]
    if figures:
        part = result.get("validated", 1)
        of = "" if part == 1 else f", of {part:.0%} of the held out pixels"
        lines.append(f"validation, best at step {best['step']}{of}: {', '.join(figures)}")
    written = sorted(name for name in FILES if (run.path / name).exists())
    return [*lines, f"run folder {run.path}: {', '.join(written)}"]
