"""The operators.  Each has ``.reference``, the slow version in plain PyTorch that defines it."""

from __future__ import annotations

from .confusion_matrix import confusion_matrix
from .crop_concat import crop_concat
from .deconv_upsample import bilinear_kernel, deconv_upsample
from .elastic_deform import elastic_deform, random_deformation
from .gather_tiles import gather_tiles
from .label_distances import label_distances
from .separate_touching import separate_touching
from .stitch_tiles import stitch_tiles
from .unet_weight_map import unet_weight_map, unet_weight_map_2019
from .upconv_concat import upconv_concat
from .upsample_argmax import upsample_argmax
from .upsample_cross_entropy import upsample_cross_entropy
from .weighted_cross_entropy import weighted_cross_entropy

__all__ = [
    "bilinear_kernel",
    "confusion_matrix",
    "crop_concat",
    "deconv_upsample",
    "elastic_deform",
    "gather_tiles",
    "label_distances",
    "random_deformation",
    "separate_touching",
    "stitch_tiles",
    "unet_weight_map",
    "unet_weight_map_2019",
    "upconv_concat",
    "upsample_argmax",
    "upsample_cross_entropy",
    "weighted_cross_entropy",
]
