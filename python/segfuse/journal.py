"""Which files of a prediction are finished, so that it can go on after a kill."""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from .errors import UserError
from .files import sync, whole
from .run import make

__all__ = ["JOURNAL", "Journal", "staged", "state_of"]

JOURNAL = "segfuse-predict.json"
_FORMAT = 1  # of the journal
_PAUSE = 1.0  # seconds between two savings of the journal


class Predicted(Protocol):
    """An image and its results."""

    @property
    def path(self) -> Path:
        """Of the image."""

    @property
    def streamed(self) -> bool:
        """Whether it is read and written by bands."""

    @property
    def results(self) -> dict[str, Path]:
        """What is written, by what it holds."""


def state_of(path: Path) -> list[int]:
    """Size and time of the last change, of a file or of all files of a folder."""
    files = [Path(at, name) for at, _, names in os.walk(path) for name in names] or [path]
    states = [file.stat() for file in files]
    return [sum(s.st_size for s in states), max(s.st_mtime_ns for s in states)]


def staged(target: Path) -> Path:
    """Where a large result is kept that is not finished, see `segfuse.tiling.targets`."""
    return target.with_name(f"{target.name}.partial")


def _begun(target: Path) -> bool:
    return target.exists() or staged(target).exists()


class Journal:
    """Which images are finished: a file that lies beside the results until all are.

    It is replaced in one step, at most once a second, and after the results that it counts are on
    disk. Results that it names and does not count are predicted again.
    """

    def __init__(self, path: Path, record: Mapping[str, Any]) -> None:
        self.path, self.record = path, dict(record)
        self.finished: set[Path] = set()
        self.results: set[str] = set()  # names of all that are, or will be, ours
        self.resumed = self.overwrite = False
        self._states: dict[str, list[int]] = {}  # of finished images, by their places
        self._unsynced: list[Path] = []
        self._saved = 0.0

    def open(self, files: Sequence[Predicted], *, resume: bool, overwrite: bool) -> None:
        """See what an earlier prediction left, and whether this one may go on or begin.

        Raises:
            UserError: it may not.
        """
        if self.path.parent.is_dir():
            with _locked(self.path.parent):
                pass
        self.resumed, self.overwrite = resume, overwrite
        found = self._found(resume=resume, overwrite=overwrite)
        if found is not None:
            self.results, self._states, overwrote = found
            self.overwrite = overwrite or overwrote
        for file in files:
            state = self._states.get(str(file.path.resolve()))
            if state is not None and state != state_of(file.path):
                if not overwrite:
                    raise UserError(
                        f"{file.path} has changed since it was predicted: begin anew (--overwrite)"
                    )
            elif state is not None and all(t.exists() for t in file.results.values()):
                self.finished.add(file.path)
                continue
            for target in file.results.values():
                self._check_free(target, streamed=file.streamed, overwrite=overwrite)
        self.results |= {t.name for file in files for t in file.results.values()}

    def _found(
        self, *, resume: bool, overwrite: bool
    ) -> tuple[set[str], dict[str, Any], bool] | None:
        """What is to be gone on with: results, finished images, whether to overwrite."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except NotADirectoryError:  # said when the folder is to be made
            return None
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}") from error
        if not resume:
            if overwrite:
                return None
            raise UserError(
                f"{self.path.parent} holds what an interrupted prediction left: go on with it "
                "(--resume), or begin anew (--overwrite)"
            )
        try:
            found: dict[str, Any] = json.loads(text)
            if found["format"] != _FORMAT:
                raise ValueError  # noqa: TRY301
            kept = set(found["results"]), dict(found["finished"]), bool(found["overwrite"])
            changed = [
                key for key, value in self.record.items() if found["prediction"].get(key) != value
            ]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if overwrite:
                return None
            raise UserError(f"{self.path} is damaged: begin anew (--overwrite)") from error
        if changed and not overwrite:
            raise UserError(
                f"{self.path.parent} holds what was begun otherwise: "
                f"{self._said(changed, found['prediction'])}: undo that, or begin anew "
                "(--overwrite)"
            )
        return None if changed else kept

    def _said(self, changed: Sequence[str], old: Mapping[str, Any]) -> str:
        return "; ".join(
            "the model has changed"
            if key == "model"
            else f"{key}: was {json.dumps(old.get(key))}, is {json.dumps(self.record[key])}"
            for key in changed
        )

    def _check_free(self, target: Path, *, streamed: bool, overwrite: bool) -> None:
        if overwrite or target.name in self.results:
            return
        if streamed and staged(target).exists() and not self.resumed:
            raise UserError(
                f"{staged(target)} holds what an interrupted prediction left: go on with it "
                "(--resume), or begin anew (--overwrite)"
            )
        if target.exists() and not (streamed and self.resumed):  # large ones tell whose they are
            none = ", and nothing says that it is of this prediction" * self.resumed
            raise UserError(
                f"{target} exists{none}: choose another output, or overwrite (--overwrite)"
            )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder, made if missing; in the end the journal is removed.

        If the block raises, it is kept, unless there is nothing to go on from.
        """
        folder = self.path.parent
        make(self.path)
        with _locked(folder) if self.path.name == f".{JOURNAL}" else ExitStack():
            left = re.compile(r"\.partial-\d+-(.+)", re.DOTALL)  # see `files.whole`
            ours = tuple(self.results | {self.path.name})
            for entry in folder.glob(".partial-*"):
                match = left.fullmatch(entry.name)
                if match and any(name[-40:] == match[1] for name in ours):
                    entry.unlink(missing_ok=True)
            self._save()
            try:
                yield
            except BaseException:
                if self._unsynced:
                    self._save()
                elif not self.finished and not any(map(_begun, map(folder.joinpath, self.results))):
                    self.path.unlink(missing_ok=True)
                raise
            for path in self._unsynced:
                sync(path)
            self.path.unlink(missing_ok=True)

    def finish(self, file: Predicted, state: list[int]) -> None:
        """Count an image as finished that was in this state when it was read."""
        self.finished.add(file.path)
        self._states[str(file.path.resolve())] = state
        self._unsynced += [] if file.streamed else file.results.values()
        if file.streamed or time.monotonic() - self._saved >= _PAUSE:
            self._save()

    def _save(self) -> None:
        for path in self._unsynced:
            sync(path)
        self._unsynced.clear()
        record = {
            "format": _FORMAT,
            "prediction": self.record,
            "overwrite": self.overwrite,
            "results": sorted(self.results),
            "finished": self._states,
        }
        with whole(self.path) as partial, partial.open("w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        sync(self.path.parent)
        self._saved = time.monotonic()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process, where its file system can.

    Raises:
        UserError: another holds it.
    """
    opened = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process predicts into {folder}: wait for it, or choose another folder"
            ) from None
        except OSError:  # some network file systems lock no folders
            pass
        yield
    finally:
        os.close(opened)
