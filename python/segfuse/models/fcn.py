"""FCN (Long, Shelhamer, Darrell, CVPR 2015) on any backbone, with crops that follow from it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ..geometry import Axis
from ..geometry.network import trace
from ..nn.upsampling import DeconvUpsample
from .backbones import Backbone, Encoder
from .backbones import backbone as make_backbone

__all__ = ["FCN", "align", "named_fcn"]

_STRIDES = (32, 16, 8)
_UPSAMPLE = ("learned", "fixed", "bilinear")
_AT_ONCE = {16: 0.01, 8: 0.0001}  # by which the release scales pool4 and pool3
_READ_AT = 256  # pixels a side; positions are the same at all sizes


class FCN(nn.Module):
    """Fully convolutional network of a classifier, with the skips of FCN-32s, 16s and 8s.

    Jonathan Long, Evan Shelhamer, Trevor Darrell: Fully Convolutional Networks for Semantic
    Segmentation, CVPR 2015; Section 4.1 is the network, 4.2 the skips. A 1x1 convolution scores the
    head's map at stride 32. For a finer stride these scores are upsampled by 2 and added to those
    of the backbone's map at stride 16, and so again at 8. Last they are upsampled to the image.
    Scoring layers start at zero, as published, so an FCN gives zeros until it is trained.

    Where a map lies against another, and so what is to be cropped, follows from the layers
    (:mod:`segfuse.geometry`) once, at construction; `crops` lists it. Filters are of 2 f elements
    for a factor of f or, where only an odd one can be aligned, as in AlexNet, of 2 f - 1.

    In the state dict ``encoder`` is the backbone (`backbones.Encoder`), ``score32``, ``score16``,
    ``score8`` are the scoring layers, ``up16``, ``up8`` the learned filters, and ``scaling`` says
    what images the weights were trained on.

    Args:
        backbone: a name of `backbones.BACKBONES`, its weights drawn at random, or a network, whose
            parameters are then shared (`backbones.Backbone.encoder`) and trained with these.
        classes: channels of the scores.
        stride: of the finest map that is scored: 32, 16 or 8.
        upsample: "learned", as published: the filters that upsample by 2 start bilinear and learn,
            a filter a class, and the last is bilinear (Section 4.3). "fixed", as released: all are
            bilinear. "bilinear": all are, and beyond their border the scores go on, where with the
            other two they fall to zero. Of an aligned VGG and an image of whole strides this is
            ``F.interpolate(align_corners=False)``, to the last pixel.
        layout: of the encoder. "published": the image is padded by 100 pixels. "aligned": windows
            are padded by half their width, so that maps cover the image and nothing is wasted.
        at_once: the map at stride 16 is multiplied by 0.01 and that at 8 by 0.0001 before they are
            scored, as released for a training of all strides at once, with one rate for all.

    Attributes:
        in_channels: of the images that it is meant for, 3 or 1; it takes both.
        crops: name of a layer (score16, score8, up16, up8, up) to the elements that are cropped
            from the start of its map; the ends follow. Layers of which none are have no entry.

    Shape:
        (N, 3, H, W), RGB in 0..1, or grey (N, 1, H, W), to (N, classes, H, W), for any H and W. If
        the upsampled scores do not reach the image's last pixels, coarse elements are added behind:
        zeros or, with "bilinear", repeated ones. The layouts of the backbones here never need them.

    Dtype:
        The image has the parameters' dtype, and so have the scores.

    Coarse scores:
        It has `segfuse.nn.CoarseScores`: `coarse_scores` gives the scores before the last
        upsampling, and `upsampling` says how ``segfuse.ops.upsample_argmax`` and
        ``upsample_cross_entropy`` go on from there, so that those of the image's size need not be
        stored. `segfuse.predict` makes labels so.

    Raises:
        ValueError: an argument out of its range; maps of the encoder that are not of stride 8, 16
            and 32, or cannot be aligned.

    Limits:
        The encoder is read through ``torch.export`` at construction, which takes 0.1 to 2 seconds.
        With "bilinear" torch has no deterministic gradient on CUDA.
    """

    def __init__(
        self,
        backbone: str | Backbone,
        classes: int,
        *,
        stride: Literal[32, 16, 8] = 32,
        upsample: Literal["learned", "fixed", "bilinear"] = "learned",
        layout: Literal["published", "aligned"] = "published",
        at_once: bool = False,
    ) -> None:
        super().__init__()
        is_int = isinstance(classes, int) and not isinstance(classes, bool)
        _require("classes", "an integer >= 1", classes, ok=is_int and classes >= 1)
        _require("stride", "32, 16 or 8", stride, ok=stride in _STRIDES)
        _require("upsample", "'learned', 'fixed' or 'bilinear'", upsample, ok=upsample in _UPSAMPLE)
        if isinstance(backbone, str):
            backbone = make_backbone(backbone)
        self.in_channels = 3
        self.classes = classes
        self.stride = 32
        self.upsample = upsample
        self.layout = layout
        self.at_once = at_once
        self.crops: dict[str, int] = {}
        self.scaling = backbone.scaling
        self.encoder = backbone.encoder(layout)
        self._axes = _axes(self.encoder)
        self._scores = self._axes[32]  # the axis of the scores so far
        self.score32 = self._scoring(0)
        self._end()
        while self.stride > stride:
            self._refine()

    @staticmethod
    def from_coarser(coarser: FCN, *, stride: Literal[16, 8]) -> FCN:
        """Start a finer network from a trained one, as the paper's stages do (Section 4.2).

        Args:
            coarser: of a larger stride; it is copied, and stays as it is.
            stride: 16 or 8.

        Returns:
            A network with all that the coarser has, its new scoring layers zero and its new filters
            bilinear. So it scores the same but that it interpolates in two steps. Where filters are
            odd, these are one. Where they are even, linear pieces have their kinks between two of
            the finer elements and are cut off there: along an axis the scores differ by at most an
            eighth of the coarse map's second difference, and on half the pixels not at all.

        Raises:
            ValueError: a stride that is not finer.
        """
        finer_ones = [s for s in _STRIDES if s < coarser.stride]
        expected = " or ".join(map(str, finer_ones)) or "a coarser network than of stride 8"
        _require("stride", expected, stride, ok=stride in finer_ones)
        finer = copy.deepcopy(coarser)
        finer.zero_grad()
        while finer.stride > stride:
            finer._refine()  # noqa: SLF001 - it is of this class
        return finer

    def _refine(self) -> None:
        """Score the map of half the stride too."""
        self.stride //= 2
        axis = self._axes[self.stride]
        up, scores = self._aligned(axis, 2, learned=self.upsample == "learned")
        ahead = int(scores.offset(axis))
        score = self._scoring(_STRIDES.index(self.stride))
        self.add_module(f"score{self.stride}", score.train(self.training))
        self.add_module(f"up{self.stride}", up.train(self.training))
        self._crop(f"up{self.stride}", ahead)
        self._crop(f"score{self.stride}", -ahead)
        self._scores = scores.padded(min(0, -ahead), 0)
        self._end()

    def _end(self) -> None:
        """Upsample to the image."""
        image = Axis(0, 1)
        self.up, scores = self._aligned(image, self.stride, learned=False)
        ahead = int(scores.offset(image))
        _require("backbone", "maps that begin before the image", -ahead, ok=ahead >= 0)
        self._crop("up", ahead)

    def _scoring(self, which: int) -> nn.Conv2d:
        like = self.score32.weight if which else next(self.encoder.parameters())
        channels = self.encoder.channels[-1 - which]
        conv = nn.Conv2d(channels, self.classes, 1, device=like.device, dtype=like.dtype)
        for p in conv.parameters():
            nn.init.zeros_(p)
        return conv

    def _aligned(self, fine: Axis, factor: int, *, learned: bool) -> tuple[DeconvUpsample, Axis]:
        """The filter that upsamples the scores so far, and the axis of the result, uncropped."""
        kernel, axis = align(self._scores.padded(self._rim, self._rim), fine, factor)
        like = self.score32.weight
        with like.device:
            up = DeconvUpsample(self.classes, factor, kernel_size=kernel, learned=learned)
        return up.to(like.dtype), axis

    def _crop(self, layer: str, count: int) -> None:
        self.crops.pop(layer, None)
        if count > 0:
            self.crops[layer] = count

    @property
    def _rim(self) -> int:
        """Elements by which scores are continued on each side."""
        return int(self.upsample == "bilinear")

    def forward(self, images: Tensor) -> Tensor:
        """Compute scores (N, classes, H, W) of images (N, 3, H, W) or (N, 1, H, W)."""
        coarse, offset = self.coarse_scores(images), self.crops.get("up", 0)
        full: Tensor = self.up(coarse, offset=offset, size=tuple(images.shape[2:]))
        return full

    @property
    def upsampling(self) -> dict[str, Any]:
        """How coarse scores are upsampled to the image; see `segfuse.nn.CoarseScores`."""
        return {
            "factor": self.up.factor,
            "kernel_size": self.up.kernel_size,
            "weight": self.up.weight,
            "offset": self.crops.get("up", 0),
        }

    def coarse_scores(self, images: Tensor) -> Tensor:
        """Compute the scores (N, classes, h, w) before the last upsampling.

        They reach as far as it needs for images of this size.
        """
        at8 = self.encoder.to8(self.scaling(images))
        at16 = self.encoder.to16(at8)
        scores = self.score32(self.encoder.head(self.encoder.to32(at16)))
        for stride, features in ((16, at16), (8, at8)):
            if stride >= self.stride:
                scores = self._joined(scores, features, stride)
        size, crop = images.shape[2:], self.crops.get("up", 0)
        scores = self._continued(scores)
        # Elements that the last pixels want behind the map; none in the layouts of our backbones.
        # Where scores are held, the filter's slope down to zero must lie outside.
        slope = self.up.kernel_size // 2 * self._rim
        h, w = (
            max(0, -((self.up.full_size(n) - slope - crop - m) // self.up.factor))
            for n, m in zip(scores.shape[2:], size, strict=True)
        )
        if h or w:
            scores = F.pad(scores, (0, w, 0, h), mode="replicate" if self._rim else "constant")
        return scores

    def _joined(self, scores: Tensor, features: Tensor, stride: int) -> Tensor:
        """Upsample scores by 2 and add those of the features, of this stride."""
        score: nn.Module = getattr(self, f"score{stride}")
        up: DeconvUpsample = getattr(self, f"up{stride}")
        skip: Tensor = score(features * _AT_ONCE[stride] if self.at_once else features)
        before = self.crops.get(f"score{stride}", 0)
        skip = skip[:, :, before:, before:]
        scores, crop = self._continued(scores), self.crops.get(f"up{stride}", 0)
        h, w = (
            min(up.full_size(n) - crop, m)
            for n, m in zip(scores.shape[2:], skip.shape[2:], strict=True)
        )
        joined: Tensor = up(scores, offset=crop, skip=skip[:, :, :h, :w])
        return joined

    def _continued(self, scores: Tensor) -> Tensor:
        return F.pad(scores, (self._rim,) * 4, mode="replicate") if self._rim else scores


def named_fcn(
    in_channels: int,
    classes: int,
    *,
    stride: Literal[32, 16, 8],
    backbone: str = "vgg16",
    weights: str | Path | None = None,
    width: float = 1.0,
    upsample: Literal["learned", "fixed", "bilinear"] = "learned",
    layout: Literal["published", "aligned"] = "published",
    at_once: bool = False,
) -> FCN:
    """Make an `FCN` of plain values, as `segfuse.models.build` has them.

    Args:
        in_channels: 3 for RGB, or 1, where the network repeats grey.
        classes: channels of the scores.
        stride: as in `FCN`.
        backbone: a key of `backbones.BACKBONES`.
        weights: a file or a hub of its weights, as in `backbones.backbone`.
        width: a factor of the backbone's channels.
        upsample: as in `FCN`.
        layout: as in `FCN`.
        at_once: as in `FCN`.

    Raises:
        ValueError: another number of channels; what `FCN` and `backbones.backbone` refuse.
    """
    _require("in_channels", "1 or 3", in_channels, ok=in_channels in {1, 3})
    classifier = make_backbone(backbone, weights=weights, width=width)
    net = FCN(classifier, classes, stride=stride, upsample=upsample, layout=layout, at_once=at_once)
    net.in_channels = in_channels
    return net


def align(coarse: Axis, fine: Axis, factor: int) -> tuple[int, Axis]:
    """Find the filter by which one axis, upsampled, has its elements on another's.

    Args:
        coarse: of the map to upsample.
        fine: of a map whose scale is that of `coarse` divided by the factor.
        factor: of the upsampling.

    Returns:
        Its width, ``2 factor`` where that fits, else ``2 factor - 1``; the axis of the result.

    Raises:
        ValueError: neither fits.
    """
    for kernel in (2 * factor, 2 * factor - 1):
        axis = coarse.scatter((coarse.size - 1) * factor + kernel, kernel, factor)
        if axis.scale == fine.scale and axis.offset(fine).denominator == 1:
            return kernel, axis
    raise ValueError(
        f"align: expected maps that differ by whole elements or halves, got elements of "
        f"{coarse.scale} pixels from {coarse.shift} on, and of {fine.scale} from {fine.shift} on"
    )


def _axes(encoder: Encoder) -> dict[int, Axis]:
    """Stride to axis of an encoder's maps: height's, which must be width's too."""
    found = trace(encoder, (1, 3, _READ_AT, _READ_AT))
    axes = {}
    for stride, feature in zip(reversed(_STRIDES), found.outputs, strict=True):
        y, x = feature.axes
        scale = {a.scale for a in (y, x)}
        _require("backbone", f"a map of stride {stride}", sorted(scale), ok=scale == {stride})
        _require("backbone", "rows as columns", (y.shift, x.shift), ok=y.shift == x.shift)
        axes[stride] = y
    return axes


def _require(name: str, expected: str, got: object, *, ok: bool) -> None:
    if not ok:
        raise ValueError(f"FCN: expected {name} to be {expected}, got {got!r}")
