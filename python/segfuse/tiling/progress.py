"""How far a prediction is: pixels a second and the time that is left."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

__all__ = ["Progress"]


class Progress:
    """A bar on stderr, where that is a terminal and rich is installed; sentences on stderr anyway.

    Args:
        pixels: in all.
        shown: False keeps bar and sentences away.
    """

    def __init__(self, pixels: int, *, shown: bool) -> None:
        self.pixels, self.shown = pixels, shown
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> Progress:  # noqa: PYI034 - Self is of Python 3.11
        if not (self.shown and sys.stderr.isatty()):
            return self
        try:
            from rich import progress  # noqa: PLC0415
            from rich.console import Console  # noqa: PLC0415
        except ModuleNotFoundError:
            return self

        class Speed(progress.ProgressColumn):
            def render(self, task: progress.Task) -> str:
                return f"{(task.speed or 0) / 1e6:.2f} Mpx/s"

        self.bar = progress.Progress(
            progress.TextColumn("predicting"),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            Speed(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self.task = self.bar.add_task("predicting", total=self.pixels)
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def advance(self, pixels: int) -> None:
        """Count pixels that were done."""
        if self.bar is not None:
            self.bar.advance(self.task, pixels)

    def say(self, sentence: str) -> None:
        """Tell the user."""
        if self.bar is not None:
            self.bar.console.print(f"segfuse: {sentence}", markup=False, highlight=False)
        elif self.shown:
            print(f"segfuse: {sentence}", file=sys.stderr, flush=True)  # noqa: T201
