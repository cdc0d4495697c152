"""``segfuse anatomy``: its options, and what it prints."""
# ruff: noqa: PLC0415, what is heavy is imported when it is needed

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import typer

from .terminal import option, say, tabulate

__all__ = ["anatomy"]


def _size(text: str) -> tuple[int, int]:
    """(500, 375) of "500x375", (500, 500) of "500"."""
    match = re.fullmatch(r"([1-9]\d{0,5})(?:x([1-9]\d{0,5}))?", str(text))
    if not match:
        raise typer.BadParameter(f"expected HxW like 500x375, or a number, got {text!r}")
    return int(match[1]), int(match[2] or match[1])


def anatomy(
    model: Annotated[
        str,
        typer.Argument(
            help="unet; fcn32s, fcn16s, fcn8s; fcn-alexnet, fcn-vgg16, fcn-googlenet, those of the "
            "paper's table; or a backbone: vgg16, vgg16_bn, alexnet, googlenet, squeezenet1_0.",
            show_default=False,
        ),
    ],
    *,
    size: Annotated[
        Any,
        typer.Option(
            parser=_size,
            metavar="HxW",
            help="Of the image, in pixels.",
            show_default="500x500, of unet 572x572",
        ),
    ] = None,
    classes: Annotated[
        int | None,
        typer.Option(min=1, help="Channels of the scores.", show_default="21, of a backbone 1000"),
    ] = None,
    backbone: Annotated[
        str | None, option("FCN", help="What the network stands on.", show_default="vgg16")
    ] = None,
    layout: Annotated[
        Literal["published", "aligned"] | None,
        option("FCN", help="How its windows are padded.", show_default="published"),
    ] = None,
) -> None:
    """Show a network layer by layer, with what table 1 of the FCN paper says of it.

    A row a map: its channels and size, its stride and receptive field in pixels of the image, how
    many elements at its rim are wrong where a tile was cut, parameters and multiply-adds. Maps like
    the one before that cost nothing have no row. Backbones are shown fully convolutional.
    """
    from .anatomy import anatomy as read
    from .anatomy import summary

    options: dict[str, Any] = {"backbone": backbone, "layout": layout}
    options = {name: value for name, value in options.items() if value is not None}
    found = read(model, size, classes=classes, **options)
    head, *rows = found.table(costs=True)
    tabulate(rows, head)
    say(*summary(found))
