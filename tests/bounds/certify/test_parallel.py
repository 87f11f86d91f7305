"""Pieces of images on several threads: the same bounds, and torch's threads as they were."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from sparring.bounds import margin, radius
from sparring.bounds.certify._certificates import over_slices, slices
from sparring.models import build
from sparring.threat import Threat


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 7, 64, 100])
def test_pieces_cover_all_images_in_order_and_give_every_thread_one(threads: int, count: int) -> None:
    pieces = slices(count, 64)
    assert [i for piece in pieces for i in range(count)[piece]] == list(range(count))
    assert len(pieces) >= min(threads, count) or count < 2 * threads
    assert all(piece.stop - piece.start <= 64 for piece in pieces)


def test_bounds_do_not_depend_on_threads_and_the_number_of_threads_stays(threads: int) -> None:
    model = build("mlp", shape=(1, 6, 6), classes=4, mean=(0.5,), std=(0.5,), widths=(20, 10)).eval()
    x = torch.rand(9, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    y = model(x).argmax(1)
    found = margin(model, x, y, Threat(math.inf, 0.02)), radius(model, x, y, 2)
    assert torch.get_num_threads() == threads
    alone = [margin(model, x[i : i + 1], y[i : i + 1], Threat(math.inf, 0.02)) for i in range(9)]
    assert torch.allclose(found[0], torch.cat(alone), rtol=0, atol=1e-10)
    assert not any(bound.requires_grad for bound in found)


def test_an_error_in_a_piece_reaches_the_caller_and_the_threads_are_given_back(threads: int) -> None:
    def work(piece: slice) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        if piece.start >= 2:
            raise ValueError("this piece fails")
        return torch.zeros(piece.stop - piece.start)

    with pytest.raises(ValueError, match="this piece fails"):
        over_slices(work, [slice(0, 2), slice(2, 4), slice(4, 6)])
    assert torch.get_num_threads() == threads
