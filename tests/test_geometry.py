"""Geometry: the algebra against brute force, what is derived of networks against what they do."""

from __future__ import annotations

import itertools
import math
import random
import weakref
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from segfuse import geometry, models
from segfuse.geometry import Axis, GeometryError
from segfuse.geometry.glance import first_tensor
from segfuse.geometry.network import Geometry, check_same, trace
from segfuse.geometry.rules import _Way
from segfuse.nn import UpConv2d
from segfuse.ops import crop_concat

Cut = tuple[int, int]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# The algebra. An axis is right if it says what a brute force finds: which elements of the input an
# element depends on, and which of those hold padding in a tile that was cut.

small = st.integers(1, 5)


@st.composite
def layers(draw: st.DrawFn) -> nn.Module:
    """One 1-D layer, all of whose weights are one."""
    kind = draw(st.sampled_from(["conv", "pool", "deconv", "pad", "upsample"]))
    k, s, d = draw(small), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    if kind == "conv":
        return nn.Conv1d(1, 1, k, s, draw(st.integers(0, d * (k - 1))), d, bias=False)
    if kind == "pool":
        return nn.AvgPool1d(k, s, draw(st.integers(0, k // 2)), ceil_mode=draw(st.booleans()))
    if kind == "deconv":
        padding = draw(st.integers(0, d * (k - 1) // 2))
        rest = draw(st.integers(0, s - 1))
        return nn.ConvTranspose1d(1, 1, k, s, padding, rest, bias=False, dilation=d)
    if kind == "pad":
        return nn.ConstantPad1d((draw(st.integers(-3, 3)), draw(st.integers(-3, 3))), 0.0)
    return nn.Upsample(scale_factor=draw(st.sampled_from([2, 4])), mode="linear")


def dependence(net: nn.Module, n: int) -> Tensor:
    """Element by input pixel: whether the one depends on the other."""
    eye = torch.eye(n, dtype=torch.float64)[:, None]
    return net(eye)[:, 0].T.abs() > 1e-12  # one image for each pixel that may be seen


def ones(net: nn.Module) -> nn.Module:
    for p in net.double().parameters():
        nn.init.ones_(p)
    return net.eval().requires_grad_(False)


@settings(max_examples=30, deadline=None)
@given(st.lists(layers(), min_size=1, max_size=3), st.integers(24, 40))
def test_what_an_element_depends_on(parts: list[nn.Module], n: int) -> None:
    net = ones(nn.Sequential(*parts))
    axis = trace(net, (1, 1, n)).output[0]
    seen = dependence(net, n)
    assert seen.shape[0] == axis.size
    for i, row in enumerate(seen):
        pixels = row.nonzero().flatten().tolist()
        if pixels:
            assert axis.scale * i + axis.lo <= pixels[0]
            assert pixels[-1] <= axis.scale * i + axis.hi
    assert axis.position(1) - axis.position(0) == axis.scale
    assert axis.reach == axis.hi - axis.lo + 1


@settings(max_examples=25, deadline=None)
@given(st.lists(layers(), min_size=1, max_size=4), st.integers(40, 60))
def test_which_elements_a_cut_spoils(parts: list[nn.Module], n: int) -> None:
    """Cut 1 stride to half the image off either end: the other elements are as in the whole."""
    net = ones(nn.Sequential(*parts))
    whole = trace(net, (1, 1, n))
    (stride,) = whole.stride
    assert_tiles(net, whole, [(0, 2), (1, 0), (3, 1)], stride)


def assert_tiles(
    net: nn.Module, whole: Geometry, cuts: Sequence[Cut], stride: int, tolerance: float = 1e-11
) -> list[tuple[Cut, Cut]]:
    """Check tiles of a 1-D network; return derived and measured rims where there are some."""
    (n,) = whole.input_size
    x = 1 + torch.rand(1, whole.shape[1], n, dtype=torch.float64)
    full = net(x)
    rims = []
    for begin, end in cuts:
        start, stop = begin * stride, n - end * stride
        if stop - start < stride or not geometry.output_size(net, (1, 1, stop - start)):
            continue
        found = trace(net, (1, x.shape[1], stop - start))
        if any(have < need for _, have, need in found.sound):
            continue
        check_same(found, whole)
        a = found.output[0]
        first = int(start / a.scale)
        bad = differs(net(x[..., start:stop]), full[..., first : first + a.size], tolerance)[0]
        lo, hi = a.bad_lo * (begin > 0), a.bad_hi * (end > 0)
        assert not bad[lo : a.size - hi].any()
        rims.append(((lo, hi), rim(bad)))
    return rims


def differs(tile: Tensor, whole: Tensor, tolerance: float) -> list[Tensor]:
    """For each spatial axis, the elements at which anything differs."""
    bad = (tile - whole).abs() > tolerance * whole.abs().max()
    spatial = range(2, bad.dim())
    return [bad.sum([d for d in range(bad.dim()) if d != k]) > 0 for k in spatial]


def rim(bad: Tensor) -> Cut:
    """Elements from either end to the last that is bad, each half by itself."""
    half = len(bad) // 2
    low, high = bad[:half].flip(0), bad[half:]
    return tuple(
        0 if not any(part) else len(part) - int(part.int().argmax()) for part in (low, high)
    )  # type: ignore[return-value]


@given(small, st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.integers(20, 40))
def test_window_against_every_element(k: int, s: int, d: int, p: int, n: int) -> None:
    size = (n + 2 * p - d * (k - 1) - 1) // s + 1
    for bad_lo, bad_hi in itertools.product(range(4), range(4)):
        axis = Axis(0, n, bad_lo=bad_lo, bad_hi=bad_hi).window(size, k, s, d, p)
        reads = [[s * i - p + d * t for t in range(k)] for i in range(size)]
        low = [i for i, r in enumerate(reads) if min(r) < bad_lo]
        high = [i for i, r in enumerate(reads) if max(r) >= n - bad_hi]
        assert axis.bad_lo == (max(low) + 1 if low else 0)
        assert axis.bad_hi == (size - min(high) if high else 0)
        assert axis.position(0) == Fraction(sum(reads[0]), k)
        assert (axis.lo, axis.hi) == (reads[0][0], reads[0][-1])


@given(small, st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.integers(20, 40))
def test_scatter_against_every_element(k: int, s: int, d: int, p: int, n: int) -> None:
    size = (n - 1) * s - 2 * p + d * (k - 1) + 1
    for bad_lo, bad_hi in itertools.product(range(4), range(4)):
        axis = Axis(0, n, bad_lo=bad_lo, bad_hi=bad_hi).scatter(size, k, s, d, p)
        # All elements there are, and those that a cut took away at either end.
        reached = {
            i: {s * i - p + d * t for t in range(k)} & {*range(size)} for i in range(-9, n + 9)
        }
        low = [j for i, js in reached.items() if i < bad_lo for j in js]
        high = [j for i, js in reached.items() if i >= n - bad_hi for j in js]
        assert axis.bad_lo == (max(low) + 1 if low else 0)
        assert axis.bad_hi == (size - min(high) if high else 0)


@given(st.integers(-9, 9), st.integers(-9, 9), st.integers(0, 9), st.integers(0, 9))
def test_padding_is_undone_by_cropping(before: int, after: int, lo: int, hi: int) -> None:
    axis = Axis(0, 40, Fraction(2), Fraction(1, 2), Fraction(-3), Fraction(4), lo, hi)
    back = axis.padded(before, after).padded(-before, -after)
    assert (back.size, back.shift, back.lo, back.hi) == (axis.size, axis.shift, axis.lo, axis.hi)
    # What was cropped off and padded again is not sound, and never less of it.
    assert back.bad_lo == max(axis.bad_lo, 0, -before)
    assert back.bad_hi == max(axis.bad_hi, 0, -after)


@given(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5), st.integers(0, 5))
def test_join_is_the_worse_of_both(a: int, b: int, c: int, d: int) -> None:
    one, two = Axis(0, 9, bad_lo=a, bad_hi=b), Axis(0, 9, bad_lo=c, bad_hi=d)
    joined = one.joined(two)
    assert (joined.bad_lo, joined.bad_hi) == (max(a, c), max(b, d))
    assert joined == two.joined(one)
    assert one.joined(one) == one


def reads(n: int, taps: Callable[[Tensor], Tensor]) -> list[list[int]]:
    """Which of n elements each element of an interpolation reads, by torch itself."""
    made = taps(torch.eye(n, dtype=torch.float64)[:, None])[:, 0]
    return [(column.abs() > 1e-9).nonzero().flatten().tolist() for column in made.T]


MODES = {"nearest": 1, "nearest-exact": 1, "linear": 1, "cubic": 2}


def interpolated(x: Tensor, mode: str, **options: Any) -> Tensor:
    if mode != "cubic":
        return F.interpolate(x, mode=mode, **options)
    for name, value in options.items():
        if name in {"size", "scale_factor"}:
            options = options | {name: (1, value) if name == "size" else (1.0, value)}
    return F.interpolate(x[:, :, None], mode="bicubic", **options)[:, :, 0]


class Interpolation(nn.Module):
    def __init__(self, mode: str, factor: float | None, rest: int, *, corners: bool) -> None:
        super().__init__()
        self.mode, self.factor, self.rest = mode, factor, rest
        self.options = {"align_corners": corners} if "nearest" not in mode else {}

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[-1]
        where: dict[str, Any] = (
            {"scale_factor": self.factor} if self.factor else {"size": 2 * n + self.rest}
        )
        return interpolated(x, self.mode, **where, **self.options)


def positions(mode: str, n: int, m: int, factor: float | None, *, corners: bool) -> list[int]:
    """First element that torch reads, or would were it not for the border: exact, by its rules."""
    step = Fraction(n, m) if factor is None else 1 / Fraction(factor).limit_denominator(64)
    if corners:
        step = Fraction(n - 1, m - 1)
    half = Fraction(1, 2)
    places = {
        "nearest": lambda i: i * step,
        "nearest-exact": lambda i: (i + half) * step,
    }.get(mode, lambda i: i * step if corners else (i + half) * step - half)
    return [math.floor(places(i)) - (mode == "cubic") for i in range(m)]


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(sorted(MODES)),
    st.sampled_from([2.0, 3.0, 4.0, 5.0, 1.5, 2.5, None]),
    st.integers(0, 1),
    st.booleans(),
    st.integers(17, 33),
)
def test_interpolation_against_torchs_own_positions(
    mode: str, factor: float | None, rest: int, corners: bool, n: int
) -> None:
    corners = corners and "nearest" not in mode
    net = Interpolation(mode, factor, rest, corners=corners)
    found = trace(net, (1, 1, n))
    axis = found.output[0]
    taps = 1 if "nearest" in mode else 2 * MODES[mode]
    seen = reads(n, net)
    first = positions(mode, n, axis.size, factor, corners=corners)
    for i, elements in enumerate(seen):  # the rule is torch's, but for clamping at the border
        rule = {min(n - 1, max(0, first[i] + t)) for t in range(taps)}
        assert {*elements} <= rule
        assert axis.scale * i + axis.lo <= min(elements)
        assert max(elements) <= axis.scale * i + axis.hi
    whole = float(factor or 0).is_integer() and not corners
    steady = whole and factor is not None and ("nearest" in mode or factor in {2, 4})
    assert bool(found.resizes) == (not steady and (factor is not None or corners or rest > 0))
    # Sound as derived, whatever is bad; and no more is given away than drift asks for.
    rule_of = [range(f, f + taps) for f in first]
    for bad_lo, bad_hi in ((0, 0), (1, 2), (4, 3)):
        bad = Axis(0, n, bad_lo=bad_lo, bad_hi=bad_hi)
        made, drift = interpolate(bad, found, axis)
        low = [i for i, r in enumerate(rule_of) if r[0] < bad_lo]
        high = [i for i, r in enumerate(rule_of) if r[-1] >= n - bad_hi]
        least = (max(low) + 1 if low else 0, axis.size - min(high) if high else 0)
        spare = 0 if steady else math.ceil(2 * drift / axis.scale) + 1
        spare += math.ceil(1 / axis.scale) * (not steady and "nearest" in mode)
        assert least[0] <= made.bad_lo <= least[0] + spare
        assert least[1] <= made.bad_hi <= least[1] + spare


def interpolate(bad: Axis, found: Geometry, axis: Axis) -> tuple[Axis, Fraction]:
    """The rule that was applied, on an axis that is bad."""
    (op, way), *_ = [(rule[1], rule[3][0][-1]) for rule in found.rules if "upsample" in rule[1]]
    reach = 0 if "nearest" in op else 2 if "cubic" in op else 1
    if reach == 0 and not way.absolute:
        return bad.scatter(axis.size, int(way.factor), int(way.factor)), way.drift
    return bad.interpolate(axis.size, way.factor, max(1, reach), way.drift), way.drift


@given(st.integers(2, 40), st.integers(2, 9), st.integers(-8, 8), st.booleans(), st.integers(0, 2))
def test_drift_against_every_position(n: int, f: int, rest: int, corners: bool, reach: int) -> None:
    m = f * n + rest % f
    way = _Way.of(n, m, None, reach, corners=corners)
    if way.factor != f:  # the size is nearer to another factor: nothing to compare with
        return
    half = Fraction(1, 2)
    for i in range(m):
        near = (i + half) / f - half
        place = Fraction(i * (n - 1), m - 1) if corners else (i + half) * n / m - half
        assert abs(place - near) <= way.drift


# U-Net, by the paper's numbers


@pytest.fixture(scope="module")
def published() -> models.UNet:
    with torch.device("meta"):
        net = models.UNet(1, 2)
    return net.to_empty(device="cpu")


def test_published_unet(published: models.UNet) -> None:
    found = geometry.of(published, (1, 1, 572, 572))
    assert found.output_size == (388, 388)
    assert found.margin == ((92, 92), (92, 92))
    assert found.stride == (16, 16)
    assert found.phase == (92, 92)
    assert (found.everywhere, found.misaligned, found.resizes, found.sound) == ((), (), (), ())
    assert all((a.bad_lo, a.bad_hi) == (0, 0) for f in found.features for a in f.axes)
    assert found.output_for((700, 188)) == (516, 4)
    assert found.input_for((389, 388)) == (588, 572)
    assert found["bottom.conv2"].shape == (1, 1024, 28, 28)
    with pytest.raises(ValueError, match="multiple of 16, got 573"):
        found.output_for((573, 572))
    with pytest.raises(KeyError):
        found["nowhere"]


def test_crops_of_the_skips(published: models.UNet) -> None:
    found = trace(published, (1, 1, 572, 572))
    crops = [found.offset(f"down.{level}.relu2", f"upsample.{level}")[0] for level in (3, 2, 1, 0)]
    assert crops == [4, 16, 40, 88]
    assert found.offset("input", "head") == (92, 92)


@pytest.mark.parametrize(("k", "size"), [(2, 26), (3, 29)])
def test_a_joining_up_convolution_is_followed_as_its_parts(k: int, size: int) -> None:
    class Level(nn.Module):
        def __init__(self, *, joins: bool) -> None:
            super().__init__()
            self.down, self.bottom = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 3, 3)
            self.up, self.merge = UpConv2d(3, 2, k), nn.Conv2d(4, 1, 3)
            self.joins = joins

        def forward(self, x: Tensor) -> Tensor:
            skip = self.down(x)
            x = self.bottom(F.max_pool2d(skip, k))
            x = self.up(x, skip=skip) if self.joins else crop_concat(skip, self.up(x))
            return self.merge(x)  # type: ignore[no-any-return]

    fused, plain = (geometry.of(Level(joins=j), (1, 1, size, size)) for j in (True, False))
    assert (fused.margin, fused.stride, fused.phase) == (plain.margin, plain.stride, plain.phase)
    assert (fused.output_size, fused.everywhere) == (plain.output_size, ())
    assert fused["merge"] == plain["merge"]


def test_sizes_of_the_published_unet() -> None:
    net = models.UNet(1, 2, base=1)
    runs, aligned = geometry.valid_sizes(net, (1, 1, 188, 188), 0, range(170, 240))
    assert runs == aligned == [188, 204, 220, 236]


def test_sizes_of_a_centre_cropping_unet() -> None:
    net = zoo.UNet(0)
    runs, aligned = geometry.valid_sizes(net, (1, 1, 44, 44), 1, range(40, 60))
    assert runs == [*range(44, 60)]
    assert aligned == [n for n in runs if n % 4 < 2]  # an odd crop rounds down, as poolings do
    found = trace(net, (1, 1, 44, 46))
    finding, by = found.misaligned[0]
    assert (finding.operation, abs(by)) == ("cat", 1)  # pixels: half an element


def test_sizes_of_a_network_that_is_never_aligned() -> None:
    net = zoo.UNet(up="deconv3")  # a kernel of 3 that is not centred on its stride of 2
    assert trace(net, (1, 1, 32, 32)).misaligned
    runs, aligned = geometry.valid_sizes(net, (1, 1, 32, 32), 0, range(32, 37))
    assert {32, 36} <= {*aligned} <= {*runs}


# Networks against what they do


class Sampling(TorchDispatchMode):
    """Interpolations of a tile sample at the positions of the whole image."""

    def __init__(self, tile: Geometry, whole: Geometry, starts: Sequence[int]) -> None:
        super().__init__()
        self.number, self.starts = -1, starts
        pairs = zip(tile.resizes, whole.resizes, strict=True)
        self.resizes = {one.number: (one, other) for one, other in pairs}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not name.removeprefix("_").startswith("upsample_"):
            return func(*args, **(kwargs or {}))
        self.number += 1
        if self.number not in self.resizes:
            return func(*args, **(kwargs or {}))
        tile, whole = self.resizes[self.number]
        schema = (argument.name for argument in func._schema.arguments)
        given = dict(zip(schema, args, strict=False)) | (kwargs or {})
        x: Tensor = args[0]
        for k, (old, new) in enumerate(zip(whole.before, whole.after, strict=True)):
            scales = [given.get(f"scales_{c}") for c in "dhw"[-len(whole.before) :]]
            scale = given.get("scales") or scales[k]
            begin, first = (int(self.starts[k] / a.scale) for a in (old, new))
            corners = bool(given.get("align_corners"))
            step = (
                (old.size - 1) / (new.size - 1)
                if corners
                else 1 / scale
                if scale
                else (old.size / new.size)
            )
            at = torch.arange(first, first + tile.after[k].size, dtype=torch.float64)
            place = (at + 0.5) * step - 0.5
            if corners or name.startswith("upsample_nearest"):
                place = at * step
            if "exact" in name:
                place = (at + 0.5) * step
            x = sample(x, 2 + k, place, begin=begin, size=old.size, name=name)
        return x


def sample(x: Tensor, d: int, place: Tensor, *, begin: int, size: int, name: str) -> Tensor:
    """Element ``place`` of a whole axis, of which x begins at `begin`."""
    base = place.floor()
    t = place - base
    if "nearest" in name:
        taps, weights = [0], [torch.ones_like(t)]
    elif "cubic" in name:
        taps, weights = [-1, 0, 1, 2], list(cubic(t))
    else:
        base = base.clamp(min=0)
        t = (place - base).clamp(min=0)
        taps, weights = [0, 1], [1 - t, t]
    along = [-1 if k == d else 1 for k in range(x.dim())]
    parts = []
    for tap, weight in zip(taps, weights, strict=True):
        at = ((base.long() + tap).clamp(0, size - 1) - begin).clamp(0, x.shape[d] - 1)
        parts.append(x.index_select(d, at) * weight.view(along))
    return sum(parts[1:], parts[0])


def cubic(t: Tensor, a: float = -0.75) -> Iterator[Tensor]:
    for s in (1 + t, t, 1 - t, 2 - t):
        near = (a + 2) * s**3 - (a + 3) * s**2 + 1
        far = a * s**3 - 5 * a * s**2 + 8 * a * s - 4 * a
        yield torch.where(s <= 1, near, far)


@torch.no_grad()
def favour_edges(net: nn.Module) -> nn.Module:
    """Positive weights, the larger the nearer to a kernel's edges, so that no rim is lost."""
    for module in net.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() > 1:
            edges = torch.rand_like(weight) * 0.2 + 0.9
            for d in range(2, weight.dim()):
                far = (torch.arange(weight.shape[d]) - (weight.shape[d] - 1) / 2).abs()
                profile = 1 + 2 * (far == far.max())
                edges *= profile.view([-1 if k == d else 1 for k in range(weight.dim())])
            out = 1 if isinstance(module, nn.modules.conv._ConvTransposeNd) else 0
            weight.copy_(edges / edges.sum([d for d in range(weight.dim()) if d != out], True))
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor):
            bias.fill_(0.01)
    return net.double().eval().requires_grad_(False)


def measured(
    net: nn.Module,
    shape: tuple[int, ...],
    axis: int,
    stride: int,
    cut: Cut,
) -> tuple[Cut, Cut, int]:
    """Derived and measured rim of a tile of this shape, and its output's size, along one axis.

    The whole image is longer by `cut` strides at the low and the high end.  Max-pooling may pass
    over what is spoilt, so images that grow towards either end are tried, several where the
    measured rim is the smaller one.
    """
    at, (begin, end) = 2 + axis, cut
    total = shape[axis] + (begin + end) * stride
    full_shape = (1, 1, *shape[:axis], total, *shape[axis + 1 :])
    tile, whole = trace(net, (1, 1, *shape)), trace(net, full_shape)
    check_same(tile, whole)
    a, start = tile.output[axis], begin * stride
    starts = [start if k == axis else 0 for k in range(len(shape))]
    derived = (a.bad_lo * (begin > 0), a.bad_hi * (end > 0))
    truth = (0, 0)
    for count in (3, 48) if len(shape) == 1 else (3, 9):
        x = 1 + torch.rand(count, *full_shape[1:], dtype=torch.float64)
        ramp = torch.linspace(0, 6, total, dtype=torch.float64)
        ramp = ramp.view([-1 if d == at else 1 for d in range(x.dim())])
        x[1::3] *= ramp.exp()
        x[2::3] *= ramp.flip(at).exp()
        full = first_tensor(net(x)).narrow(at, int(start / a.scale), a.size)
        with Sampling(tile, whole, starts):
            part = first_tensor(net(x.narrow(at, start, shape[axis])))
        truth = rim(differs(part, full, 1e-12)[axis])
        if truth[0] >= derived[0] and truth[1] >= derived[1]:
            break
    return derived, truth, a.size


@pytest.mark.parametrize("name", zoo.ZOO)
def test_the_derived_rim_is_the_measured_one(name: str) -> None:
    make, shape, residues = zoo.ZOO[name]
    net = favour_edges(make())
    found = geometry.of(net, (1, 1, *shape))
    assert not found.everywhere
    for axis, more in itertools.product(range(len(shape)), residues):
        stride = found.stride[axis]
        many = math.ceil(24 / stride)
        size = tuple(n + more * (k == axis) for k, n in enumerate(shape))
        cuts = [(many, many)]
        if axis == 0 and more == residues[0]:
            cuts += [(0, many), (many, 0)]
        for cut in cuts:
            derived, truth, n = measured(net, size, axis, stride, cut)
            assert sum(derived) < n, "the shape leaves nothing"
            assert truth == derived, (axis, more, cut)


@pytest.mark.parametrize("name", zoo.POSITIONED)
def test_a_tile_that_samples_where_the_whole_does(name: str) -> None:
    """Sound as derived; generous by what positions may be off in another image of the residue."""
    make, shape = zoo.POSITIONED[name]
    net = favour_edges(make())
    found = geometry.of(net, (1, 1, *shape))
    assert found.resizes
    assert not found.everywhere
    for axis in range(len(shape)):
        stride = found.stride[axis]
        for begin, end in ((3, 2), (0, 3), (5, 0)):
            derived, truth, n = measured(net, shape, axis, stride, (begin, end))
            assert sum(derived) < n, "the shape leaves nothing"
            assert all(t <= d for t, d in zip(truth, derived, strict=True))
            spare = (
                4 * len(found.resizes) * max(1, *(1 / r.after[axis].scale for r in found.resizes))
            )
            assert all(d - t <= spare for t, d in zip(truth, derived, strict=True)), (
                derived,
                truth,
            )


# Random networks


class UnfitError(Exception):
    """There is nothing to compare."""


def require(reason: str, *, ok: bool) -> None:
    if not ok:
        raise UnfitError(reason)


def fuzz(seed: int) -> str:
    """One random network on a random tile: what became of it."""
    draw = random.Random(seed)  # noqa: S311
    torch.manual_seed(seed)
    rank = draw.choice((1, 1, 2))
    net = favour_edges(zoo.Random(draw, rank))
    size = tuple(draw.randint(*((180, 300) if rank == 1 else (60, 90))) for _ in range(rank))
    axis = draw.randrange(rank)
    try:
        require("does not run", ok=bool(geometry.output_size(net, (1, 1, *size))))
        whole = trace(net, (1, 1, *size))
        require("looks everywhere", ok=not whole.everywhere)
        stride = whole.stride[axis]
        strides = size[axis] * 2 // (5 * stride)  # two fifths are cut off, at one or both ends
        begin = draw.choice((0, strides // 2, strides))
        tile = tuple(n - strides * stride * (k == axis) for k, n in enumerate(size))
        runs = strides > 0 and geometry.output_size(net, (1, 1, *tile))
        require("too coarse", ok=bool(runs))
        part = trace(net, (1, 1, *tile))
        check_same(part, whole)
        require("too small", ok=all(have >= need for _, have, need in part.sound))
        cut = (begin, strides - begin)
        derived, truth, length = measured(net, tile, axis, stride, cut)
        require("too small", ok=sum(derived) <= length // 2)  # else the halves hide the ends
    except (UnfitError, GeometryError) as error:
        return str(error).partition(":")[0]
    assert all(t <= d for t, d in zip(truth, derived, strict=True)), (seed, derived, truth)
    if part.resizes:
        return "positioned"
    return "equal" if truth == derived else "generous"


def test_random_networks() -> None:
    """A derived rim is the measured one, but where positions are those of the whole: never less.

    Two of them may be generous: max-pooling can pass over what was spoilt in every image.
    """
    found = [fuzz(seed) for seed in range(80)]
    assert found.count("equal") > 50
    assert found.count("positioned") > 5
    assert found.count("generous") <= 2


# Those that look everywhere, and those that cannot be read


@pytest.mark.parametrize("name", zoo.EVERYWHERE)
def test_who_looks_everywhere_is_named(name: str) -> None:
    make, layer = zoo.EVERYWHERE[name]
    net = make().eval()
    try:
        found = geometry.of(net, (1, 1, 64, 64))
    except GeometryError as error:  # no map comes out any more
        said = str(error)
    else:
        said = "; ".join(map(str, found.everywhere))
        assert said
        assert all(str(finding) in str(found) for finding in found.everywhere)
        for derive in (lambda: found.margin, lambda: found.receptive_field):
            with pytest.raises(GeometryError, match="look everywhere"):
                derive()
    assert f"{layer} (" in said
    assert "\n" not in said


@pytest.mark.parametrize("name", zoo.SIZED)
def test_who_depends_on_the_size_is_found(name: str) -> None:
    net = zoo.SIZED[name]().eval()
    with pytest.raises(GeometryError, match=r"other|does not grow|no simple factor") as caught:
        geometry.of(net, (1, 1, 64, 64))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", zoo.UNREADABLE)
def test_who_cannot_be_read_says_so_in_a_line(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(GeometryError) as caught:
        geometry.of(zoo.UNREADABLE[name]().eval(), (1, 1, 64, 64))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", zoo.HARMLESS)
def test_what_is_the_same_everywhere_is_not_refused(name: str) -> None:
    net = zoo.HARMLESS[name]().eval()
    found = geometry.of(net, (1, 1, 64, 64))
    assert not found.everywhere
    assert found.margin == ((1, 1), (1, 1))


def test_the_network_is_left_as_it_was() -> None:
    net = zoo.Cached()
    net.conv.eval()
    geometry.of(net, (1, 1, 32, 32))
    geometry.output_size(net, (1, 1, 32, 32))
    assert net.table is None
    assert net.training
    assert not net.conv.training
    assert all(p.device.type == "cpu" and p.requires_grad for p in net.parameters())


def test_a_changed_network_is_read_anew() -> None:
    net = zoo.seq(nn.Conv2d(1, 2, 3), nn.Upsample(scale_factor=2))
    before = geometry.of(net, (1, 1, 32, 32))
    net[1].scale_factor = 4
    assert geometry.of(net, (1, 1, 32, 32)).output_size == (120, 120) != before.output_size
    net[0] = nn.Conv2d(1, 2, 5)
    assert geometry.of(net, (1, 1, 32, 32)).output_size == (112, 112)
    net.double()
    assert geometry.of(net, (1, 1, 32, 32)).outputs[0].dtype == torch.float64


# What else is derived


FRAMED: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "valid": (zoo.ours(depth=2), 2),
    "valid, bilinear": (zoo.ours(depth=2, up="bilinear"), 2),
    "padded": (zoo.ours(depth=2, padding="same"), 2),
    "centre crop": (lambda: zoo.UNet(0), 2),
    "padded, fits itself": (lambda: zoo.UNet(fit="pad"), 2),
    "never aligned": (lambda: zoo.UNet(up="deconv3"), 2),
    "dilated, valid": (lambda: zoo.dilated(padded=False), 2),
    "asymmetric": (lambda: zoo.seq(nn.ZeroPad2d((2, 0, 0, 1)), zoo.Conv(1, 2, 5)), 2),
    "larger than the image": (lambda: zoo.seq(zoo.Conv(1, 2, 3, padding=4)), 2),
    "1-D": (zoo.ours(depth=2, dims=1), 1),
    "3-D": (zoo.ours(depth=1, dims=3), 3),
}


@pytest.mark.parametrize(
    ("name", "symmetric"),
    [*((name, False) for name in FRAMED), ("valid", True), ("asymmetric", True)],
)
def test_frames_cover_the_image(name: str, symmetric: bool) -> None:
    make, rank = FRAMED[name]
    net = make()
    for size in (1, 40, 42):
        image = tuple(size + 3 * k for k in range(rank))
        frames = geometry.input_frame(net, (1, 1, *image), symmetric=symmetric)
        total = tuple(n + f.before + f.after for n, f in zip(image, frames, strict=True))
        found = trace(net, (1, 1, *total))
        for n, frame, axis in zip(image, frames, found.output, strict=True):
            assert min(frame.before, frame.after, frame.skip) >= 0
            # Output element `skip` lies on the image's first pixel, but for half a pixel or so.
            assert 0 <= axis.position(frame.skip) - frame.before < 1
            assert frame.skip + n <= axis.size
            assert not symmetric or frame.after >= frame.before


def test_frame_of_the_published_unet() -> None:
    net = models.UNet(1, 2, base=1)
    (frame, other) = geometry.input_frame(net, (1, 1, 388, 380))
    assert (frame.before, frame.after, frame.skip) == (92, 92, 0)
    assert (other.before, other.after, other.skip) == (92, 100, 0)


def test_frames_that_cannot_be() -> None:
    with pytest.raises(GeometryError, match="expected the image's resolution"):
        geometry.input_frame(zoo.seq(zoo.Conv(1, 2, 3, 2)), (1, 1, 32, 32))
    with pytest.raises(GeometryError, match="runs at no size from 32"):
        geometry.input_frame(zoo.seq(zoo.Conv(3, 2, 3)), (1, 1, 32, 32))


def test_output_size() -> None:
    net = models.UNet(1, 2, base=1)
    assert geometry.output_size(net, (1, 1, 572, 188)) == (388, 4)
    assert geometry.output_size(net, (1, 1, 573, 188)) is None
    assert geometry.output_size(zoo.seq(zoo.Conv(1, 1, 3)), (1, 1, 1, 9)) is None


class Living(TorchDispatchMode):
    """Bytes of results that live, by the tensors that Python holds."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()
        self.given = {t.untyped_storage()._cdata for t in given}
        self.holders: dict[int, list[weakref.ref[Tensor]]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in self.given:
                self.holders.setdefault(t.untyped_storage()._cdata, []).append(weakref.ref(t))
        live = 0
        for piece, refs in list(self.holders.items()):
            alive = [t for ref in refs if (t := ref()) is not None]
            alive = [t for t in alive if t.untyped_storage()._cdata == piece]
            live += alive[0].untyped_storage().nbytes() if alive else 0
            self.holders[piece] = [weakref.ref(t) for t in alive]
        self.peak = max(self.peak, live)
        return result


@pytest.mark.parametrize(
    "name",
    [
        *(
            "ours, as published",
            "ours, padded, bilinear",
            "ours, unpooling",
            "odd sizes, padded to the skip",
        ),
        *("ConvNeXt", "SegNet", "MONAI BasicUNet", "MONAI UNet", "MONAI BasicUNetPlusPlus"),
    ],
)
def test_peak_is_what_torch_allocates(name: str) -> None:
    make, shape, _ = zoo.ZOO[name]
    net = make().eval().requires_grad_(False)
    x = torch.rand(1, 1, *shape)
    with torch.inference_mode(), Living([x, *net.parameters(), *net.buffers()]) as living:
        net(x)
    truth = living.peak + x.numel() * x.element_size()
    assert trace(net, x.shape).peak == pytest.approx(truth, rel=0.01)  # batch norm's statistics


def test_offset_and_margin_are_of_the_layers_named() -> None:
    net = zoo.seq(zoo.Conv(1, 2, 3), zoo.Conv(2, 2, (3, 1), (2, 1)))
    found = geometry.of(net, (4, 1, 33, 32))
    assert found.offset("input", "0") == (1, 1)
    assert found.offset("0", "1") == (1, 0)
    assert found.shape == (1, 1, 33, 32)
    assert found.stride == (2, 1)
    assert found.receptive_field == (5, 3)
    assert found.margin == ((2, 2), (1, 1))


def test_the_users_word() -> None:
    net = zoo.EVERYWHERE["instance norm"][0]()
    found = geometry.of(net, (1, 1, 64, 60), margin=(7, 9), stride=4)
    assert found.margin == ((7, 7), (9, 9))
    assert found.stride == (4, 4)
    assert found.output_size == (64, 60)
    valid = geometry.of(models.UNet(1, 2, base=1), (1, 1, 188, 188), margin=100)
    assert valid.margin == ((100, 100), (100, 100))
    assert (valid.output[0].bad_lo, valid.output[0].shift) == (8, 92)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": -1}, "margin: expected an integer >= 0, or 2 of them, got -1"),
        ({"margin": (1, 2, 3)}, "margin: expected an integer >= 0, or 2"),
        ({"margin": 3, "stride": 0}, "stride: expected an integer >= 1"),
        ({"stride": 3}, "stride: expected a margin with it"),
        ({"shape": (1, 1)}, "shape: expected"),
        ({"shape": (1, 1, 0, 9)}, "shape: expected"),
        ({"shape": (1, 1, 9, 9, 9, 9)}, "shape: expected"),
    ],
)
def test_wrong_words(options: dict[str, Any], message: str) -> None:
    shape = options.pop("shape", (1, 1, 32, 32))
    with pytest.raises(ValueError, match=message):
        geometry.of(zoo.seq(zoo.Conv(1, 1, 3)), shape, **options)


def test_a_size_at_which_the_network_fails() -> None:
    with pytest.raises(GeometryError, match="cannot be read at input"):
        geometry.of(models.UNet(1, 2, base=1), (1, 1, 190, 190))


def test_the_users_word_needs_no_shapes() -> None:
    found = geometry.of(zoo.Lambda(lambda x: x if x.sum() > 0 else -x), (1, 1, 64, 60), margin=3)
    assert found.output_size == (64, 60)
    assert found.margin == ((3, 3), (3, 3))


def test_a_network_that_pads_itself_to_a_multiple() -> None:
    def pad(x: Tensor) -> Tensor:
        h, w = (-n % 8 for n in x.shape[2:])
        y = F.max_pool2d(F.pad(x, (0, w, 0, h)), 2)
        return F.interpolate(y, scale_factor=2)[:, :, : x.shape[2], : x.shape[3]]

    assert geometry.of(zoo.Lambda(pad), (1, 1, 30, 33)).stride == (8, 8)


def test_table_of_an_anisotropic_network() -> None:
    make, shape, _ = zoo.ZOO["anisotropic"]
    found = geometry.of(make(), (1, 1, *shape))
    text = str(found)
    assert max(map(len, text.splitlines())) <= 100
    lines = text.splitlines()
    assert lines[0].split() == [
        "layer",
        "operation",
        "channels",
        "size",
        "stride",
        "receptive",
        "field",
        "rim",
    ]
    assert lines[3].startswith(
        "1      max_pool3d            4         12 x 14 x 16  1 x 2 x 2  1 x 4 x 4"
    )
    assert lines[-2:] == [
        "12 x 28 x 32 pixels to 12 x 28 x 28, stride 1 x 2 x 2",
        "receptive field 5 x 11 x 13, margin 2 x 5 x 6 a side",
    ]


def test_table_says_what_is_wrong() -> None:
    text = str(trace(zoo.UNet(0), (1, 1, 44, 46)))
    assert "misaligned by" in text
    text = str(geometry.of(zoo.up(3, "bilinear"), (1, 1, 33, 33)))
    assert "2: tiles must sample where the whole image does" in text


def test_interpolations_are_counted_as_torch_runs_them() -> None:
    def enlarge(x: Tensor) -> Tensor:
        grid = F.interpolate(torch.ones(1, 1, 3, 3), scale_factor=2)[:, :, :1, :1]
        x = F.interpolate(x * grid, scale_factor=2)
        return F.interpolate(x, scale_factor=3, mode="bilinear")

    assert [r.number for r in trace(zoo.Lambda(enlarge), (1, 1, 16, 16)).resizes] == [2]
