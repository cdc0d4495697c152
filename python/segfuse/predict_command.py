"""``segfuse predict``: its options, what it says before and after."""
# ruff: noqa: PLC0415, what is heavy is imported when it is needed

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .errors import UserError
from .objects import REACH
from .terminal import Device, Overwrite, Threads, auto, fail, option, say

__all__ = ["predict"]


def _tile(text: str) -> Any:
    """Pixels of "512" or, rows first, "512x768"; or "auto"."""
    if str(text) == "auto":
        return "auto"
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", str(text)):
        raise typer.BadParameter(f"expected auto, pixels such as 512, or 512x768, got {text!r}")
    lengths = tuple(map(int, str(text).split("x")))
    return lengths if len(lengths) > 1 else lengths[0]


def _batch(text: str) -> Any:
    if str(text) != "auto" and not re.fullmatch(r"[1-9]\d*", str(text)):
        raise typer.BadParameter(f"expected auto, or a number from 1 on, got {text!r}")
    return text if str(text) == "auto" else int(text)


def _overlap(text: str) -> Any:
    """A share such as "0.5", or pixels "64" or "64x32"."""
    if re.fullmatch(r"0?\.\d+", str(text)):
        return float(text)
    if not re.fullmatch(r"\d+(x\d+)?", str(text)):
        raise typer.BadParameter(
            f"expected a share below 1 such as 0.5, or pixels such as 64, got {text!r}"
        )
    pixels = tuple(map(int, str(text).split("x")))
    return pixels if len(pixels) > 1 else pixels[0]


def predict(
    run: Annotated[Path, typer.Argument(help="Run folder of a training.", show_default=False)],
    images: Annotated[
        list[Path],
        typer.Argument(help="Images, zarrs, or folders of them.", show_default=False),
    ],
    *,
    output: Annotated[
        Path,
        option(
            "Data",
            "--output",
            "-o",
            help="Folder for the label pictures; or, of a single image, a .png, .tif or .zarr.",
        ),
    ],
    scores: Annotated[
        bool, option("Data", "--scores", help="Write those of each class, as TIFF, too.")
    ] = False,
    probabilities: Annotated[
        bool, option("Data", "--probabilities", help="Write those of each class, as TIFF, too.")
    ] = False,
    instances: Annotated[
        bool,
        option(
            "Objects",
            "--instances",
            help="Write ids of the foreground's objects, page by page; not of images of 256 MiB "
            "and more or zarr, which are never in memory as a whole.",
        ),
    ] = False,
    smallest: Annotated[int, option("Objects", help="Drop objects of fewer pixels.", min=1)] = 1,
    holes: Annotated[
        int | None,
        auto(
            "Objects",
            "Fill background that one object encloses, of at most so many pixels.",
            "whatever its size",
            min=0,
        ),
    ] = None,
    grow: Annotated[
        Literal["gaps", "everywhere", "none"] | None,
        auto(
            "Objects",
            "gaps gives background within --reach of two objects to the nearest, as a training "
            "may open it between those that touch; everywhere all within reach of one.",
            "gaps of a run of objective touching, else none",
        ),
    ] = None,
    reach: Annotated[float, option("Objects", help="With --grow: distance in pixels.")] = REACH,
    resume: Annotated[
        bool, option("Data", "--resume", help="Go on with what was interrupted.")
    ] = False,
    overwrite: Overwrite = False,
    tile: Annotated[
        str,
        option(
            "Tiles",
            help="Network's input, margins included; tiles give what the whole image would.",
            parser=_tile,
            metavar="auto|PIXELS|ROWSxCOLUMNS",
        ),
    ] = "auto",
    memory: Annotated[
        str | None,
        auto(
            "Tiles",
            "For the network's maps and the bands, such as 2GB.",
            "1GB, on a GPU 80 % of what is free",
            metavar="BYTES",
        ),
    ] = None,
    batch: Annotated[
        str,
        option(
            "Tiles",
            help="Tiles at a time; auto: 1, on a GPU as memory allows.",
            parser=_batch,
            metavar="auto|NUMBER",
        ),
    ] = "auto",
    border: Annotated[
        Literal["mirror", "symmetric", "edge", "constant"],
        option("Tiles", help="How the image goes on where the network needs context."),
    ] = "mirror",
    augment: Annotated[
        Literal["d4"] | None,
        auto("Tiles", "d4 averages eight turned and mirrored copies.", "none"),
    ] = None,
    blend: Annotated[
        Literal["gaussian", "hann"] | None,
        auto("Tiles", "Average overlapping tiles, of networks that look everywhere.", "none"),
    ] = None,
    overlap: Annotated[
        float | None,
        auto(
            "Tiles",
            "With --blend: a share of the tile such as 0.5, or pixels.",
            "none",
            parser=_overlap,
            metavar="SHARE|PIXELS",
        ),
    ] = None,
    precision: Annotated[
        Literal["auto", "32", "bf16", "16"] | None,
        auto("Machine", "16 runs on a GPU only; auto is the fastest.", "as in training"),
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Segment images with a trained network; writes label pictures under the images' names.

    Large images are read, predicted and written by bands of tiles whose seams do not show: by
    default where memory asks for it. What was interrupted goes on with --resume.
    """
    from .data.pairs import number
    from .prediction_files import Objects, megapixels, prepare
    from .run import finest
    from .tiling.options import Asked

    with _told():
        asked = Asked(
            border=border,
            tile=tile,
            memory=memory,
            batch=batch,
            blend=blend,
            overlap=overlap,
            augment=augment,
        )
        chosen = finest(run)
        if chosen != run:
            say(f"stage: {chosen}, the finest that is finished")
        prediction = prepare(
            chosen,
            images,
            output,
            asked=asked,
            scores=scores,
            probabilities=probabilities,
            objects=Objects.of(
                instances=instances, smallest=smallest, holes=holes, grow=grow, reach=reach
            ),
            overwrite=overwrite,
            resume=resume,
            device=device,
            precision=precision,
            threads=threads,
        )
        say(f"to predict: {prediction.sentence()}")
        left = sum(len(file.results) for file in prediction.left)
        try:
            written = prediction.run(progress=True)
        except KeyboardInterrupt:
            begun = prediction.journal.path.exists()
            fail("interrupted; go on with --resume" if begun else "interrupted", 130)
    speed = prediction.pixels / max(prediction.seconds, 1e-9)
    if not left:
        say(f"nothing was left to do: {number(len(written), 'file')} kept")
        return
    kept = f", {number(len(written) - left, 'file')} kept" if len(written) > left else ""
    say(
        f"{number(left, 'file')} written to {output}{kept}: {megapixels(prediction.pixels)} in "
        f"{prediction.seconds:.1f} s, {megapixels(round(speed))}/s"
    )


@contextmanager
def _told() -> Iterator[None]:
    """Say what `predict` refuses, its arguments being what users typed, in one line."""
    try:
        yield
    except ValueError as error:
        refused = re.match(r"(?:predict|instances): (\w+): (.*)", str(error), re.DOTALL)
        if isinstance(error, UserError) or refused is None:
            raise
        name, why = refused.groups()
        raise UserError(f"{'' if name == 'model' else '--'}{name}: {why}") from error
