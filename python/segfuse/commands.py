"""The commands of ``segfuse``: their options, and what they print."""
# ruff: noqa: PLC0415, what is heavy is imported by the command that needs it

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .anatomy_command import anatomy
from .demo import DAY, MOST_STEPS, MOST_THREADS, SECONDS, STEPS, DemoError
from .demo import run as run_demo
from .evaluate_command import evaluate
from .predict_command import predict
from .terminal import (
    Classes,
    ClassNames,
    Ignore,
    Images,
    Kind,
    OneLine,
    duration,
    fail,
    is_terminal,
    option,
    say,
    tabulate,
)
from .terminal import seed as check_seed
from .train_command import train
from .weights_command import weights

__all__ = ["app"]

app = typer.Typer(
    cls=OneLine,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # "rich" would swallow [demo]
)


def _version(*, value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(version("segfuse"))
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _segfuse(
    ctx: typer.Context,
    *,
    version: Annotated[  # noqa: ARG001
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Segment images with U-Net and FCN: look at the data, train, predict, evaluate."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


app.command()(train)
app.command()(predict)


app.command()(evaluate)
app.command()(weights)
app.command()(anatomy)


@app.command()
def inspect(
    *,
    images: Images,
    labels: Annotated[
        Path | None, option("Data", help="Folder of label pictures, or one.", show_default="none")
    ] = None,
    kind: Kind = "auto",
    classes: Classes = None,
    ignore: Ignore = None,
    class_names: ClassNames = None,
    everything: Annotated[
        bool, option("Data", "--everything", help="Look at all pixels, not those of 32 pages.")
    ] = False,
) -> None:
    """Say what images and labels hold, and what is wrong with them; exits with 1 if anything is."""
    from .data.inspection import inspect as look_at

    found = look_at(
        images,
        labels,
        everything=everything,
        kind=kind,
        classes=classes,
        ignore=ignore,
        names=class_names,
    )
    say(*found.lines(), *(f"problem: {problem}" for problem in found.problems))
    if found.problems:
        raise typer.Exit(1)


@app.command()
def info() -> None:
    """Say what was built and what this machine can run of it."""
    from .info import describe

    if is_terminal():
        tabulate(describe())
    else:
        say(*(f"{name}: {sentence}" for name, sentence in describe()))


@app.command()
def demo(
    *,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the four files.")
    ] = Path("segfuse-demo"),
    seed: Annotated[
        int, typer.Option(callback=check_seed, help="Of weights, patches and dropout.")
    ] = 0,
    steps: Annotated[
        int, typer.Option(min=1, max=MOST_STEPS, help="Training steps, of four patches each.")
    ] = STEPS,
    time: Annotated[
        float,
        typer.Option(
            parser=duration,
            metavar="DURATION",
            help="Stop training after 90 (seconds), 300s, 5m or 1h, finished or not.",
        ),
    ] = SECONDS,
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_THREADS, show_default="torch's choice", help="CPU threads."),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Write into a folder that holds files of others too."),
    ] = False,
) -> None:
    """Train a small U-Net on half of a real microscopy image; show how it does on the rest.

    The image, of fluorescent cell nuclei, comes with the stardist package. Needs
    pip install 'segfuse[demo]' and about a minute on two CPU cores. Writes a picture of the
    outcome (overlay.png), the predicted mask (prediction.tif), the nuclei in it by their ids
    (instances.tif) and the weights (weights.pt).
    """
    if time > DAY:
        raise typer.BadParameter(f"expected a day at most, got {time:.0f} s", param_hint="--time")
    try:
        result = run_demo(
            output.absolute(),
            seed=seed,
            steps=steps,
            seconds=time,
            threads=threads,
            overwrite=overwrite,
            progress=True,
        )
    except DemoError as error:
        fail(str(error), 1)
    except KeyboardInterrupt:
        fail("interrupted; nothing was written", 130)
    scores = [
        ("U-Net, trained on the left half", result.unet),
        (f"Otsu's threshold of this half ({result.threshold:.0f})", result.otsu),
        ("all background", result.background),
    ]
    tabulate(
        (
            (
                name,
                f"{score.accuracy:.3f}",
                f"{score.iu:.3f}",
                f"{score.average_precision:.3f}",
                f"{score.panoptic_quality:.3f}",
            )
            for name, score in scores
        ),
        ("right half of the image, held out", "pixel accuracy", "foreground IU", "AP 0.5", "PQ"),
    )
    if result.steps < steps:
        say(
            f"The time was up after {result.steps} of {steps} steps: training is unfinished. All "
            f"take about --time {time * steps / result.steps:.0f} here; if others use this machine "
            "too, fewer --threads may be faster."
        )
    say(f"{result.steps} training steps, {result.seconds:.0f} s in all. Written:")
    written = (result.overlay, result.prediction, result.instances, result.weights)
    say(*(f"  {path}" for path in written))
