"""Which labels belong to which image, and which images are held out."""

from __future__ import annotations

import csv
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..errors import UserError
from .files import IMAGE_SUFFIXES, image_header

__all__ = [
    "Pair",
    "broken_links",
    "find_images",
    "match",
    "mismatch",
    "number",
    "pair",
    "some",
    "split",
]

NAMED = 3  # files that a message names; of more it gives the number
_ENDING = re.compile(r"([_\-. ]+[A-Za-z]+)+\d?")  # what names of labels add to those of images
_ENDING_OF_IMAGES = re.compile(r"[_\-. ](img|image|raw|0000)$", re.IGNORECASE)
_NAMES, _VALIDATION = ("id", "name", "file", "image"), {"val", "valid", "validation"}


@dataclass(frozen=True)
class Pair:
    """A page of an image and its labels.

    Attributes:
        name: the file's name without suffixes, in Unicode's NFC; of pages of a stack with ":" and
            the page's index.
        image: file.
        labels: file.
        page: index, from 0, in both files.
        rows: first and end of a block of rows, when a single picture is split; None takes all.
    """

    name: str
    image: Path
    labels: Path
    page: int = 0
    rows: tuple[int, int] | None = None


def find_images(path: str | Path) -> list[Path]:
    """List the pictures of a folder, not of folders inside it, in natural order: 2 before 10.

    Args:
        path: a folder, whose hidden files and broken links are skipped; or a file, which is listed
            as it is.

    Raises:
        UserError: there is no such folder, or no picture in it.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    try:
        names = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"cannot read folder {path}: {error.strerror}") from error
    found = [name for name in names if name.suffix.lower() in IMAGE_SUFFIXES and name.is_file()]
    if not found:
        raise UserError(
            f"{path} holds no pictures ({', '.join(IMAGE_SUFFIXES)}) among {len(names)} entries"
        )
    return sorted(found, key=_natural)


def broken_links(path: str | Path) -> list[Path]:
    """List what `find_images` leaves out of a folder as links to no file (git-annex has such)."""
    path = Path(path)
    entries = path.iterdir() if path.is_dir() else ()
    pictures = (entry for entry in entries if entry.suffix.lower() in IMAGE_SUFFIXES)
    return sorted((p for p in pictures if p.is_symlink() and not p.exists()), key=_natural)


def pair(images: str | Path, labels: str | Path) -> list[Pair]:
    """Match images with labels by their names.

    Names match that are equal up to their suffixes, or where the label's adds words: cell1.tif goes
    with cell1.png, cell1_mask.tif or cell1-seg-labels.png. A last _img, _image, _raw or _0000 of an
    image's name may be missing in its label's. Two files, one given for each, match whatever their
    names.

    Args:
        images: folder or file.
        labels: folder or file.

    Returns:
        one `Pair` a page, in natural order of the names.

    Raises:
        UserError: a file without partner, two for one, sizes or numbers of pages that differ, or
            files that cannot be read.
    """
    matched, problems = match(images, labels)
    _refuse(problems)
    result: list[Pair] = []
    mismatched = []
    for image, label in matched:
        pages = image_header(image)[0]
        if problem := mismatch(image, label):
            mismatched.append(problem)
        stem = _stem(image)
        result += (
            Pair(stem if pages == 1 else f"{stem}:{page}", image, label, page)
            for page in range(pages)
        )
    _refuse(mismatched)
    return result


def match(images: str | Path, labels: str | Path) -> tuple[list[tuple[Path, Path]], list[str]]:
    """Match files by name as `pair` does; what does not match is said, a line each.

    Raises:
        UserError: there is no such folder, no picture in it, or one folder is given for both.
    """
    images, labels = Path(images), Path(labels)
    if images.exists() and labels.exists() and images.samefile(labels):
        raise UserError(f"images and labels are both {images}: put them into folders of their own")
    image_files, label_files = find_images(images), find_images(labels)
    if images.is_file() and labels.is_file():
        return [(images, labels)], []
    by_stem: dict[str, list[Path]] = defaultdict(list)
    for image in image_files:
        by_stem[_stem(image)].append(image)
    problems = [
        f"{len(files)} images have the name {stem}: {some(files)}"
        for stem, files in by_stem.items()
        if len(files) > 1
    ]
    names = {stem: stem for stem in by_stem}
    for stem in by_stem:
        names.setdefault(_ENDING_OF_IMAGES.sub("", stem), stem)
    partners: dict[str, list[Path]] = defaultdict(list)
    strangers: list[Path] = []
    for label in label_files:
        name = _partner(_stem(label), names)
        (strangers if name is None else partners[names[name]]).append(label)
    for stem, files in partners.items():
        exact = [file for file in files if _stem(file) == stem]
        partners[stem] = exact or files
        if len(partners[stem]) > 1:
            problems.append(f"{len(files)} labels fit image {stem}: {some(files)}")
    lonely = [image for image in image_files if _stem(image) not in partners]
    if lonely:
        problems.append(f"{len(lonely)} of {len(image_files)} images lack labels: {some(lonely)}")
    if strangers:
        problems.append(
            f"{len(strangers)} of {len(label_files)} labels lack images: {some(strangers)}"
        )
    matched = [
        (files[0], partners[stem][0])
        for stem, files in by_stem.items()
        if len(files) == 1 and len(partners.get(stem, ())) == 1
    ]
    return matched, problems


def mismatch(image: Path, labels: Path) -> str | None:
    """Say in what an image and its labels differ; None if they fit.

    Raises:
        UserError: a file cannot be read.
    """
    pages, _, *size, _ = image_header(image)
    label_pages, _, *label_size, _ = image_header(labels)
    if size != label_size:
        return (
            f"{image} is {size[0]} x {size[1]} pixels (rows x columns), {labels} is "
            f"{label_size[0]} x {label_size[1]}"
        )
    if pages != label_pages:
        return (
            f"{image} has {number(pages, 'page')}, {labels} has {label_pages}; if they are "
            "channels, the TIFF must say so (ImageJ or OME)"
        )
    return None


def split(
    pairs: Sequence[Pair], how: str | Path, fraction: float, seed: int
) -> tuple[list[Pair], list[Pair]]:
    """Hold out pairs for validation.

    Args:
        pairs: as `pair` gives them.
        how: "file": files at random, with all their pages; pages, if there is one file. "block":
            the last pairs, since neighbours in a series resemble each other; of a single picture
            the lower rows. Else a file: a text with the name of a validation picture a line, or a
            table (.csv) with columns id, name, file or image, and split (train; val, valid or
            validation); pictures that the table leaves out, or marks otherwise, are left out.
        fraction: to hold out, 0 to below 1; 0 holds out none. Of no effect where `how` is a file.
        seed: of the random choice.

    Returns:
        the pairs to train on, those to validate on; in the order given.

    Raises:
        UserError: names that no pair has, or nothing left on a side.
        ValueError: a fraction out of its range.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction: expected 0 to below 1, got {fraction}")
    if how not in {"file", "block"}:
        return _listed(pairs, Path(how))
    if fraction == 0:
        return list(pairs), []
    if how == "block" and len(pairs) == 1:
        return _upper_and_lower(pairs[0], fraction)
    by_page = how == "block" or len({pair.image for pair in pairs}) == 1
    groups = list(dict.fromkeys(pair if by_page else pair.image for pair in pairs))
    if len(groups) == 1:
        raise UserError(
            f"{pairs[0].image} is a single picture, of which none can be held out: split it by "
            "block, or hold out a fraction of 0"
        )
    count = min(max(round(fraction * len(groups)), 1), len(groups) - 1)
    order = np.arange(len(groups))
    if how == "file":
        order = np.random.default_rng(seed).permutation(order)
    held = {groups[index] for index in order[-count:]}
    sides: tuple[list[Pair], list[Pair]] = ([], [])
    for pair in pairs:
        sides[(pair if by_page else pair.image) in held].append(pair)
    return sides


