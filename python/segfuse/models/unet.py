"""U-Net (Ronneberger, Fischer, Brox, MICCAI 2015) in one, two or three dimensions."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.upsampling import UpConv1d, UpConv2d, UpConv3d
from ..ops.crop_concat import crop_concat

__all__ = ["UNet"]

_KERNEL = 3  # width of every convolution of a block
_CONVOLUTIONS = 2  # in a block
_FACTOR = 2  # of pooling down and of upsampling, kernel and stride alike
_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}
_UP_CONVOLUTIONS = {1: UpConv1d, 2: UpConv2d, 3: UpConv3d}


class UNet(nn.Module):
    """U-Net, by default exactly as published.

    Olaf Ronneberger, Philipp Fischer, Thomas Brox: U-Net: Convolutional Networks for Biomedical
    Image Segmentation, MICCAI 2015. Section 2 is the architecture, Section 3 the initial weights,
    Section 3.1 the dropout. ``UNet(1, 2)`` has 23 convolutions and 31,030,658 parameters.

    Level ``l`` of the contracting path, ``l = 0 ... depth - 1``, is a block of two 3x3 convolutions
    with ReLU to ``base * 2**l`` channels, then 2x2 max-pooling; below the last lies the bottom, a
    block of ``base * 2**depth`` channels. On the way up each level doubles the size and halves the
    channels, puts the contracting path's map of its own level, cropped about its centre, in front
    (:func:`segfuse.ops.upconv_concat`), and applies a block; last, a 1x1 convolution gives the
    logits. Dropout ends the contracting path: after the blocks of its last level and of the bottom.

    The numbers are those of two dimensions; in one and three, read 3 and 3x3x3 for 3x3, and so on.
    In the state dict ``down.l``, ``upsample.l`` and ``merge.l`` are the parts of level ``l``, so
    ``upsample.0`` comes last; ``bottom`` and ``head`` are the rest.

    Args:
        in_channels: channels of the image.
        classes: channels of the logits.
        base: channels of the first level.
        depth: number of poolings.
        padding: "valid", as published: each convolution takes a pixel off every side, so the output
            is smaller than the input by `margin` a side, and inputs must have one of the sizes that
            halve evenly at every level (`fits`, `nearest_sizes`): 16 k + 60, from 188 on, for depth
            4. "same": convolutions pad with one zero, the output is of the input's size, and inputs
            must be multiples of 2**depth.
        norm: None, as published, or "batch": batch normalisation between convolution and ReLU; the
            convolutions of the blocks then have no bias.
        dropout: probability in [0, 1) of dropping an element, not a whole channel.
        up: how a level doubles the size. "deconv", as published: 2x2 transposed convolution of
            stride 2. "bilinear": 1x1 convolution and linear interpolation
            (``align_corners=False``). "unpool": 1x1 convolution, each value then put where that
            level's max-pooling found its maximum, zeros elsewhere (Noh, Hong, Han: Learning
            Deconvolution Network for Semantic Segmentation, ICCV 2015; SegNet); with padding "same"
            only, where the maps to be joined have one size.
        dims: number of spatial dimensions: 1, 2 or 3.

    Shape:
        (N, in_channels, *S) to (N, classes, *S - 2 * margin). Axes may differ in size.

    Dtype:
        The image has the parameters' dtype, any floating one, and so have the logits. Autocast and
        ``channels_last`` work as for torch's own convolutions.

    Raises:
        ValueError: an argument out of its range; in forward, a tensor of the wrong rank or channel
            count, or sizes that do not fit, with the nearest that do.

    Limits:
        Nothing is padded, cropped or resized to make an image fit: choose a size by `nearest_sizes`
        and mirror the image into it. `margin` speaks of sizes. With "bilinear" the interpolation
        also repeats the rim of each map, so that outputs at the rim depend on where the input ends,
        with padding "valid" too; with "deconv" and "valid" an output depends on its own
        surroundings alone. Under ``torch.use_deterministic_algorithms(True)`` torch refuses its
        max-unpooling, and on CUDA the gradient of its interpolation. Images without a batch axis
        are not taken.

        The Caffe network released in 2015 is not this one: its last up-convolution keeps 128
        channels where the paper halves them to 64, which makes 31,100,354 parameters.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        *,
        base: int = 64,
        depth: int = 4,
        padding: Literal["valid", "same"] = "valid",
        norm: Literal["batch"] | None = None,
        dropout: float = 0.5,
        up: Literal["deconv", "bilinear", "unpool"] = "deconv",
        dims: Literal[1, 2, 3] = 2,
    ) -> None:
        super().__init__()
        counts = {"in_channels": in_channels, "classes": classes, "base": base, "depth": depth}
        for name, value in counts.items():
            _require(name, "an integer >= 1", value, ok=_is_int(value) and value >= 1)
        _require("padding", "'valid' or 'same'", padding, ok=padding in ("valid", "same"))
        _require("norm", "None or 'batch'", norm, ok=norm in (None, "batch"))
        is_number = isinstance(dropout, (int, float)) and not isinstance(dropout, bool)
        _require("dropout", "a number in [0, 1)", dropout, ok=is_number and 0 <= dropout < 1)
        ups = ("deconv", "bilinear", "unpool")
        _require("up", "'deconv', 'bilinear' or 'unpool'", up, ok=up in ups)
        _require(
            "padding",
            "'same' with up='unpool', whose positions need a map of the size that was pooled",
            padding,
            ok=up != "unpool" or padding == "same",
        )
        _require("dims", "1, 2 or 3", dims, ok=_is_int(dims) and dims in (1, 2, 3))

        self.in_channels = in_channels
        self.classes = classes
        self.base = base
        self.depth = depth
        self.padding = padding
        self.norm = norm
        self.dropout = dropout
        self.up = up
        self.dims = dims

        width = [base * 2**level for level in range(depth + 1)]
        incoming = [in_channels, *width]
        self.down = nn.ModuleList(
            # The last level's dropout lies before both its pooling and its skip, as released.
            self._block(incoming[level], width[level], dropout=level == depth - 1)
            for level in range(depth)
        )
        self.pool = _layer("MaxPool", dims)(_FACTOR, return_indices=up == "unpool")
        self.bottom = self._block(incoming[-2], width[-1], dropout=True)
        self.upsample = nn.ModuleList(
            _UP_CONVOLUTIONS[dims](2 * c, c, _FACTOR)
            if up == "deconv"
            else _layer("Conv", dims)(2 * c, c, 1)
            for c in width[:-1]
        )
        self.unpool = _layer("MaxUnpool", dims)(_FACTOR) if up == "unpool" else None
        self.merge = nn.ModuleList(self._block(2 * c, c) for c in width[:-1])
        self.head = _layer("Conv", dims)(base, classes, 1)
        self.reset_parameters()

    def _block(self, cin: int, cout: int, *, dropout: bool = False) -> nn.Sequential:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i in range(1, _CONVOLUTIONS + 1):
            layers[f"conv{i}"] = _layer("Conv", self.dims)(
                cin if i == 1 else cout, cout, _KERNEL, padding=self._pad, bias=self.norm is None
            )
            if self.norm == "batch":
                layers[f"norm{i}"] = _layer("BatchNorm", self.dims)(cout)
            # In place, since no gradient needs the value before ReLU: one map less at the peak.
            layers[f"relu{i}"] = nn.ReLU(inplace=True)
        if dropout:
            layers["dropout"] = nn.Dropout(self.dropout)
        return nn.Sequential(layers)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew: normal with standard deviation sqrt(2 / N), biases zero.

        N is the number of inputs that reach one output (Section 3): 9 in_channels for a 3x3
        convolution, in_channels for a 1x1 and also for the 2x2 transposed convolution of stride 2,
        of whose taps one reaches each output. Batch normalisation starts afresh.
        """
        for module in self.modules():
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                incoming = module.weight[0].numel()  # weight (out, in, k, ..., k)
            elif isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
                incoming = module.weight.shape[0]  # weight (in, out, k, ..., k), stride k
            else:
                if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
                    module.reset_parameters()
                continue
            nn.init.normal_(module.weight, std=(2 / incoming) ** 0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits (N, classes, *S - 2 * margin) of images (N, in_channels, *S)."""
        # s_l: the size of level l's map after its block; t_l: of the same level on the way up.
        # With padding "same" t_l = s_l, else t_l < s_l.
        self._check(x)
        skips: list[Tensor] = []
        positions: list[Tensor] = []
        for block in self.down:
            x = block(x)  # (N, base * 2^l, *s_l)
            skips.append(x)
            if self.unpool is None:
                x = self.pool(x)  # (N, base * 2^l, *s_l / 2)
            else:
                x, where = self.pool(x)  # both (N, base * 2^l, *s_l / 2)
                positions.append(where)
        x = self.bottom(x)  # (N, base * 2^depth, *s_depth)
        for level in reversed(range(self.depth)):
            upsample = self.upsample[level]
            if isinstance(upsample, tuple(_UP_CONVOLUTIONS.values())):
                x = upsample(x, skip=skips.pop())  # (N, 2 * base * 2^l, *t_l)
            else:
                x = upsample(x)  # (N, base * 2^l, *t_l); 1x1: as small as x was
                if self.up == "bilinear":
                    # The 1x1 convolution comes first. It acts on channels and the interpolation on
                    # space, so they commute, and so does the bias, as the interpolation's weights
                    # sum to one; and on the small map it costs a quarter (an eighth in 3-D).
                    x = F.interpolate(  # (N, base * 2^l, *t_l)
                        x, scale_factor=_FACTOR, mode=_LINEAR[self.dims], align_corners=False
                    )
                elif self.unpool is not None:
                    x = self.unpool(x, positions.pop())  # (N, base * 2^l, *t_l)
                x = crop_concat(skips.pop(), x)  # (N, 2 * base * 2^l, *t_l)
            x = self.merge[level](x)  # (N, base * 2^l, *t_l - what the block eats)
        logits: Tensor = self.head(x)  # (N, classes, *S - 2 * margin)
        return logits

    def _check(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"UNet: expected x to be a torch.Tensor, got {type(x).__name__}")
        if x.dim() != self.dims + 2 or x.shape[1] != self.in_channels:
            axes = ", ".join(("D", "H", "W")[3 - self.dims :])
            raise ValueError(
                f"UNet: expected x of shape (N, {self.in_channels}, {axes}), got {tuple(x.shape)}"
            )
        misfits = [(i, size) for i, size in enumerate(x.shape[2:], 2) if not self.fits(size)]
        if misfits:
            each = "; ".join(f"axis {i}: {self._misfit(size)}" for i, size in misfits)
            raise ValueError(
                f"UNet: expected {self._fitting} on every spatial axis of x, "
                f"got {tuple(x.shape)}; {each}"
            )

    # Sizes along one axis. All follow from the size `bottom` of the deepest map after its block:
    # going up from there gives the output, going back down the contracting path the input.

    @property
    def _pad(self) -> int:
        return _KERNEL // 2 if self.padding == "same" else 0

    @property
    def _eaten(self) -> int:
        """Pixels, both sides together, that one block takes off an axis."""
        return _CONVOLUTIONS * (_KERNEL - 1 - 2 * self._pad)

    def _input_of(self, bottom: int) -> int:
        size = bottom + self._eaten
        for _ in range(self.depth):
            size = size * _FACTOR + self._eaten
        return size

    def _output_of(self, bottom: int) -> int:
        size = bottom
        for _ in range(self.depth):
            size = size * _FACTOR - self._eaten
        return size

    @property
    def stride(self) -> int:
        """2**depth: the step between sizes that fit, and the shift that the outputs follow."""
        return self._output_of(1) - self._output_of(0)

    @property
    def margin(self) -> int:
        """Pixels a side by which the output is smaller than the input: 92 as published."""
        return (self._input_of(0) - self._output_of(0)) // 2  # the same for every bottom

    @property
    def min_size(self) -> int:
        """The smallest size that fits: 188 as published."""
        # Output is stride * bottom + output_of(0). Where a map on the way becomes empty all later
        # ones are, so an output of one pixel or more shows that every map has one.
        return self._input_of(-self._output_of(0) // self.stride + 1)

    def fits(self, size: int) -> bool:
        """Whether an axis of `size` pixels can go in: every map that is pooled is even."""
        return size >= self.min_size and (size - self.min_size) % self.stride == 0

    def nearest_sizes(self, size: int) -> tuple[int | None, int]:
        """Find the largest fitting size <= `size`, None if there is none, and the smallest >=."""
        if size < self.min_size:
            return None, self.min_size
        below = size - (size - self.min_size) % self.stride
        return below, below if below == size else below + self.stride

    def output_size(self, size: int) -> int:
        """Output pixels along an axis of `size` input pixels: 572 gives 388 as published.

        Raises:
            ValueError: `size` does not fit; the text names the nearest that do.
        """
        if not self.fits(size):
            raise ValueError(f"UNet: expected {self._fitting}, got {self._misfit(size)}")
        return size - 2 * self.margin

    @property
    def _fitting(self) -> str:
        first, step = self.min_size, self.stride
        return (
            f"a size out of {first}, {first + step}, {first + 2 * step}, ... "
            f"(padding={self.padding!r}, depth={self.depth})"
        )

    def _misfit(self, size: int) -> str:
        smaller, larger = self.nearest_sizes(size)
        nearest = larger if smaller is None else f"{smaller} and {larger}"
        return f"{size} (nearest: {nearest})"


def _layer(name: str, dims: int) -> type[nn.Module]:
    """`nn.Conv2d` for ("Conv", 2), and so on."""
    layer: type[nn.Module] = getattr(nn, f"{name}{dims}d")
    return layer


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(name: str, expected: str, got: object, *, ok: bool) -> None:
    if not ok:
        raise ValueError(f"UNet: expected {name} to be {expected}, got {got!r}")
