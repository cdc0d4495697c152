"""What the registry cannot say of upconv_concat."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from backends import BACKENDS, device_of, running
from torch import Tensor

from segfuse.nn import UpConv1d, UpConv2d, UpConv3d
from segfuse.ops import upconv_concat

# x, channels of up, kernel: more than one band, block of channels and partial sum, on the CPU
LARGE = {
    "bands": ((2, 7, 70, 90), 33, 2),
    "blocks": ((1, 300, 20, 31), 100, 2),
    "pieces of rows": ((1, 3, 20_000), 9, 2),
    "volume": ((1, 5, 9, 14, 30), 12, 3),
}
large = pytest.mark.parametrize("case", LARGE)


def inputs(case: str, dtype: torch.dtype = torch.float64, *, last: bool = False) -> list[Tensor]:
    """Of a case, asking for gradients; x and skip channels_last if so asked."""
    generator = torch.Generator().manual_seed(0)

    def make(*size: int) -> Tensor:
        t = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        if last and len(size) in formats:
            t = t.contiguous(memory_format=formats[len(size)])
        return t.requires_grad_()

    size, channels, k = LARGE[case]
    skip = make(size[0], 2, *(k * n + 5 for n in size[2:]))
    weight = make(size[1], channels, *(k for _ in size[2:]))
    return [skip, make(*size), weight, make(channels)]


def results(function: Callable[..., Tensor], given: list[Tensor]) -> list[Tensor]:
    """The result, and the gradients of all that was given."""
    result = function(*given)
    return [result, *torch.autograd.grad(result, given, upstream(result))]


def upstream(result: Tensor) -> Tensor:
    """A gradient that every dtype holds exactly."""
    return ((torch.arange(result.numel()) % 17 - 5) / 8).view(result.shape).to(result.dtype)


@large
@pytest.mark.parametrize("last", [False, True])
def test_bands_make_a_whole(case: str, *, last: bool) -> None:
    given = inputs(case, last=last)
    for ours, want in zip(
        results(upconv_concat, given), results(upconv_concat.reference, given), strict=True
    ):
        torch.testing.assert_close(ours, want, rtol=1e-11, atol=1e-9)


@large
def test_bands_of_half_precision_are_summed_in_float32(case: str) -> None:
    """So that errors do not grow with the number of bands."""
    given = inputs(case, torch.bfloat16)
    truth = results(upconv_concat.reference, [t.detach().double().requires_grad_() for t in given])
    for ours, want in zip(results(upconv_concat, given), truth, strict=True):
        error = (ours.double() - want).abs().max() / want.abs().max()
        assert error < torch.finfo(torch.bfloat16).eps


@large
def test_bits_do_not_depend_on_the_number_of_threads(case: str) -> None:
    given = inputs(case, torch.float32)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(results(upconv_concat, given))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_a_view_whose_rows_lie_apart() -> None:
    given = inputs("bands")
    whole = torch.randn(2, 7, 72, 95, dtype=torch.float64, requires_grad=True)
    given[1] = whole[:, :, 1:-1, 2:-3]
    for ours, want in zip(
        results(upconv_concat, given), results(upconv_concat.reference, given), strict=True
    ):
        torch.testing.assert_close(ours, want, rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("axis", [2, 3])
def test_a_map_that_is_one_pixel_wide_and_expanded(backend: str, axis: int) -> None:
    given = [t.detach().to(device_of(backend)).requires_grad_() for t in inputs("bands")]
    given[1] = given[1].detach().narrow(axis, 0, 1).expand(given[1].shape).requires_grad_()
    with running(backend):
        found = results(upconv_concat, given)
    for ours, want in zip(found, results(upconv_concat.reference, given), strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize("asking", range(4))
def test_only_what_is_asked_for_gets_a_gradient(asking: int) -> None:
    given = [t.detach() for t in inputs("bands")]
    want = results(upconv_concat.reference, inputs("bands"))[1 + asking]
    given[asking].requires_grad_()
    result = upconv_concat(*given)
    result.backward(upstream(result))
    assert [t.grad is not None for t in given] == [i == asking for i in range(4)]
    torch.testing.assert_close(given[asking].grad, want, rtol=1e-11, atol=1e-9)


def test_the_skips_gradient_is_a_view_where_nothing_was_cropped() -> None:
    skip = torch.randn(1, 2, 4, 4, requires_grad=True)
    result = upconv_concat(skip, torch.randn(1, 3, 2, 2), torch.randn(3, 5, 2, 2))
    above = torch.randn(1, 7, 4, 4)
    (grad,) = torch.autograd.grad(result, skip, above)
    assert grad.untyped_storage().data_ptr() == above.untyped_storage().data_ptr()


def test_the_raw_operator_checks_for_itself() -> None:
    """``torch.ops.segfuse`` is within reach too, and must not read out of bounds."""
    op = torch.ops.segfuse
    skip, x, weight, bias = (torch.zeros(s) for s in ((1, 2, 6, 6), (1, 3, 2, 2), (3, 4, 2, 2), 4))
    grad = torch.zeros(1, 6, 4, 4)
    for call in (
        lambda: op.upconv_concat(skip[..., :3], x, weight, bias),
        lambda: op.upconv_concat(skip.half(), x, weight, bias),
        lambda: op.upconv_concat(skip[0], x, weight, bias),
        lambda: op.upconv_concat(skip, x[0], weight[0], bias),
        lambda: op.upconv_concat(skip, x, weight[1:], bias),
        lambda: op.upconv_concat(skip, x, weight[:, :, :1], bias),
        lambda: op.upconv_concat(skip, x, weight.half(), bias),
        lambda: op.upconv_concat(skip, x, weight, bias[1:]),
        lambda: op.upconv_concat(skip.expand(2, 2, 6, 6), x, weight, bias),
        lambda: op.upconv_concat_backward(grad[:, :3], x, weight, True, True, True),
        lambda: op.upconv_concat_backward(grad[..., :3], x, weight, True, True, True),
        lambda: op.upconv_concat_backward(grad.half(), x, weight, True, True, True),
    ):
        with pytest.raises(ValueError, match=r"^upconv_concat"):
            call()


@pytest.mark.parametrize(("dims", "module"), [(1, UpConv1d), (2, UpConv2d), (3, UpConv3d)])
def test_modules_are_torchs_and_join(dims: int, module: type[UpConv2d]) -> None:
    plain: type[torch.nn.ConvTranspose2d] = getattr(torch.nn, f"ConvTranspose{dims}d")
    theirs, ours = plain(4, 3, 2, stride=2), module(4, 3)
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours, plain)
    x, skip = torch.randn(2, 4, *(3,) * dims), torch.randn(2, 5, *(8,) * dims)
    assert torch.equal(ours(x), theirs(x))
    want = upconv_concat.reference(skip, x, theirs.weight, theirs.bias)
    torch.testing.assert_close(ours(x, skip=skip), want)


def test_what_modules_refuse() -> None:
    for factor in (0, 1.5, (2, 2)):
        with pytest.raises(ValueError, match="UpConv: factor: expected an integer, 1 or more"):
            UpConv2d(4, 3, factor)  # type: ignore[arg-type]
    up = UpConv2d(4, 3, device="meta", dtype=torch.float64)
    assert up.weight.is_meta
    assert up.weight.dtype == torch.float64
    with pytest.raises(ValueError, match="UpConv: output_size: expected None where a skip"):
        UpConv2d(4, 3)(torch.randn(1, 4, 2, 2), [5, 5], skip=torch.randn(1, 2, 4, 4))
