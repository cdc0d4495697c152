"""Deformed, turned and scaled batches to learn from."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..ops import elastic_deform, random_deformation

__all__ = ["Deform"]

_STREAM = 1  # of the seed's numbers, apart from those that a step draws for dropout


class Deform:
    """Deform a batch, images and labels alike, in one resampling on its device.

    Each image is deformed by displacements of its own, random on a 3 x 3 grid and interpolated to
    its pixels (Ronneberger, Fischer, Brox 2015, section 3.1), turned about its middle by a uniform
    angle and scaled by a factor whose logarithm is uniform. Images are interpolated bicubically,
    labels take the nearest, so that void stays void and ids stay ids. There is no shift, since
    `Patches` lie anywhere.

    A network without padding takes images that are larger than its target by `margin` a side.
    Labels are taken of the whole image's size (`Patches(..., wide=True)`), deformed by the same
    field about the same middle, and cropped only then: a pixel of the target shows the label of
    the place that its pixel of the image shows, even one that came out of the margin. Beyond the
    image's border both are mirrored.

    Displacements that are large for the image fold it: of 10 pixels' standard deviation, they fold
    one image in a hundred that has 128 pixels a side, one in twelve of 96, every second of 64. A
    twelfth of the side is safe.

    Step s's deformation is a function of (seed, s), and of the options and the batch's size, alone;
    it is drawn on the CPU, so that it is the same on every device.

    Args:
        std: standard deviation of the displacements in pixels, along each axis.
        rotation: the largest angle in degrees, to either side.
        scale: the largest factor, from 1 on, by which what is shown becomes larger or smaller.
        margin: pixels a side by which the images are larger than the target.
        seed: a non-negative integer.

    Call:
        images (N, C, H, W) floating, labels (N, H, W) of any integer dtype and the step's number,
        from 0 on, give images and labels (N, H - 2 margin, W - 2 margin), of their dtypes.

    Raises:
        ValueError: an argument out of its range; images without pixels inside the margin, or labels
            of another size.
    """

    def __init__(
        self,
        *,
        std: float = 10.0,
        rotation: float = 0.0,
        scale: float = 1.0,
        margin: int = 0,
        seed: int = 0,
    ) -> None:
        for name, value, least in [
            ("std", std, 0),
            ("rotation", rotation, 0),
            ("scale", scale, 1),
            ("margin", margin, 0),
            ("seed", seed, 0),
        ]:
            if not least <= value < math.inf:
                raise ValueError(f"Deform: {name}: expected at least {least}, got {value}")
        self.std = std
        self.rotation = rotation
        self.scale = scale
        self.margin = margin
        self.seed = seed

    def __call__(self, image: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Deform images (N, C, H, W) and labels (N, H, W) as step `step` does."""
        m, (height, width) = self.margin, image.shape[-2:]
        if min(height, width) <= 2 * m:
            raise ValueError(f"Deform: image: expected more than {2 * m} pixels a side")
        words = np.random.SeedSequence((self.seed, step), spawn_key=(_STREAM,))
        generator = torch.Generator()
        generator.manual_seed(int(words.generate_state(1, np.uint64)[0]))
        grid, affine = random_deformation(
            len(image),
            std=self.std,
            rotation=self.rotation,
            scale=(1 / self.scale, self.scale),
            generator=generator,
        )
        image, labels = elastic_deform(
            image,
            grid.to(image.device, non_blocking=True),
            affine=affine.to(image.device, non_blocking=True),
            labels=labels,
        )
        return image, labels[:, m : height - m, m : width - m].contiguous()
