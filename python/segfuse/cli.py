"""The command ``segfuse``: a thin face over the package."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .demo import DAY, MOST_STEPS, MOST_THREADS, SECONDS, STEPS, DemoError, Result, run
from .info import describe

if TYPE_CHECKING:
    import typer

__all__ = ["application", "main"]


def main() -> None:
    """Run the command line; exit with 1 and one line where its packages are missing."""
    try:
        command = application()
    except ModuleNotFoundError as error:
        if error.name not in {"typer", "rich"}:
            raise
        sys.exit(f"segfuse: the command line needs {error.name}: pip install 'segfuse[cli]'")
    command(prog_name="segfuse")


def application() -> typer.Typer:
    """Build the typer application.

    Raises:
        ModuleNotFoundError: typer or rich is not installed.
    """
    import rich  # noqa: F401
    import typer
    from typer.core import TyperGroup

    class OneLine(TyperGroup):
        """Answers a bad value with one line instead of a page."""

        def invoke(self, ctx: Any) -> Any:
            try:
                return super().invoke(ctx)
            except typer.BadParameter as error:
                typer.echo(f"segfuse: {error.format_message()}", err=True)
                raise typer.Exit(2) from None

    app = typer.Typer(
        cls=OneLine,
        help="Fused operators for dense prediction in PyTorch, and U-Net on top of them.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",  # "rich" would swallow [demo]
    )
    app.command()(info)

    @app.command()
    def demo(
        output: Path = typer.Option(
            Path("segfuse-demo"), "--output", "-o", help="Directory for the three files."
        ),
        seed: int = typer.Option(0, min=0, max=2**63 - 1, help="Of weights, patches and dropout."),
        steps: int = typer.Option(
            STEPS, min=1, max=MOST_STEPS, help="Training steps, of four patches each."
        ),
        time: float = typer.Option(
            SECONDS, min=1.0, max=DAY, help="Seconds after which training stops, finished or not."
        ),
        threads: int | None = typer.Option(
            None, min=1, max=MOST_THREADS, show_default="torch's choice", help="CPU threads."
        ),
        overwrite: bool = typer.Option(
            False, "--overwrite", help="Write into a directory that holds files of others too."
        ),
    ) -> None:
        """Train a small U-Net on half of a real microscopy image; show how it does on the rest.

        The image, of fluorescent cell nuclei, comes with the stardist package. Needs
        pip install 'segfuse[demo]' and about a minute on two CPU cores. Writes a picture of the
        outcome (overlay.png), the predicted mask (prediction.tif) and the weights (weights.pt).
        """
        try:
            result = run(
                output.absolute(),
                seed=seed,
                steps=steps,
                seconds=time,
                threads=threads,
                overwrite=overwrite,
                progress=True,
            )
        except DemoError as error:
            typer.echo(f"segfuse: {error}", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            typer.echo("segfuse: interrupted; nothing was written", err=True)
            raise typer.Exit(130) from None
        _show(result, steps=steps, seconds=time)

    return app


def info() -> None:
    """Say what was built and what this machine can run of it."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        for name, sentence in describe():
            console.print(f"{name}: {sentence}", markup=False, highlight=False, soft_wrap=True)
        return
    table = Table(show_header=False)
    for row in describe():
        table.add_row(*row)
    console.print(table)


def _show(result: Result, *, steps: int, seconds: float) -> None:
    """Print the figures of a demo asked for `steps` in `seconds`, and where its files are."""
    from rich.console import Console
    from rich.table import Table

    table = Table("right half of the image, held out", "pixel accuracy", "foreground IU")
    for name, score in [
        ("U-Net, trained on the left half", result.unet),
        (f"Otsu's threshold of this half ({result.threshold:.0f})", result.otsu),
        ("all background", result.background),
    ]:
        table.add_row(name, f"{score.accuracy:.3f}", f"{score.iu:.3f}")
    console = Console()
    console.print(table)
    if result.steps < steps:
        console.print(
            f"The time was up after {result.steps} of {steps} steps: training is unfinished. All "
            f"take about --time {seconds * steps / result.steps:.0f} here; if others use this "
            "machine too, fewer --threads may be faster."
        )
    console.print(f"{result.steps} training steps, {result.seconds:.0f} s in all. Written:")
    for path in (result.overlay, result.prediction, result.weights):
        console.print(f"  {path}", markup=False, highlight=False, soft_wrap=True)
