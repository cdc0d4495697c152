"""What the registry cannot say of elastic_deform: its equals, companions, odd positions."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from backends import BACKENDS, device_of, running
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

from segfuse.ops import elastic_deform, random_deformation
from segfuse.ops._borders import INTEGERS
from segfuse.ops.elastic_deform import _positions

on_backends = pytest.mark.parametrize("backend", BACKENDS)
BORDERS = ("mirror", "symmetric", "edge", "wrap", "constant")


def test_is_torchs_bicubic_sampling_of_torchs_bicubic_field() -> None:
    """With its reflection, which repeats as "mirror" does; and numpy's for all labels."""
    torch.manual_seed(0)
    for height, width, std in itertools.product((1, 2, 9, 40), (1, 3, 12, 33), (2, 60)):
        image = torch.randn(2, 3, height, width, dtype=torch.float64)
        grid = torch.randn(2, 2, 3, 4, dtype=torch.float64) * std
        field = interpolate(grid, (height, width), mode="bicubic", align_corners=True)
        y = torch.arange(height)[:, None] + field[:, 0]
        x = torch.arange(width) + field[:, 1]
        # Torch's positions go from -1 to 1; where that is one pixel, there is but that.
        place = [
            at * 2 / (n - 1) - 1 if n > 1 else torch.zeros_like(at)
            for at, n in ((x, width), (y, height))
        ]
        if 1 in (height, width):
            continue
        want = grid_sample(
            image, torch.stack(place, -1), "bicubic", "reflection", align_corners=True
        )
        torch.testing.assert_close(elastic_deform(image, grid), want, rtol=0, atol=1e-10)
        torch.testing.assert_close(elastic_deform.reference(image, grid), want, rtol=0, atol=1e-10)
        for ours, theirs in zip(_positions(image, grid, None), (y, x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@on_backends
def test_the_affine_map_turns_about_the_centre(backend: str) -> None:
    device = device_of(backend)
    image = torch.randn(1, 2, 6, 6, device=device)
    labels = torch.randint(0, 9, (1, 6, 6), device=device)
    still = torch.zeros(1, 2, 3, 3, device=device)
    quarter = torch.tensor([[[0.0, -1, 0], [1, 0, 0]]], device=device)  # s(y, x) = (-x, y)
    with running(backend):
        turned, ids = elastic_deform(image, still, affine=quarter, labels=labels)
        moved, moved_ids = elastic_deform(
            image,
            still,
            affine=torch.tensor([[[1.0, 0, 2], [0, 1, -1]]], device=device),
            labels=labels,
            border="wrap",
        )
    assert torch.equal(turned, torch.rot90(image, -1, (2, 3)))
    assert torch.equal(ids, torch.rot90(labels, -1, (1, 2)))
    assert torch.equal(moved, image.roll((-2, 1), (2, 3)))
    assert torch.equal(moved_ids, labels.roll((-2, 1), (1, 2)))


@on_backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_labels_half_way_go_to_the_even(backend: str, dtype: torch.dtype) -> None:
    device = device_of(backend)
    labels = torch.arange(12, device=device).view(1, 1, 12)
    image, grid = labels[None].to(dtype), torch.zeros(1, 2, 1, 1, dtype=dtype, device=device)
    for shift in (0.5, -0.5, 1.5, -2.5, 0.25):
        grid[:, 1] = shift
        with running(backend):
            _, got = elastic_deform(image, grid, labels=labels, border="constant", fill=77)
        want = (labels + shift).round().long()
        assert torch.equal(got, torch.where((want >= 0) & (want < 12), want, 77))


@on_backends
def test_labels_of_every_dtype(backend: str) -> None:
    device = device_of(backend)
    grid = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0)).to(device) * 4
    image = torch.zeros(2, 1, 9, 20, device=device)
    for dtype, border in itertools.product(INTEGERS, BORDERS):
        labels = (torch.arange(360, device=device) % 100).view(2, 9, 20).to(dtype)
        options: dict[str, Any] = {"labels": labels, "border": border, "fill": (0, 1)}
        with running(backend):
            _, got = elastic_deform(image, grid, **options)
        assert torch.equal(got, elastic_deform.reference(image, grid, **options)[1])


