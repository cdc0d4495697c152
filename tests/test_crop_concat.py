"""What the registry cannot say of crop_concat."""

from __future__ import annotations

import os

import pytest
import torch

from segfuse.ops import crop_concat

FREE = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(FREE < 6 << 30, reason="needs 6 GiB of free memory")
def test_more_than_two_to_the_31_elements() -> None:
    side = 33_000  # 2 * 33000^2 > 2^31
    row = torch.arange(side, dtype=torch.int32).to(torch.uint8)
    skip = torch.cat([row, row[:10]]).expand(1, 1, side, side + 10)
    up = row.flip(0).expand(1, 1, side, side)
    result = crop_concat(skip, up)
    assert result.numel() > 2**31
    for y in (0, 12_345, side - 1):
        assert torch.equal(result[0, 0, y], skip[0, 0, y, 5 : 5 + side])
        assert torch.equal(result[0, 1, y], up[0, 0, y])


def test_rows_longer_than_a_threads_share() -> None:
    """A row is split among threads where there are few."""
    skip, up = torch.randn(1, 2, 300_007), torch.randn(1, 3, 300_001)
    assert torch.equal(crop_concat(skip, up), crop_concat.reference(skip, up))


def test_gradients_are_views_where_nothing_was_cropped() -> None:
    """So that a padded network's skip costs no memory on the way back."""
    skip, up = torch.randn(1, 2, 4, 4, requires_grad=True), torch.randn(1, 3, 4, 4)
    upstream = torch.randn(1, 5, 4, 4)
    (grad,) = torch.autograd.grad(crop_concat(skip, up), skip, upstream)
    assert grad.untyped_storage().data_ptr() == upstream.untyped_storage().data_ptr()


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    skip, up = torch.randn(1, 2, 6, 6), torch.randn(1, 3, 4, 4, requires_grad=True)
    crop_concat(skip, up).sum().backward()
    assert skip.grad is None
    assert torch.equal(up.grad, torch.ones_like(up))


def test_the_raw_operator_checks_for_itself() -> None:
    """``torch.ops.segfuse`` is within reach too, and must not read out of bounds."""
    op = torch.ops.segfuse
    large, small = torch.zeros(1, 2, 6, 6), torch.zeros(1, 2, 4, 4)
    for call in (
        lambda: op.crop_concat(small, large),
        lambda: op.crop_concat(large, small.half()),
        lambda: op.crop_concat(large[0, 0], small[0, 0]),
        lambda: op.crop_concat(large, small[0]),
        lambda: op.crop_concat(large.expand(2, 2, 6, 6), small),
        lambda: op.crop_concat_out(large, small, torch.zeros(1, 4, 4, 5)),
        lambda: op.crop_concat_out(large, small, torch.zeros(1, 4, 4)),
        lambda: op.crop_concat_backward(small, [1, 2, 3, 3]),
        lambda: op.crop_concat_backward(small, [1, 3, 6, 6]),
        lambda: op.crop_concat_backward(small, [1, 2, 6]),
    ):
        with pytest.raises(ValueError, match=r"^crop_concat"):
            call()


def test_views_of_one_buffer_may_be_read_and_written() -> None:
    """Only what overlaps is refused."""
    buffer = torch.randn(3, 4, 5, 5)
    skip, up, out = buffer[:1, :2], buffer[1:2, :2], buffer[2:]
    want = crop_concat.reference(skip, up)
    assert torch.equal(crop_concat(skip, up, out=out), want)
