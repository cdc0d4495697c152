"""Coordinate algebra of convolutional networks: sizes, strides, receptive fields, exact margins.

``geometry.of(model, shape)`` reads any convolutional network, one's own or a library's.
"""

from .axis import Axis
from .findings import Feature, Finding, GeometryError, Resize
from .frames import Frame, input_frame, valid_sizes
from .glance import output_size
from .network import Geometry, of

__all__ = [
    "Axis",
    "Feature",
    "Finding",
    "Frame",
    "Geometry",
    "GeometryError",
    "Resize",
    "input_frame",
    "of",
    "output_size",
    "valid_sizes",
]
