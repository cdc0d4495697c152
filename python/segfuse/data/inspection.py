"""A look at images and labels before training: what they are, and what is wrong with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from .files import image_header, read_image, read_labels
from .labels import SAMPLE, LabelCoding, PageIds, decide, evenly, palette_of_set
from .normalise import thinned
from .pairs import broken_links, find_images, match, mismatch, number, some

__all__ = ["Inspection", "inspect"]

PERCENTILES = (1.0, 50.0, 99.8)
LISTED = 5  # sizes and the like that `lines` gives; of more it gives the number

T = TypeVar("T")


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        files: images.
        pages: in all images that can be read.
        sizes: pages by (H, W).
        channels: pages by number of channels.
        dtypes: pages by dtype, as `segfuse.data.read_image` gives them.
        sampled: pages of images whose pixels were looked at.
        grey: lowest value, percentiles 1, 50 and 99.8 (of every n-th pixel), and highest.
        label_files: pictures of labels; 0 if none were given.
        label_dtypes: sampled pages of labels by dtype.
        label_pages: pages of labels whose pixels were looked at; all below is of them.
        coding: of the labels; None if it cannot be told.
        shares: of the classes, of the pixels that are not void.
        void: share of void pixels.
        instances: fewest, median and most ids a page, if the labels are instances.
        touching: pairs of instances that have 8-neighbouring pixels.
        problems: a line each, with the files' names.
    """

    files: int
    pages: int
    sizes: dict[tuple[int, int], int]
    channels: dict[int, int]
    dtypes: dict[str, int]
    sampled: int
    grey: tuple[float, ...] | None
    label_files: int = 0
    label_dtypes: dict[str, int] = field(default_factory=dict)
    label_pages: int = 0
    coding: LabelCoding | None = None
    shares: tuple[float, ...] = ()
    void: float = 0.0
    instances: tuple[int, float, int] | None = None
    touching: int | None = None
    problems: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Say in a line each what was found; `problems` is not among them."""
        sizes = {f"{height} x {width}": count for (height, width), count in self.sizes.items()}
        lines = [
            f"images: {number(self.files, 'file')}, {number(self.pages, 'page')}",
            f"rows x columns: {_counted(sizes)}",
            f"channels: {_counted(self.channels)}",
            f"dtype: {_counted(self.dtypes)}",
        ]
        if self.grey is not None:
            least, *percentiles, most = (f"{value:.6g}" for value in self.grey)
            found = ", ".join(
                f"{value} ({percent:g} %)"
                for percent, value in zip(PERCENTILES, percentiles, strict=True)
            )
            lines.append(
                f"values: {least} to {most}; percentiles {found}; {number(self.sampled, 'page')}"
            )
        if self.label_files:
            lines.append(
                f"labels: {number(self.label_files, 'file')}, {_counted(self.label_dtypes)}"
            )
        if self.coding is not None:
            void = "none" if self.coding.ignore is None else f"{self.coding.ignore}"
            kind = f"{self.coding.kind}, {self.coding.classes} classes"
            lines += [
                f"coding: {kind}; void: {void}",
                f"shares of {number(self.label_pages, 'page')}:",
            ]
            lines += (
                f"  {name}: {share:.2%}"
                for name, share in zip(self.coding.names, self.shares, strict=True)
            )
            lines.append(f"  void: {self.void:.2%}")
        if self.instances is not None:
            fewest, median, largest = self.instances
            lines.append(f"instances a page: {fewest} to {largest}, median {median:g}")
            lines.append(f"touching: {number(self.touching or 0, 'pair')} of instances")
        return lines


def inspect(
    images: str | Path,
    labels: str | Path | None = None,
    *,
    everything: bool = False,
    kind: str = "auto",
    classes: int | None = None,
    ignore: int | None = None,
    names: Sequence[str] | None = None,
) -> Inspection:
    """Look at all files' headers and at the pixels of 32 pages, evenly spread.

    Args:
        images: folder or file.
        labels: folder or file, matched by name as `segfuse.data.pair` does.
        everything: look at the pixels of all pages.
        kind: of the labels; this and the following as `segfuse.data.detect` takes them.
        classes: number of classes.
        ignore: id of void pixels.
        names: of the classes.

    Raises:
        UserError: a folder that is missing or holds no pictures. Whatever is wrong with single
            files stands in `Inspection.problems`.
    """
    problems: list[str] = []
    files = find_images(images)
    problems += (
        f"{number(len(broken), 'broken link')} in {folder}: {some(broken)}"
        for folder in (images, labels)
        if folder is not None and (broken := broken_links(folder))
    )
    headers = {file: _tried(problems, image_header, file) for file in files}
    known = {file: header for file, header in headers.items() if header is not None}
    pixels = _Pixels.of(_pages(list(known), read_image, problems, everything=everything))
    pages: Counter[tuple[Any, ...]] = Counter()
    for count, *layout in known.values():
        pages[tuple(layout)] += count
    channels, dtypes = _by(pages, 0), _by(pages, 3)
    problems += (
        f"images differ in {what}: {_counted(counts)}"
        for what, counts in [("number of channels", channels), ("dtype", dtypes)]
        if len(counts) > 1
    )
    if pixels.flat:
        problems.append(
            f"{number(len(pixels.flat), 'page')} of images with one value: {some(pixels.flat)}"
        )
    result = Inspection(
        files=len(files),
        pages=pages.total(),
        sizes=_by(pages, 1, 2),
        channels=channels,
        dtypes=dtypes,
        sampled=pixels.count,
        grey=pixels.grey,
    )
    if labels is not None:
        matched, found = match(images, labels)
        problems += found
        problems += filter(
            None, (_tried(problems, mismatch, *both) for both in matched if both[0] in known)
        )
        label_files = [label for _, label in matched]
        read = _pages(label_files, read_labels, problems, everything=everything)
        options = {"kind": kind, "classes": classes, "ignore": ignore, "names": names}
        result = replace(result, **_labels(label_files, read, options, problems))
    return replace(result, problems=tuple(dict.fromkeys(problems)))


@dataclass(frozen=True)
class _Pixels:
    """Of pages of images: how many, the values as `Inspection.grey`, and those of one value."""

    count: int
    grey: tuple[float, ...] | None
    flat: list[str]

    @classmethod
    def of(cls, pages: Iterable[tuple[str, NDArray[Any]]]) -> _Pixels:
        sample, ranges, flat = [], [], []
        for name, page in pages:
            sample.append(thinned(page).ravel())
            ranges.append((float(page.min()), float(page.max())))
            if ranges[-1][0] == ranges[-1][1]:
                flat.append(name)
        if not sample:
            return cls(0, None, flat)
        percentiles = np.percentile(np.concatenate(sample), PERCENTILES).tolist()
        least, most = min(low for low, _ in ranges), max(high for _, high in ranges)
        return cls(len(sample), (least, *percentiles, most), flat)


def _labels(
    files: list[Path],
    read: Iterable[tuple[str, NDArray[Any]]],
    options: dict[str, Any],
    problems: list[str],
) -> dict[str, Any]:
    """The fields of `Inspection` that are about labels; what is wrong is added to `problems`."""
    pages, dtypes, touching = [], Counter[str](), 0
    for name, labels in read:
        pages.append(PageIds.of(name, labels))
        dtypes[labels.dtype.name] += 1
        touching += _touching(labels, options["ignore"])
    result = {"label_files": len(files), "label_dtypes": dict(dtypes), "label_pages": len(pages)}
    palette = _tried(problems, palette_of_set, files)
    coding = _tried(problems, partial(decide, pages, palette, **options)) if pages else None
    if empty := [page.source for page in pages if not page.ids.any()]:
        problems.append(
            f"{number(len(empty), 'page')} of labels with background alone: {some(empty)}"
        )
    if coding is None:
        return result
    pixels = np.zeros(coding.VOID + 1)
    for page in pages:
        np.add.at(pixels, coding.encode(page.ids, page.source), page.counts)
    seen = pixels[: coding.classes]
    found = np.count_nonzero(seen)
    if options["classes"] is None and not options["names"] and 2 * found < coding.classes:
        problems.append(
            f"labels are read as {coding.classes} classes, of which {found} have pixels: set the "
            "number of classes if that is right, else the kind or the id to ignore"
        )
    result |= {
        "coding": coding,
        "shares": tuple((seen / max(seen.sum(), 1)).tolist()),
        "void": float(pixels[coding.VOID] / pixels.sum()),
    }
    if coding.kind == "instances":
        numbers = [len(set(page.ids.tolist()) - {0, coding.ignore}) for page in pages]
        extent = (min(numbers), float(np.median(numbers)), max(numbers))
        result |= {"instances": extent, "touching": touching}
    return result


def _touching(labels: NDArray[Any], ignore: int | None) -> int:
    """Count the pairs of ids of a page (H, W), but 0 and `ignore`, that are 8-neighbours."""
    pairs = []
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        height, width = labels.shape[0] - down, labels.shape[1]
        a = labels[:height, max(0, -right) : width - max(0, right)]
        b = labels[down:, max(0, right) : width - max(0, -right)]
        meet = (a != b) & (a != 0) & (b != 0)
        if ignore is not None:
            meet &= (a != ignore) & (b != ignore)
        pairs.append(np.sort(np.stack([a[meet], b[meet]]), axis=0))
    return len(np.unique(np.concatenate(pairs, axis=1).T, axis=0))


def _pages(
    files: Sequence[Path],
    read: Callable[[Path], NDArray[Any]],
    problems: list[str],
    *,
    everything: bool,
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Names and pixels of the pages to look at; files that cannot be read go to `problems`."""
    chosen = evenly(len(files), len(files) if everything else SAMPLE)
    for index in chosen:
        stack = _tried(problems, read, files[index])
        if stack is None:
            continue
        room = len(stack) if everything else SAMPLE // len(chosen)
        for page in evenly(len(stack), room):
            name = files[index].name
            yield (name if len(stack) == 1 else f"{name}, page {page}"), stack[page]


def _tried(problems: list[str], function: Callable[..., T], *arguments: Any) -> T | None:
    """What the function returns; what it refuses goes to `problems`."""
    try:
        return function(*arguments)
    except UserError as error:
        problems.append(str(error))
        return None


def _by(pages: Counter[tuple[Any, ...]], *fields: int) -> dict[Any, int]:
    """Pages by one field, or several, of their layout (C, H, W, dtype), most pages first."""
    counts: Counter[Any] = Counter()
    for layout, count in pages.items():
        counts[itemgetter(*fields)(layout)] += count
    return dict(counts.most_common())


def _counted(counts: Mapping[Any, int]) -> str:
    """One thing as it is; of several, the most frequent with their pages."""
    if len(counts) == 1:
        return str(*counts)
    named = [f"{thing} ({number(count, 'page')})" for thing, count in list(counts.items())[:LISTED]]
    return ", ".join(named) + (f", and {len(counts) - LISTED} more" * (len(counts) > LISTED))