def _upper_and_lower(whole: Pair, fraction: float) -> tuple[list[Pair], list[Pair]]:
    first, end = whole.rows or (0, image_header(whole.image)[2])
    if end - first < 2:  # noqa: PLR2004
        raise UserError(f"{whole.image} has one row and cannot be split")
    cut = end - min(max(round(fraction * (end - first)), 1), end - first - 1)
    return [replace(whole, rows=(first, cut))], [replace(whole, rows=(cut, end))]


def _listed(pairs: Sequence[Pair], path: Path) -> tuple[list[Pair], list[Pair]]:
    """Split as a text or table says."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(
            f"split: expected file, block or a list of names, cannot read {path}: {error.strerror}"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text: expected a name a line, or a table (.csv)") from error
    table = path.suffix.lower() == ".csv"
    sides = _table(text, path) if table else _lines(text)
    known = {name: index for index, pair in enumerate(pairs) for name in _names(pair)}
    unknown = [name for name in sides if name not in known]
    if unknown:
        raise UserError(
            f"{path}: {number(len(unknown), 'name')} that no image has: {some(unknown)}"
        )
    train, validation = [], []
    for pair in pairs:
        said = {sides[name] for name in _names(pair) if name in sides}
        if len(said) > 1:
            raise UserError(f"{path} puts {pair.name} on both sides")
        if "validation" in said:
            validation.append(pair)
        elif "train" in said or not table:
            train.append(pair)
    for side, chosen in [("training", train), ("validation", validation)]:
        if not chosen:
            raise UserError(f"{path} leaves no images for {side}")
    return train, validation


def _table(text: str, path: Path) -> dict[str, str]:
    """Names and sides of a CSV."""
    rows = csv.DictReader(text.splitlines())
    columns = {str(column).strip().lower(): column for column in rows.fieldnames or ()}
    name = next((columns[column] for column in _NAMES if column in columns), None)
    if name is None or "split" not in columns:
        raise UserError(
            f"{path}: expected columns split and one of {', '.join(_NAMES)}, got "
            f"{', '.join(columns) or 'none'}"
        )
    result = {}
    for row in rows:
        side = (row[columns["split"]] or "").strip().lower()
        if side == "train" or side in _VALIDATION:
            file = _composed(Path((row[name] or "").strip()).name)
            result[file] = "train" if side == "train" else "validation"
    return result


def _lines(text: str) -> dict[str, str]:
    lines = (line.strip() for line in text.splitlines())
    names = (Path(line).name for line in lines if line and not line.startswith("#"))
    return {_composed(name): "validation" for name in names}


def _names(pair: Pair) -> Iterable[str]:
    """What a list may call a pair."""
    return {pair.name, _stem(pair.image), _composed(pair.image.name)}


def _partner(stem: str, names: Iterable[str]) -> str | None:
    """The image's name that a label's fits best: itself, else the longest that it extends."""
    if stem in names:
        return stem
    for length in range(len(stem) - 1, 0, -1):
        if stem[:length] in names and _ENDING.fullmatch(stem, length):
            return stem[:length]
    return None


def _stem(path: Path) -> str:
    return _composed(path.stem).removesuffix(".ome").removesuffix(".OME")


def _composed(name: str) -> str:
    """Give accented letters one form; macOS takes them apart."""
    return unicodedata.normalize("NFC", name)


def _natural(path: Path) -> tuple[list[str | int], str]:
    parts: list[str | int] = list(re.split(r"([0-9]+)", _stem(path).casefold()))
    parts[1::2] = map(int, parts[1::2])
    return parts, path.name


def number(count: int, thing: str) -> str:
    """Say 1 page, 2 pages."""
    return f"{count:,} {thing}{'s' * (count != 1)}"


def some(things: Sequence[Path] | Sequence[str]) -> str:
    """Name the first few."""
    named = ", ".join(Path(thing).name for thing in things[:NAMED])
    return named + (", ..." if len(things) > NAMED else "")


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        more = f" (and {len(problems) - NAMED} more)" if len(problems) > NAMED else ""
        raise UserError("; ".join(problems[:NAMED]) + more)
