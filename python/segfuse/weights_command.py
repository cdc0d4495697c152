"""``segfuse weights``: its options, and what it prints."""
# ruff: noqa: PLC0415, what is heavy is imported when it is needed

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from .terminal import Overwrite, auto, option, say

__all__ = ["weights"]


def weights(
    labels: Annotated[
        Path, typer.Argument(help="Folder of label pictures, or one.", show_default=False)
    ],
    *,
    output: Annotated[
        Path,
        option(
            "Output",
            "--output",
            "-o",
            help="Folder for the TIFFs; or, of a single picture, a .tif, .png or .pdf.",
        ),
    ],
    w0: Annotated[float, option("Map", "--w0", help="What a border adds at most.")] = 10.0,
    sigma: Annotated[float, option("Map", help="Pixels of its fall, as of a Gaussian.")] = 5.0,
    separate: Annotated[
        bool,
        option("Map", help="Put background between cells that touch first, to weigh it."),
    ] = True,
    ignore: Annotated[int | None, auto("Map", "Id of pixels that weigh 0.", "none")] = None,
    picture: Annotated[
        bool,
        option("Output", "--picture", help="Draw each as PNG too; of a stack the first page."),
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write U-Net's weight maps of label pictures: large between cells that touch.

    Float32 TIFFs of w_c + w0 exp(-(d1 + d2)^2 / (2 sigma^2)), d1 and d2 being the distances to the
    two nearest cells: equation 2 of Ronneberger, Fischer, Brox 2015. w_c balances background and
    cells, page by page. Numbers in labels are ids of cells; of a mask, connected components are.
    """
    from .data.pairs import number
    from .weights import write_weights

    found = write_weights(
        labels,
        output,
        w0=w0,
        sigma=sigma,
        separate=separate,
        ignore=ignore,
        picture=picture,
        overwrite=overwrite,
        track=_tracked,
    )
    if found.classes:
        say("each number was taken for the id of a cell; they could be classes, or grey values")
    if found.binary:
        say(f"{number(found.binary, 'file')} read as binary, cells are its components")
    say(
        f"{number(len(found.files), 'file')} written to {output}: weights {found.least:.3g} to "
        f"{found.most:.3g}"
    )


def _tracked(files: list[Path]) -> Iterator[Path]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    if console.is_terminal and len(files) > 1:
        yield from track(files, "weighing", console=console, transient=True)
    else:
        yield from files
