"""What the numbers in label pictures mean, and finding it out from the files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray
from skimage.measure import label as components

from ..errors import UserError
from .files import palette_of, read_labels

__all__ = [
    "Kind",
    "LabelCoding",
    "PageIds",
    "decide",
    "detect",
    "evenly",
    "palette_of_set",
    "read_colours",
]

Kind = Literal["classes", "binary", "instances"]
MOST_CLASSES, TWO = 255, 2
COLOURS = 3 * 256  # numbers in a palette
FEW_IDS = 8  # so many ids are taken as classes, however they lie
MAIN = 0.9  # of an object's pixels are its largest piece's: what is drawn by hand leaves crumbs
OBJECTS = 0.95  # of ids that are objects make the set one of instances
SAMPLE = 32  # pages whose pixels are looked at
_HEX, _NUMBER = "([0-9a-fA-F]{2})", r"(\d{1,3})"
_COLOUR = re.compile(rf"\s*(?:#{_HEX * 3}|{_NUMBER}[ ,\t]+{_NUMBER}[ ,\t]+{_NUMBER})\b")
_GREY = (191, 191, 191)


@dataclass(frozen=True)
class LabelCoding:
    """How ids in label pictures map to class ids in memory.

    Attributes:
        kind: "classes": an id is the class. "binary" and "instances": 0 is the background, any
            other number the foreground.
        classes: number of classes, 1 to 255; 2 if binary or instances.
        ignore: the id of void pixels, which nothing is learnt from or judged by. None: 255 for
            classes, else there is none. In memory void is `VOID`, whatever it is in files.
        names: of the classes; by default "background" and "foreground", or the ids.
        palette: 768 numbers, red, green, blue of id 0 to 255, for files that are written.

    Raises:
        ValueError: attributes that do not go together.
    """

    kind: Kind
    classes: int
    ignore: int | None = None
    names: tuple[str, ...] = ()
    palette: tuple[int, ...] | None = None

    VOID: ClassVar[int] = 255
    NO_INSTANCE: ClassVar[int] = -1  # what void is among ids of instances

    def __post_init__(self) -> None:
        if self.kind == "classes" and self.ignore is None:
            object.__setattr__(self, "ignore", self.VOID)
        two = self.kind != "classes"
        names = ("background", "foreground") if two else map(str, range(self.classes))
        object.__setattr__(self, "names", tuple(self.names or names))
        for name, value, expected, good in [
            ("kind", self.kind, "classes, binary or instances", self.kind in get_args(Kind)),
            ("classes", self.classes, f"1 to {MOST_CLASSES}", 1 <= self.classes <= MOST_CLASSES),
            ("classes", self.classes, f"2, being {self.kind}", not two or self.classes == TWO),
            ("names", self.names, f"{self.classes} of them", len(self.names) == self.classes),
            (
                "palette",
                self.palette,
                "768 numbers",
                len(self.palette or range(COLOURS)) == COLOURS,
            ),
        ]:
            if not good:
                raise ValueError(f"expected {name} {expected}, got {value}")

    def encode(self, labels: NDArray[Any], source: str) -> NDArray[np.uint8]:
        """Turn ids of a file, of any shape and integer dtype, into class ids and `VOID`.

        Args:
            labels: the ids.
            source: what to call them, if they do not fit.

        Raises:
            UserError: an id that is no class; says where it is first found.
        """
        wrong = self.misfits(labels)
        if wrong.any():
            where = tuple(int(i) for i in np.unravel_index(wrong.argmax(), wrong.shape))
            raise UserError(self.refusal(source, int(labels[where]), where))
        foreground = labels if self.kind == "classes" else labels != 0
        target = foreground.astype(np.uint8)
        if self.ignore is not None:
            target[labels == self.ignore] = self.VOID
        return target

    def instances(self, labels: NDArray[Any]) -> NDArray[np.int32]:
        """Turn ids of a file, of any shape and integer dtype, into ids of instances.

        Returns:
            0 for the background, -1 for void, and numbers from 1 on, in the order of the ids.
        """
        found, index = np.unique(labels, return_inverse=True)
        nothing = found == 0
        void = np.zeros_like(nothing) if self.ignore is None else found == self.ignore
        numbers = np.cumsum(~(nothing | void), dtype=np.int32)
        numbers[nothing] = 0
        numbers[void] = self.NO_INSTANCE
        return numbers[index].reshape(labels.shape)

    def misfits(self, ids: NDArray[Any]) -> NDArray[np.bool_]:
        """Where ids, of any shape, are no class and not void."""
        wrong: NDArray[np.bool_] = ids < 0
        if self.kind == "classes":
            wrong |= ids >= self.classes
        if self.ignore is not None:
            wrong &= ids != self.ignore
        return wrong

    def refusal(self, source: str, value: int, where: tuple[int, ...] = ()) -> str:
        """Say in a line that `source` holds an id that is no class, at an index of an array."""
        axes = ("page ", "row ", "column ")[-len(where) :] if where else ()
        place = "".join(
            f", {axis}{index}"
            for axis, index in zip(axes, where, strict=True)
            if axis != "page " or index > 0
        )
        ids = f"0 to {self.classes - 1}" if self.kind == "classes" else "0 or above"
        void = "" if self.ignore is None else f", or {self.ignore} for void"
        return (
            f"{source}: id {value}{place}: expected {ids}{void}; set the number of classes, or the "
            "id to ignore"
        )

    def decode(self, target: NDArray[Any]) -> NDArray[np.uint8]:
        """Turn class ids into what files of predictions hold: ids, or 0 and 255 for two."""
        if self.kind == "classes":
            return target.astype(np.uint8)
        return np.where(target == 1, np.uint8(255), np.uint8(0))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for TOML; what is None is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LabelCoding:
        """Undo `to_dict`.

        Raises:
            ValueError: values that are missing or do not go together.
        """
        known = {field.name for field in fields(cls)}
        if not {"kind", "classes"} <= values.keys() <= known:
            raise ValueError(f"expected kind, classes and of {sorted(known)}, got {list(values)}")
        return cls(
            values["kind"],
            values["classes"],
            values.get("ignore"),
            tuple(values.get("names", ())),
            tuple(values["palette"]) if "palette" in values else None,
        )


@dataclass(frozen=True)
class PageIds:
    """What tells the coding of a page of labels.

    Attributes:
        source: its name, for messages.
        ids: the numbers in it, ascending.
        counts: their pixels.
        objects: how many ids, 0 left out, are one object: 90 % of their pixels or more are one
            8-connected piece.
    """

    source: str
    ids: NDArray[Any]
    counts: NDArray[np.intp]
    objects: int

    @classmethod
    def of(cls, source: str, labels: NDArray[Any]) -> PageIds:
        """Look at a page (H, W)."""
        ids, counts = np.unique(labels, return_counts=True)
        pieces: NDArray[np.intp]
        pieces, count = components(  # type: ignore[no-untyped-call]
            labels, background=0, return_num=True, connectivity=2
        )
        ids_of_pieces = np.zeros(count + 1, labels.dtype)
        ids_of_pieces[pieces] = labels
        largest = np.zeros(len(ids), np.intp)
        np.maximum.at(
            largest, np.searchsorted(ids, ids_of_pieces[1:]), np.bincount(pieces.ravel())[1:]
        )
        return cls(source, ids, counts, int(np.count_nonzero(largest >= MAIN * counts)))


def detect(
    paths: Sequence[Path],
    *,
    kind: str = "auto",
    classes: int | None = None,
    ignore: int | None = None,
    names: Sequence[str] | None = None,
) -> LabelCoding:
    """Find out how label pictures are coded.

    The pixels of at most 32 pages, evenly spread, are looked at. PNGs with a palette of colours
    hold classes. Else {0, v}, v > 1, is binary; more than 8 ids of which 95 %, page by page, are
    one object each are instances; all other numbers are classes, up to the highest found. Of
    classes, 255 is void if all others are below 254, and so is a negative number if there is only
    one.

    Args:
        paths: the files, one at least.
        kind: "auto", "classes", "binary" or "instances".
        classes: number of classes; None finds it.
        ignore: id of void pixels; None finds it.
        names: of the classes.

    Raises:
        UserError: a file cannot be read, or the files do not fit the options.
        ValueError: another kind; no paths.
    """
    if not paths:
        raise ValueError("paths: expected one label picture at least")
    palette = palette_of_set(paths)
    files = evenly(len(paths), SAMPLE)
    pages: list[PageIds] = []
    for index in files:
        labels = read_labels(paths[index])
        pages += (
            PageIds.of(str(paths[index]), labels[page])
            for page in evenly(len(labels), SAMPLE // len(files))
        )
    return decide(pages, palette, kind=kind, classes=classes, ignore=ignore, names=names)


def decide(
    pages: Sequence[PageIds],
    palette: tuple[int, ...] | None = None,
    *,
    kind: str = "auto",
    classes: int | None = None,
    ignore: int | None = None,
    names: Sequence[str] | None = None,
) -> LabelCoding:
    """Tell the coding from pages, one at least, as `detect` does.

    Raises:
        UserError: the pages do not fit the options.
        ValueError: another kind.
    """
    if kind not in {"auto", *get_args(Kind)}:
        raise ValueError(f"kind: expected auto, classes, binary or instances, got {kind!r}")
    asked = len(names) if classes is None and names else classes
    if kind == "auto":
        kind = "classes" if (asked or 0) > TWO else _kind(pages, ignore, coloured=bool(palette))
    if kind != "classes":
        if asked not in {None, TWO}:
            raise UserError(
                f"{pages[0].source}: labels are {kind}: expected 2 classes, got {asked}"
            )
        return _coding(cast(Kind, kind), TWO, ignore, names, None)
    negative = {int(number) for page in pages for number in page.ids[page.ids < 0]}
    if ignore is None:
        ignore = negative.pop() if len(negative) == 1 else LabelCoding.VOID
    highest, source = max(
        (int(page.ids[page.ids != ignore].max(initial=0)), page.source) for page in pages
    )
    if asked is None and highest >= MOST_CLASSES:
        raise UserError(
            f"{source}: id {highest}: expected at most {MOST_CLASSES} classes; if ids are those of "
            "objects, say that the kind is instances"
        )
    coding = _coding("classes", highest + 1 if asked is None else asked, ignore, names, palette)
    for page in pages:
        if len(wrong := page.ids[coding.misfits(page.ids)]):
            raise UserError(coding.refusal(page.source, int(wrong[0])))
    return coding


def palette_of_set(paths: Sequence[Path]) -> tuple[int, ...] | None:
    """Give the first palette among PNGs that is more than the index repeated as grey.

    Raises:
        UserError: a PNG cannot be read.
    """
    grey = [index for index in range(256) for _ in "rgb"]
    palettes = (palette_of(path) for path in paths if path.suffix.lower() == ".png")
    return next((tuple(palette) for palette in palettes if palette and palette != grey), None)


def read_colours(path: str | Path, classes: int) -> tuple[int, ...]:
    """Read the colours of classes from a text file: a line each, in the order of their ids.

    A line holds ``#RRGGBB``, or red, green and blue from 0 to 255 with spaces or commas between;
    what follows, such as the name, is passed over, and so are empty lines.

    Returns:
        768 numbers, as a palette has them: of ids that are no class black, of void light grey.

    Raises:
        UserError: the file cannot be read, a line is no colour, or there is not one for each class.
    """
    try:
        lines = [
            line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()
        ]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', error)}") from error
    palette = [0] * COLOURS
    palette[-3:] = _GREY
    for index, line in enumerate(lines[:classes]):
        match = _COLOUR.match(line)
        parts = match.groups() if match else ()
        numbers = [int(part, 16 if parts[0] else 10) for part in parts if part]
        if len(numbers) != 3 or max(numbers) > 255:  # noqa: PLR2004
            raise UserError(
                f"{path}: expected #RRGGBB, or three numbers from 0 to 255, got {line!r}"
            )
        palette[3 * index : 3 * index + 3] = numbers
    if len(lines) != classes:
        raise UserError(f"{path}: expected {classes} colours, a line each, got {len(lines)}")
    return tuple(palette)


def evenly(count: int, most: int) -> list[int]:
    """At most `most` indices, evenly spread over 0 to `count` - 1."""
    return [int(index) for index in np.linspace(0, count - 1, min(count, most)).round()]


def _kind(pages: Sequence[PageIds], ignore: int | None, *, coloured: bool) -> Kind:
    found = {int(number) for page in pages for number in page.ids} - {0, ignore}
    if not found or (
        len(found) == 1 and max(found) > 1 and (not coloured or LabelCoding.VOID in found)
    ):
        return "binary"
    if coloured or len(found) <= FEW_IDS:
        return "classes"
    ids = sum(np.count_nonzero(page.ids) for page in pages)
    return "instances" if sum(page.objects for page in pages) >= OBJECTS * ids else "classes"


def _coding(
    kind: Kind,
    classes: int,
    ignore: int | None,
    names: Sequence[str] | None,
    palette: tuple[int, ...] | None,
) -> LabelCoding:
    """Make a coding; what does not go together is the user's fault here."""
    try:
        return LabelCoding(kind, classes, ignore, tuple(names or ()), palette)
    except ValueError as error:
        raise UserError(f"labels: {error}") from error
