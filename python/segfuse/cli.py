"""The command ``segfuse``: a thin face over the package. Its commands are in `segfuse.commands`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

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
    """Give the typer application.

    Raises:
        ModuleNotFoundError: typer or rich is not installed.
    """
    import rich  # noqa: F401
    import typer  # noqa: F401

    from .commands import app

    return app
