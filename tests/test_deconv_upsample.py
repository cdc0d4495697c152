"""deconv_upsample, beyond what every operator is tested for; and where upsampling samples."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sysconfig
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from backends import BACKENDS, device_of, running

from segfuse.ops import bilinear_kernel, deconv_upsample

ROOT = Path(__file__).parents[1]
COMPILER = shlex.split(os.environ.get("CXX", "")) or ["c++"]

on_backends = pytest.mark.parametrize("backend", BACKENDS)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 16, 63, 64])
def test_the_bilinear_kernel_is_the_papers(size: int) -> None:
    f = (size + 1) // 2
    c = f - 1 if size % 2 else f - 0.5
    wanted = [
        [(1 - abs(y - c) / f) * (1 - abs(x - c) / f) for x in range(size)] for y in range(size)
    ]
    got = bilinear_kernel(f, size)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor(wanted))


@pytest.mark.parametrize(("factor", "size"), [(1, 1), (2, 4), (3, 5), (8, 16), (32, 64)])
def test_the_kernels_usual_size(factor: int, size: int) -> None:
    assert bilinear_kernel(factor).shape == (size, size)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((0,), ValueError, "bilinear_kernel: factor: expected 1 to 2147483647, got 0"),
        ((2, 0), ValueError, "bilinear_kernel: size: expected 1 to 1024, got 0"),
        ((600,), ValueError, "bilinear_kernel: size: expected 1 to 1024, got 1200"),
        ((2.0,), TypeError, "bilinear_kernel: factor: expected an integer, got 2.0"),
    ],
)
def test_the_kernel_refuses(arguments: tuple[float, ...], error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        bilinear_kernel(*arguments)  # type: ignore[arg-type]


@on_backends
@pytest.mark.parametrize("factor", [2, 3, 4, 7, 8, 16, 32])
def test_every_factor_interpolates_as_torch_does(backend: str, factor: int) -> None:
    """Where the edge is held."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 3, 5, generator=generator, dtype=torch.float64).to(device_of(backend))
    held = F.pad(x, (1, 1, 1, 1), mode="replicate")
    offset = factor + factor // 2
    with running(backend):
        got = deconv_upsample(held, factor=factor, offset=offset, size=(3 * factor, 5 * factor))
    wanted = F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@on_backends
def test_a_crop_is_a_part_of_the_whole(backend: str) -> None:
    """The same bits, whatever is asked for."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 4, generator=generator).to(device_of(backend))
    weights = [torch.randn(3, k, k, generator=generator).to(x.device) for k in (4, 3, 1, 16, 13)]
    for weight, factor in product(weights, (1, 2, 4, 8)):
        for given, kernel in ((weight, None), (None, weight.shape[-1])):
            with running(backend):
                whole = deconv_upsample(x, given, factor=factor, kernel_size=kernel)
                inner = (factor, 2 * factor - 1)  # amid a source's targets, which others reach too
                for top, left in ((0, 0), (1, 2), (3, 1), (factor, factor - 1), inner):
                    height, width = (max(0, n - 2) for n in whole[0, 0, top:, left:].shape)
                    part = deconv_upsample(
                        x,
                        given,
                        factor=factor,
                        kernel_size=kernel,
                        offset=(top, left),
                        size=(height, width),
                    )
                    assert torch.equal(part, whole[:, :, top : top + height, left : left + width])


@on_backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_out_has_the_same_bits_in_every_layout(backend: str, dtype: torch.dtype) -> None:
    """Though rows are computed in pieces of another length where their elements lie apart."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 3, 400, generator=generator).to(device_of(backend), dtype)
    weight = torch.randn(1, 6, 6, generator=generator).to(x.device, dtype)
    with running(backend):
        wanted = deconv_upsample(x, weight, factor=3)
        apart = torch.stack([wanted, wanted], dim=-1).flatten(-2)[..., ::2].fill_(0)
        deconv_upsample(x, weight, factor=3, out=apart)
    assert torch.equal(apart, wanted)


