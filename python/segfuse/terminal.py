"""What the commands of ``segfuse`` share: one line for what users did wrong, printing, options."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from .demo import MOST_THREADS
from .errors import UserError

__all__ = [
    "ClassNames",
    "Classes",
    "Device",
    "Ignore",
    "Images",
    "Kind",
    "OneLine",
    "Overwrite",
    "Threads",
    "UsageError",
    "auto",
    "class_names",
    "duration",
    "fail",
    "is_terminal",
    "option",
    "say",
    "seed",
    "tabulate",
]

UsageError: type[Any] = typer.BadParameter.__bases__[0]  # click's, wherever this typer keeps it

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
_LONGEST = 366 * 86400.0  # seconds
_NO_MEMORY = "out of memory|can't allocate memory"  # torch's words, on a GPU and on the CPU


class OneLine(TyperGroup):
    """Answers what users did wrong with one line instead of a page or a traceback."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Parse what stands before the command."""
        with _told():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        """Parse what stands after the command, and run it."""
        with _told():
            return super().invoke(ctx)


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        fail(error.format_message(), 2)
    except UserError as error:
        fail(str(error), 1)
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("segfuse"):
            raise
        fail(f"this needs {error.name.partition('.')[0]}: pip install 'segfuse[cli]'", 1)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search(_NO_MEMORY, str(error)):
            raise
        fail("out of memory: take smaller images, or train with a smaller batch or patch", 1)
    except KeyboardInterrupt:
        fail("interrupted", 130)


def fail(message: str, code: int) -> NoReturn:
    """Say on one line of stderr why, and exit."""
    typer.echo(f"segfuse: {' '.join(message.split())}", err=True)
    raise typer.Exit(code) from None


def duration(text: str) -> float:
    """Seconds of "90", "300s", "5m", "1.5h"."""
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)([smh]?)", str(text))
    seconds = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not 0 < seconds <= _LONGEST:
        raise typer.BadParameter(f"expected a duration like 90, 300s, 5m or 1h, got {text!r}")
    return seconds


def class_names(text: str | None) -> list[str] | None:
    """Names of "a,b,c", or of the lines of a file."""
    if text is None:
        return None
    try:
        listed = Path(text).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        listed = text.split(",")
    found = [name.strip() for name in listed if name.strip()]
    if not found or len(set(found)) < len(found):
        raise typer.BadParameter(
            f"expected different names a,b,... or a file with one a line, got {text!r}"
        )
    return found


def seed(value: int) -> int:
    """See that it is one for numpy and torch."""
    if not 0 <= value < 2**63:
        raise typer.BadParameter(f"expected 0 to 2**63 - 1, got {value}")
    return value


def say(*lines: str) -> None:
    """Print lines as they are, whatever the terminal's width."""
    for line in lines:
        Console().print(line, markup=False, highlight=False, soft_wrap=True)


def is_terminal() -> bool:
    """Whether what is printed is looked at."""
    return Console().is_terminal


def tabulate(rows: Iterable[Sequence[str]], head: Sequence[str] | None = None) -> None:
    """Print a table: in a box on a terminal; else a row a line, the columns lined up."""
    rows = list(rows)
    if is_terminal():
        table = Table(*(head or ()), show_header=head is not None)
        for row in rows:
            table.add_row(*map(Text, row))
        Console().print(table)
        return
    rows = [*([head] if head else []), *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        say("  ".join(map(str.ljust, row, widths)).rstrip())


# Options that commands share


def option(panel: str, *names: str, **options: Any) -> Any:
    """Return an option that the help lists in a panel."""
    return typer.Option(*names, rich_help_panel=panel, **options)


def auto(panel: str, help_: str, shown: str, **options: Any) -> Any:
    """Return an option whose default is found out later."""
    return option(panel, help=help_, show_default=shown, **options)


Images = Annotated[Path, option("Data", help="Folder of pictures, or one picture.")]
Kind = Annotated[
    Literal["auto", "classes", "binary", "instances"],
    option("Data", help="What numbers in labels are; auto finds it out."),
]
Classes = Annotated[
    int | None, auto("Data", "Number of classes.", "found in the labels", min=1, max=255)
]
Ignore = Annotated[
    int | None, auto("Data", "Id of pixels that do not count.", "255 if that is no class")
]
ClassNames = Annotated[
    str | None,
    auto("Data", "Names: a,b,c, or a text file with one a line.", "ids", callback=class_names),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")]
Device = Annotated[str, option("Machine", help="auto (a GPU if there is one), cpu, cuda, cuda:1.")]
Threads = Annotated[
    int | None, auto("Machine", "CPU threads.", "torch's choice", min=1, max=MOST_THREADS)
]
