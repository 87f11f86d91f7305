"""Batches of an attack are shared out among threads, and their results are those of one thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from sparring.attacks import ATTACKS, _meter, run
from sparring.study import configured
from sparring.threads import shared_out
from sparring.threat import LINF, Threat


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Noting(nn.Module):
    """Keep what it saw last, as users' models do, and note which threads call it."""

    def __init__(self, seen: set[int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.threads = nn.Linear(64, 16), nn.Linear(16, 4), seen

    def __deepcopy__(self, memo: dict[int, object]) -> Noting:
        twin = Noting(self.threads)
        twin.first, twin.last = self.first, self.last
        return twin.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.threads.add(threading.get_ident())
        self.kept = self.first(x.flatten(1)).relu().sin()
        return self.last(self.kept)


@pytest.mark.parametrize("name", ["pgd", "nearest", "apgd"])
def test_two_threads_find_what_one_finds(
    name: str, images: Tensor, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_meter, "_PAUSE", float("inf"))  # nothing is told from inside a batch but its first pass
    seen: set[int] = set()
    net = Noting(seen).eval()
    x = torch.cat([images, 1 - images, images.flip(3)])
    y = net(x).argmax(1)
    attack = configured([name], ["steps=12"])[name]
    threat = Threat(LINF, None if name == "nearest" else 0.05)
    reached: list[tuple[str, float]] = []
    shared = run(net, x, y, attack, threat, batch_size=9, progress=lambda stage, done, _: reached.append((stage, done)))
    assert len(seen) > 1, "several threads took part"
    counts = [done for stage, done in reached if stage == "attacking"]
    assert counts == sorted(counts) and [done for done in counts if done % 9 == 0] == [0, 9, 18, 27, 36]
    torch.set_num_threads(1)
    seen.clear()
    alone = run(net, x, y, attack, threat, batch_size=9)
    assert seen == {threading.get_ident()}
    assert torch.equal(shared.x_adv, alone.x_adv)
    assert (shared.forwards, shared.backwards) == (alone.forwards, alone.backwards)
    assert (shared.flags, shared.success.tolist()) == (alone.flags, alone.success.tolist())


def test_what_is_not_independent_stays_on_one_thread(images: Tensor, two_threads: None) -> None:
    seen: set[int] = set()
    net = Noting(seen).eval()
    y = net(images).argmax(1)
    threat = Threat(LINF, 0.05)
    hook = net.register_forward_hook(lambda *_: None)
    run(net, images, y, ATTACKS["pgd"], threat, batch_size=4)
    hook.remove()
    run(net, images, y, lambda model, x, y, **_: x + 0 * model(x).sum(), threat, batch_size=4)  # a user's own
    assert seen == {threading.get_ident()}


def test_pieces_come_in_order_and_errors_come_out(two_threads: None) -> None:
    assert list(shared_out(lambda piece: (piece, torch.get_num_threads()), range(7))) == [(i, 1) for i in range(7)]
    with pytest.raises(ZeroDivisionError):
        list(shared_out(lambda piece: 1 // piece, [1, 0, 1]))
    assert torch.get_num_threads() == 2
