"""Memory that work takes, and memory that is free."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparring import memory
from sparring.errors import UserError
from sparring.memory import Need, check_room, free_memory, measured


def test_what_lives_at_a_time_is_counted_and_what_died_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_KEPT", 1.0)

    def work(x: Tensor) -> None:
        torch.zeros(10)  # gone at once
        kept = x * 2
        other = kept + 1
        del other
        torch.cat([kept, kept, kept])

    assert measured(work, torch.rand(3, 5)) == Need(memory._SCRATCH, 4 * 5 * 4)


def test_a_pass_back_keeps_what_a_pass_forward_does_not() -> None:
    layers = [part for _ in range(6) for part in (nn.Linear(4096, 4096, bias=False), nn.ReLU())]
    model = nn.Sequential(*layers).requires_grad_(False)

    def there(x: Tensor) -> None:
        with torch.no_grad():
            model(x)

    def back(x: Tensor) -> None:
        point = x.clone().requires_grad_()
        torch.autograd.grad(model(point).sum(), point)

    forward, both = (measured(work, torch.rand(1, 4096)).each for work in (there, back))
    assert forward < 4096 * 4 * 4 < 4096 * 4 * 6 < both


def test_measuring_leaves_the_random_stream_as_it_was() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    measured(torch.rand_like, torch.rand(1, 4))
    assert not torch.equal(torch.rand(3), expected)  # the image itself was drawn
    torch.manual_seed(1)
    x = torch.zeros(1, 4)
    measured(torch.rand_like, x)
    assert torch.equal(torch.rand(3), expected)


def test_as_many_images_fit_as_there_is_memory_for() -> None:
    need = Need(100, 10)
    assert [need.fitting(free, most=50) for free in (0, 105, 155, 10**6)] == [1, 1, 5, 50]
    need.check(5, 150, "this")
    with pytest.raises(UserError, match="this takes 1 MiB for 6 images at a time and 1 MiB are free: at most 5 fit"):
        need.check(6, 150, "this")
    with pytest.raises(UserError, match="fewer workers"):
        need.check(1, 50, "this")


def test_free_memory_of_a_cpu_is_that_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: 123)
    assert free_memory() == free_memory(torch.device("cpu")) == 123


def test_a_network_too_large_is_refused_before_it_is_built(capfd: pytest.CaptureFixture[str]) -> None:
    made = []

    def build() -> nn.Module:
        print("building")
        made.append(nn.Linear(2**20, 2**24))  # 64 TiB
        return made[-1]

    with pytest.raises(UserError, match=r"training 'net' takes at least 19660\d.\d GiB and .* are free: use a smaller"):
        check_room(build, 3, "training 'net'")
    assert not made and not capfd.readouterr().out


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_a_network_whose_size_is_unknown_is_built_all_the_same(error: type[BaseException]) -> None:
    def build() -> nn.Module:
        raise error

    check_room(build, 3, "training 'net'")