@on_backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_of_companions(backend: str, dtype: torch.dtype) -> None:
    """Each in its own dtype; with labels the same; of the affine map too."""
    torch.manual_seed(0)
    device = device_of(backend)
    labels = torch.randint(0, 9, (2, 9, 11), device=device)
    for border, companion in itertools.product(BORDERS, {dtype, torch.float32}):
        if dtype == torch.float64 and companion != dtype:
            continue
        image = torch.randn(2, 3, 9, 11, device=device).to(dtype).requires_grad_()
        grid = torch.randn(2, 2, 3, 4, device=device).to(companion).requires_grad_()
        affine = (torch.eye(2, 3) + torch.randn(2, 2, 3) * 0.1).to(device, companion)
        affine.requires_grad_()
        upstream = torch.randn(2, 3, 9, 11, device=device).to(dtype)
        inputs = (image, grid, affine)
        options: dict[str, Any] = {"border": border, "fill": 1}
        want = torch.autograd.grad(
            elastic_deform.reference(image, grid, affine=affine, **options), inputs, upstream
        )
        with running(backend):
            one = elastic_deform(image, grid, affine=affine, **options)
            both, _ = elastic_deform(image, grid, affine=affine, labels=labels, **options)
            for result in (one, both):
                got = torch.autograd.grad(result, inputs, upstream, retain_graph=True)
                for a, b, t in zip(got, want, inputs, strict=True):
                    assert a.dtype == t.dtype
                    tolerance = 20 * b.abs().max().item() * torch.finfo(t.dtype).eps
                    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
            alone = torch.autograd.grad(both, affine, upstream)
            assert torch.equal(alone[0], got[2])


@on_backends
def test_second_derivatives_with_an_affine_map(backend: str) -> None:
    torch.manual_seed(0)
    image, grid, affine = (
        torch.randn(size, dtype=torch.float64, device=device_of(backend)).requires_grad_()
        for size in ((1, 1, 4, 5), (1, 2, 2, 3), (1, 2, 3))
    )

    def function(image: Tensor, grid: Tensor, affine: Tensor) -> Tensor:
        return elastic_deform(image, grid, affine=affine, border="symmetric")

    with running(backend):
        assert torch.autograd.gradcheck(function, (image, grid, affine), fast_mode=True)
        assert torch.autograd.gradgradcheck(function, (image, grid, affine), fast_mode=True)


@on_backends
def test_gradients_where_they_vanish(backend: str) -> None:
    """All is one pixel: the grid's gradient is 0, the image's the sum."""
    device = device_of(backend)
    image = torch.randn(1, 2, 1, 1, device=device).requires_grad_()
    grid = (torch.randn(1, 2, 3, 3, device=device) * 9).requires_grad_()
    for border in BORDERS[:4]:
        with running(backend):
            result = elastic_deform(image, grid, border=border)
            of_image, of_grid = torch.autograd.grad(result.sum(), (image, grid))
        torch.testing.assert_close(of_image, torch.ones_like(image))
        assert of_grid.abs().max() < 1e-5


@on_backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_positions_that_are_no_number_or_far(backend: str, dtype: torch.dtype) -> None:
    """Read nothing but the image: NaN or the fill, and a label of the image's."""
    device = device_of(backend)
    image = torch.rand(1, 1, 5, 300, device=device).to(dtype).requires_grad_()
    labels = torch.randint(1, 5, (1, 5, 300), device=device)
    for value, border in itertools.product((math.nan, math.inf, -math.inf, 3e38, -6e4), BORDERS):
        grid = torch.zeros(1, 2, 5, 300, device=device)  # a control point a pixel
        grid[0, 1, 2, 7] = value
        grid.requires_grad_()
        with running(backend):
            got, ids = elastic_deform(image, grid, labels=labels, border=border, fill=9)
            of_image, _ = torch.autograd.grad(got.float().sum(), (image, grid))
        want, want_ids = elastic_deform.reference(image, grid, labels=labels, border=border, fill=9)
        (want_of_image,) = torch.autograd.grad(want.float().sum(), image)
        torch.testing.assert_close(got, want, equal_nan=True)
        assert torch.equal(ids, want_ids)
        torch.testing.assert_close(of_image, want_of_image, equal_nan=True)
        assert of_image.isfinite().sum() > 1400
        number = math.isfinite(value) or border == "constant"
        assert number != bool(got[0, 0, 2, 7].isnan())


