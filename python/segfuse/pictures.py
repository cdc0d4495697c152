"""Pictures to train on and to validate with, read from their files."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from .data.files import read_image, read_labels
from .data.labels import LabelCoding
from .data.normalise import Normalisation
from .data.pairs import Pair
from .data.patches import Picture
from .data.resize import Resize
from .errors import UserError

__all__ = ["as_dict", "as_pair", "checksum", "read"]


def read(
    pairs: Sequence[Pair],
    coding: LabelCoding,
    normalisation: Normalisation,
    *,
    instances: bool = False,
    resize: Resize | None = None,
) -> list[Picture]:
    """Read, resize, normalise and encode; each file once, as the pages of one follow each other.

    Args:
        pairs: what to read.
        coding: of the labels.
        normalisation: of the images.
        instances: keep the ids of instances too.
        resize: of images and labels.

    Raises:
        UserError: a file that cannot be read; labels that are not of the coding or the image's
            size; images that differ in channels or cannot be normalised.
    """
    image_of, labels_of = lru_cache(1)(read_image), lru_cache(1)(read_labels)
    pictures: list[Picture] = []
    for pair in pairs:
        image, labels = image_of(pair.image)[pair.page], labels_of(pair.labels)[pair.page]
        if image.shape[1:] != labels.shape:
            raise UserError(
                f"{pair.labels}: expected labels of the image's {image.shape[1]} x "
                f"{image.shape[2]} pixels, got {labels.shape[0]} x {labels.shape[1]}"
            )
        if pictures and len(image) != len(pictures[0].image):
            raise UserError(
                f"{pair.image}: expected {len(pictures[0].image)} channels, as {pairs[0].image} "
                f"has, got {len(image)}"
            )
        rows = slice(*(pair.rows or (None,)))
        target = coding.encode(labels, str(pair.labels))
        if resize is not None:
            rows = resize.rows(rows, *labels.shape)
            image, labels, target = resize.image(image), *map(resize.labels, (labels, target))
        target = target[rows]
        ids = coding.instances(labels[rows]) if instances else None
        try:
            pictures.append(Picture(normalisation(image[:, rows]), target, pair.name, ids))
        except ValueError as error:
            raise UserError(f"{pair.image}: {error}") from error
    return pictures


def checksum(pictures: Iterable[Picture]) -> str:
    """Return a number that changes with the pictures: 8 hexadecimal digits."""
    number = 0
    for picture in pictures:
        for array in (picture.image, picture.target, picture.ids):
            if array is not None:
                number = zlib.crc32(np.ascontiguousarray(array).data, number)
    return f"{number:08x}"


def as_dict(pair: Pair) -> dict[str, Any]:
    """Return plain values, for TOML."""
    rows = {"rows": list(pair.rows)} if pair.rows else {}
    image, labels = str(pair.image.absolute()), str(pair.labels.absolute())
    return {"name": pair.name, "image": image, "labels": labels, "page": pair.page, **rows}


def as_pair(values: dict[str, Any]) -> Pair:
    """Undo `as_dict`."""
    first_and_end = values.get("rows")
    rows = (first_and_end[0], first_and_end[1]) if first_and_end else None
    image, labels = Path(values["image"]), Path(values["labels"])
    return Pair(values["name"], image, labels, values["page"], rows)
