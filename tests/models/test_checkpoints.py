"""Files of torch.save's and reparametrised weights: the plain network answers as the one that was saved."""

from __future__ import annotations

import argparse
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from sparring.errors import UserError
from sparring.models import plain_weights, read_checkpoint
from sparring.models._checkpoints import chosen
from sparring.models._unpickle import branches, unpickled


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))


STATE = network().state_dict()
OTHER = network(1).state_dict()
OPTIMISER = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}


class Settings:
    """A class that the process which reads the file cannot import."""

    def __init__(self) -> None:
        self.lr, self.history = 0.1, [1, 2]


KEPT: dict[str, tuple[Any, str]] = {
    "plain": (STATE, ""),
    "nested": ({"state_dict": STATE, "optimizer": OPTIMISER, "epoch": 3}, "state_dict"),
    "model": ({"model": STATE, "optim_states": OPTIMISER, "args": argparse.Namespace(lr=0.1)}, "model"),
    "lightning": (
        {
            "pytorch-lightning_version": "2.0",
            "state_dict": {f"model.{name}": value for name, value in STATE.items()},
            "optimizer_states": [OPTIMISER],
            "callbacks": {"checkpoint": {"best": torch.ones(1)}},
            "hyper_parameters": {"settings": Settings(), "path": Path("data")},
        },
        "state_dict",
    ),
    "averaged": ({"model_ema": OTHER, "model_state_dict": STATE, "best": torch.tensor(0.9)}, "model_state_dict"),
    "only averaged": ({"ema": {"module": STATE, "decay": 0.99}, "optimizer": OPTIMISER}, "ema.module"),
    "compiled and parallel": ({f"_orig_mod.module.{name}": value for name, value in STATE.items()}, ""),
    "whole module": (network(), ""),
    "module inside": ({"net": nn.DataParallel(network())}, "net"),
}


@pytest.mark.parametrize("name", KEPT)
def test_weights_are_found_and_named_as_in_the_network(name: str, tmp_path: Path) -> None:
    torch.save(KEPT[name][0], tmp_path / "it.pth")
    found = chosen(dict(branches(unpickled(tmp_path / "it.pth"))))  # as the process of read_checkpoint does
    assert found.key == KEPT[name][1]
    assert found.tensors.keys() == STATE.keys()
    assert all(torch.equal(found.tensors[key], value) for key, value in STATE.items())


def test_the_format_before_torch_1_6(tmp_path: Path) -> None:
    torch.save({"state_dict": STATE}, tmp_path / "it.pth", _use_new_zipfile_serialization=False)
    assert chosen(dict(branches(unpickled(tmp_path / "it.pth")))).tensors.keys() == STATE.keys()


def test_one_of_several_sets_by_its_key(tmp_path: Path) -> None:
    torch.save(KEPT["averaged"][0], tmp_path / "it.pth")
    found = read_checkpoint(tmp_path / "it.pth", key="model_ema")
    assert all(torch.equal(found.tensors[name], value) for name, value in OTHER.items())
    assert "model_state_dict" in found.others
    with pytest.raises(UserError, match=r"no weights under 'emma'; it has .*'model_ema'"):
        read_checkpoint(tmp_path / "it.pth", key="emma")


class Bomb:
    def __init__(self, act: Callable[..., Any], *args: Any) -> None:
        self.act, self.args = act, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.act, self.args


@pytest.mark.parametrize(("act", "new"), [(os.system, True), (eval, False)])
def test_a_pickle_that_acts_is_refused_and_does_not_act(act: Callable[..., Any], new: bool, tmp_path: Path) -> None:
    trace = tmp_path / "acted"
    order = f"touch {trace}" if act is os.system else f"open({str(trace)!r}, 'w')"
    content = {"state_dict": STATE, "more": Bomb(act, order)}
    torch.save(content, tmp_path / "bomb.pth", _use_new_zipfile_serialization=new)
    with pytest.raises(UserError, match=r"bomb\.pth is refused: it .*(system|eval)"):
        read_checkpoint(tmp_path / "bomb.pth")
    assert not trace.exists()


def test_a_plain_pickle_and_no_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "raw.bin").write_bytes(pickle.dumps(Bomb(os.system, f"touch {tmp_path / 'acted'}")))
    with pytest.raises(UserError, match=r"raw\.bin is refused: it is no checkpoint"):
        read_checkpoint(tmp_path / "raw.bin")
    assert not (tmp_path / "acted").exists()
    with pytest.raises(UserError, match="no such file"):
        read_checkpoint(tmp_path / "none.pt")


def test_a_tensor_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(100_000, 1_000_000)}, tmp_path / "wide.pt")
    with pytest.raises(UserError, match="more memory than a checkpoint of its size"):
        read_checkpoint(tmp_path / "wide.pt")


def test_without_weights_it_says_what_to_save() -> None:
    with pytest.raises(LookupError, match=r"save model\.state_dict"):
        chosen({"": {"epoch": torch.tensor(3)}, "optimizer.state": {"exp_avg": torch.ones(3)}})


def _prune(module: nn.Module) -> None:
    prune.random_unstructured(module, "weight", 0.5)  # type: ignore[no-untyped-call]


WAYS: dict[str, Callable[[nn.Module], object]] = {
    "prune": _prune,
    "weight_norm": lambda module: weight_norm(module),
    "weight_norm of all": lambda module: weight_norm(module, dim=None),  # type: ignore[arg-type]
    "spectral_norm": lambda module: spectral_norm(module),
    "parametrised weight_norm": lambda module: parametrizations.weight_norm(module),
    "parametrised spectral_norm": lambda module: parametrizations.spectral_norm(module),
}
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (2, 6)),
    "convolution": (lambda: nn.Conv2d(3, 4, 3), (2, 3, 5, 5)),
    "transposed convolution": (lambda: nn.ConvTranspose2d(3, 4, 3), (2, 3, 5, 5)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("way", WAYS)
def test_reparametrised_weights_become_those_that_forward_uses(way: str, layer: str) -> None:
    make, shape = LAYERS[layer]
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        original = make()
        WAYS[way](original)
    original.eval()
    x: Tensor = torch.randn(shape)
    tensors, notes = plain_weights(original.state_dict())
    plain = make()
    plain.load_state_dict(tensors)
    assert notes
    torch.testing.assert_close(plain(x), original(x))