@on_backends
def test_far_outside_is_exactly_the_fill(backend: str) -> None:
    device = device_of(backend)
    image = torch.rand(1, 2, 6, 7, device=device)
    labels = torch.ones(1, 6, 7, dtype=torch.uint8, device=device)
    grid = torch.rand(1, 2, 3, 3, device=device) + 50
    for fill in (0.1, -3e38, math.inf, math.nan):
        with running(backend):
            got, ids = elastic_deform(
                image, grid, labels=labels, border="constant", fill=(fill, 255)
            )
        assert torch.equal(got.nan_to_num(7), torch.full_like(got, fill).nan_to_num(7))
        assert (ids == 255).all()


@on_backends
def test_float32_companions_of_half_images_keep_their_precision(backend: str) -> None:
    device = device_of(backend)
    image = torch.arange(300.0, device=device).expand(1, 1, 4, 300).half()
    grid = torch.full((1, 2, 2, 2), 0.0, device=device)
    grid[:, 1] = 100.0625  # which halves round
    with running(backend):
        got = elastic_deform(image, grid)
    assert got[0, 0, 0, 20] == 120.0625


def test_random_deformations_are_what_was_asked_for() -> None:
    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(1)

    grid, affine = random_deformation(2000, generator=seeded())
    assert grid.shape == (2000, 2, 3, 3)
    assert grid.dtype == affine.dtype == torch.float32
    assert abs(grid.std().item() - 10) < 0.2
    assert abs(grid.mean().item()) < 0.2
    assert torch.equal(affine, torch.eye(2, 3).expand(2000, 2, 3))
    options: dict[str, Any] = {"rotation": 30, "scale": (0.5, 2), "shift": 4}
    grid_too, affine = random_deformation(2000, generator=seeded(), **options)
    assert torch.equal(grid, grid_too)
    assert torch.equal(affine, random_deformation(2000, generator=seeded(), **options)[1])
    m = affine[:, :, :2].double()
    factor = 1 / m.det().sqrt()
    assert factor.min() >= 0.4999
    assert factor.max() <= 2.0001
    assert abs(factor.log().mean().item()) < 0.05
    angle = torch.atan2(m[:, 1, 0], m[:, 0, 0]).rad2deg()
    assert 29 < angle.max() < 30.001
    assert -30.001 < angle.min() < -29
    assert 3.9 < affine[:, :, 2].abs().max() <= 4
    assert random_deformation(0)[0].shape == (0, 2, 3, 3)
    assert random_deformation(1, points=(2, 5), std=0)[0].shape == (1, 2, 2, 5)


def test_a_scale_of_two_shows_things_twice_as_large() -> None:
    image = torch.zeros(1, 1, 41, 41)
    image[..., 15:26, 15:26] = 1
    grid, affine = random_deformation(1, std=0, scale=(2, 2))
    area = elastic_deform(image, grid, affine=affine).sum() / image.sum()
    assert 3.6 < area < 4.4


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"n": -1}, ValueError, "n: expected a number from 0 on, got -1"),
        ({"n": 1.5}, TypeError, "n: expected an integer, got 1.5"),
        ({"points": 0}, ValueError, "points: expected a number from 1 on, or two, got 0"),
        ({"points": (3, 3, 3)}, ValueError, "points: expected a number from 1 on, or two, got (3,"),
        ({"std": -1}, ValueError, "std: expected a finite number from 0 on, got -1"),
        ({"std": math.nan}, ValueError, "std: expected a finite number from 0 on, got nan"),
        ({"std": "a"}, TypeError, "std: expected a number, got 'a'"),
        ({"rotation": math.inf}, ValueError, "rotation: expected a finite number from 0 on, got i"),
        ({"shift": True}, TypeError, "shift: expected a number, got True"),
        ({"scale": 2}, ValueError, "scale: expected the least and the greatest factor, got 2"),
        ({"scale": (2, 1)}, ValueError, "scale: expected 0 < least <= greatest, got (2, 1)"),
        ({"scale": (0, 1)}, ValueError, "scale: expected 0 < least <= greatest, got (0, 1)"),
        ({"generator": 1}, TypeError, "generator: expected a torch.Generator or None, got int"),
    ],
)
def test_random_deformation_says_what_is_wrong(
    options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as raised:
        random_deformation(**{"n": 1, **options})
    assert str(raised.value).startswith(f"random_deformation: {text}")
