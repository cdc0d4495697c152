"""Images and labels: files, what their numbers mean, which belong together, normalisation."""

from __future__ import annotations

from .files import (
    IMAGE_SUFFIXES,
    image_header,
    palette_of,
    read_image,
    read_labels,
    write_labels,
    write_scores,
)
from .inspection import Inspection, inspect
from .labels import LabelCoding, detect, read_colours
from .normalise import Normalisation
from .pairs import Pair, find_images, pair, split
from .resize import Resize

__all__ = [
    "IMAGE_SUFFIXES",
    "Inspection",
    "LabelCoding",
    "Normalisation",
    "Pair",
    "Resize",
    "detect",
    "find_images",
    "image_header",
    "inspect",
    "pair",
    "palette_of",
    "read_colours",
    "read_image",
    "read_labels",
    "split",
    "write_labels",
    "write_scores",
]
