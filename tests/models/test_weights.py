"""Weights go into a model by their names, through what wrappers make of them, or are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparring.errors import UserError
from sparring.files import save_tensors
from sparring.models import Normalise, load_weights_, read_weights


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))


STATE = network(0).state_dict()


def named(prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in STATE.items()}


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "backbone.net.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_recognised(prefix: str) -> None:
    model = network(1)
    notes = load_weights_(model, named(prefix))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in STATE.items())
    assert bool(notes) == bool(prefix)


def test_weights_of_the_network_inside_a_wrapper() -> None:
    model = nn.Sequential(Normalise((0.5,) * 3, (0.2,) * 3), network(1))
    before = model[0].state_dict()
    notes = load_weights_(model, named("module."))
    assert all(torch.equal(model[1].state_dict()[name], value) for name, value in STATE.items())
    assert all(torch.equal(model[0].state_dict()[name], value) for name, value in before.items())
    assert any("network inside" in note for note in notes)


def test_a_wrapper_that_learns_is_not_left_as_it_was_drawn() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), network(1))
    with pytest.raises(UserError, match=r"lack '0\.bias'"):
        load_weights_(model, STATE)


def test_masks_of_torch_are_applied() -> None:
    mask = (torch.rand(8, 12) > 0.5).float()
    rest = {name: value for name, value in STATE.items() if name != "1.weight"}
    model = network(1)
    load_weights_(model, {**rest, "1.weight_orig": STATE["1.weight"], "1.weight_mask": mask})
    assert torch.equal(model.state_dict()["1.weight"], STATE["1.weight"] * mask)


def test_counters_of_batches_may_be_missing() -> None:
    load_weights_(network(1), {name: value for name, value in STATE.items() if "num_batches" not in name})


def test_names_that_differ_are_named_with_the_nearest() -> None:
    renamed = {("1.weights" if name == "1.weight" else name): value for name, value in STATE.items()}
    with pytest.raises(UserError, match=r"lack '1\.weight' \(nearest: '1\.weights'\); they have '1\.weights'"):
        load_weights_(network(1), renamed)


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_lies_beside_the_network_is_left_out_and_named(wrapped: bool) -> None:
    inner = network(1)
    model = nn.Sequential(Normalise((0.5,) * 3, (0.2,) * 3), inner) if wrapped else inner
    notes = load_weights_(model, {**named("model."), "criterion.weight": torch.ones(4)})
    assert all(torch.equal(inner.state_dict()[name], value) for name, value in STATE.items())
    assert any("left out 'criterion.weight'" in note for note in notes)


def test_two_networks_beside_each_other_are_told_apart_by_the_user() -> None:
    with pytest.raises(UserError, match=r"several such networks: 'ema\.', 'model\.'; .*--key"):
        load_weights_(network(1), named("model.") | named("ema."))


@pytest.mark.parametrize(
    "change",
    [Tensor.numpy, Tensor.tolist, Tensor.to_sparse, lambda value: value.to("meta")],
    ids=["array", "list", "sparse", "meta"],
)
def test_what_is_no_dense_tensor_is_named(change: Callable[[Tensor], Any]) -> None:
    with pytest.raises(UserError, match=r"'1\.weight' in the weights is not a dense tensor with values but a "):
        load_weights_(network(1), {**STATE, "1.weight": change(STATE["1.weight"])})


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize("left", ["0.weight", "1.weight"])
def test_of_tied_weights_one_is_enough(left: str) -> None:
    state, model = tied().state_dict(), tied()
    load_weights_(model, {name: value for name, value in state.items() if name != left})
    assert torch.equal(model.state_dict()["1.weight"], state["0.weight"])


def test_tied_weights_that_differ_are_refused() -> None:
    with pytest.raises(UserError, match=r"'0\.weight' and '1\.weight' are tied in the model but differ"):
        load_weights_(tied(), {**tied().state_dict(), "1.weight": torch.ones(4, 4)})


def test_a_network_with_its_own_weight_norm_takes_its_weights_as_they_are() -> None:
    model, other = (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))) for _ in range(2))
    state = {name: value.clone() for name, value in other.state_dict().items()}
    behind = nn.Sequential(Normalise((0.5,), (0.2,)), model)
    for taker in (model, behind):
        model[0].weight = torch.ones(3, 4)
        load_weights_(taker, {f"module.{name}": value for name, value in state.items()})
        assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    with pytest.raises(UserError, match="convert them with --as-is"):
        load_weights_(model, nn.Sequential(nn.Linear(4, 3)).state_dict())


def test_many_strange_names_are_refused_at_once() -> None:
    strange = {f"l{at}.{'x' * 100}": torch.ones(1) for at in range(20_000)}
    with pytest.raises(UserError, match="and 19999 more, which the model does not have"):
        load_weights_(network(1), strange)


@pytest.mark.parametrize("name", ["x" * 1001, "1.weight\x1b[31m", "a\0b"])
def test_names_that_are_no_tensors_are_refused(name: str, tmp_path: Path) -> None:
    file = save_tensors(tmp_path / "w.safetensors", {name: torch.ones(1)})
    with pytest.raises(UserError, match="which is not a tensor's"):
        read_weights(file)