@on_backends
def test_a_skip_has_the_results_gradient(backend: str) -> None:
    x = torch.ones(1, 2, 3, 3, device=device_of(backend), requires_grad=True)
    large = torch.ones(1, 2, 12, 12, device=device_of(backend), requires_grad=True)
    skip = large[:, :, 5:11, 5:11]  # a view, as the published nets crop it
    with running(backend):
        result = deconv_upsample(x, factor=2, offset=1, skip=skip)
        alone = deconv_upsample(x, factor=2, offset=1, size=6)
        upstream = torch.arange(72.0, device=device_of(backend)).view(1, 2, 6, 6)
        result.backward(upstream)
    assert torch.equal(result, alone + skip)
    assert torch.equal(large.grad[:, :, 5:11, 5:11], upstream)  # type: ignore[index]
    assert large.grad.sum() == upstream.sum()  # type: ignore[union-attr]
    assert x.grad is not None


@on_backends
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_it_reaches(backend: str, value: float) -> None:
    device = device_of(backend)
    weight = torch.ones(1, 5, 5, device=device)
    for given, factor in ((weight, 2), (weight[:, :4, :4], 2), (weight[:, :3, :3], 4), (None, 8)):
        x = torch.ones(1, 1, 4, 4, device=device)
        x[0, 0, 1, 2] = value
        with running(backend):
            got = deconv_upsample(x, given, factor=factor)
        wanted = deconv_upsample.reference(x, given, factor=factor)
        assert torch.equal(got.isfinite(), wanted.isfinite())
        spoilt = torch.ones(1, 4, 4, device=device)
        spoilt[0, 3, 0] = value  # reaches no element that has no source for it
        x = torch.ones(1, 1, 3, 3, device=device)
        with running(backend):
            got = deconv_upsample(x, spoilt, factor=2)
        assert torch.equal(
            got.isfinite(), deconv_upsample.reference(x, spoilt, factor=2).isfinite()
        )


@on_backends
def test_a_weight_in_float32_beside_halves(backend: str) -> None:
    """Its gradient is float32, too."""
    x = torch.randn(1, 2, 3, 3, device=device_of(backend)).bfloat16()
    weight = torch.randn(2, 4, 4, device=device_of(backend), requires_grad=True)
    with running(backend):
        got = deconv_upsample(x, weight, factor=2)
        (grad,) = torch.autograd.grad(got.float().sum(), weight)
    wanted = deconv_upsample.reference(x, weight, factor=2)
    assert got.dtype == torch.bfloat16
    assert grad.dtype == torch.float32
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(grad, torch.autograd.grad(wanted.float().sum(), weight)[0])


def test_autocast_takes_the_skip_to_the_scores() -> None:
    x, skip = torch.randn(1, 2, 3, 3), torch.randn(1, 2, 8, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        result = deconv_upsample(x, factor=2, skip=skip)
    assert result.dtype == torch.float32
    with pytest.raises(TypeError, match="skip: expected x's dtype"):
        deconv_upsample(x, factor=2, skip=skip)


def test_under_autocast_too_out_lies_apart_from_the_skip() -> None:
    x, skip = torch.randn(1, 2, 3, 3).bfloat16(), torch.zeros(1, 2, 8, 8)
    out = skip.view(torch.bfloat16)[..., :8]
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match="out: expected memory apart from skip's"),
    ):
        deconv_upsample(x, factor=2, skip=skip, out=out)


@pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="no C++ compiler")
def test_where_upsampling_samples(tmp_path: Path) -> None:
    """The unit tests of core/sampler.h, as a program of its own."""
    include = Path(torch.__file__).parent / "include"
    program = tmp_path / "sampler"
    command = [*COMPILER, "-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]
    command += [f"-I{ROOT / 'csrc'}", "-isystem", str(include)]
    command += [
        "-isystem",
        sysconfig.get_path("include"),
        "-DTORCH_TARGET_VERSION=0x020b000000000000ULL",
    ]
    command += [str(ROOT / "tests" / "sampler_selftest.cpp"), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ran = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout
