"""Files of torch.save's and reparametrised weights: the plain network answers as the one that was saved."""

from __future__ import annotations

import argparse
import collections
import decimal
import functools
import os
import pickle
import re
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
from sparring.models._unpickle import Refused, branches, can_be_written, is_harmless, unpickled


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

    def look(self) -> float:
        return self.lr

    class Inner(dict[str, Any]): ...


class Items(dict[str, Any]):
    """A class of dictionaries, as configurations are."""


class Nothing:
    """A class whose objects have no state."""


CYCLE: dict[str, Any] = {"state_dict": STATE}
CYCLE["again"] = CYCLE


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
    "compiled in parts": ({name.replace("0.", "0._orig_mod.", 1): value for name, value in STATE.items()}, ""),
    "sharded in parts": ({name.replace("1.", "1._fsdp_wrapped_module."): value for name, value in STATE.items()}, ""),
    "swa": ({f"module.{name}": value for name, value in STATE.items()} | {"n_averaged": torch.tensor(3)}, ""),
    "beside moments": ({"mean": torch.zeros(3), "std": torch.ones(3), "model": STATE}, "model"),
    "in two parts": ({"model": {"head": {"weight": torch.ones(2)}, "backbone": STATE}}, "model.backbone"),
    "in a tuple": ((STATE, OPTIMISER), "0"),
    "classes of dictionaries": (
        Items(state_dict=Items(STATE), more=Items(a=1)),
        "state_dict",
    ),
    "plain types": (
        {
            "model": STATE,
            "nothing": Nothing(),
            "factory": functools.partial(nn.LayerNorm, eps=1e-6),
            "seen": collections.defaultdict(list, a=[1]),
            "last": collections.deque([1, 2], maxlen=3),
            "types": (int, slice(1, 2), range(3), frozenset([1]), decimal.Decimal(1)),
            "method": Settings().look,
            "class in a class": Settings.Inner(),
            "adam": torch.optim.Adam(network().parameters()),
        },
        "model",
    ),
    "holds itself": (CYCLE, "state_dict"),
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


def test_one_of_several_networks_in_one_set_by_its_prefix() -> None:
    both = {f"student.{n}": v for n, v in STATE.items()} | {f"teacher.{n}": v for n, v in OTHER.items()}
    assert torch.equal(chosen({"model": both}, key="teacher").tensors["0.weight"], OTHER["0.weight"])
    assert torch.equal(chosen({"model": both}, key="model.student").tensors["0.weight"], STATE["0.weight"])
    averaged = {name: value + 1 for name, value in both.items()}
    for groups in ({"ema": averaged, "state_dict": both}, {"state_dict": both, "ema": averaged}):
        assert torch.equal(chosen(groups, key="teacher").tensors["0.weight"], OTHER["0.weight"])


@pytest.mark.parametrize(
    "name", ["os.system", "posix.system", "builtins.eval", "builtins.len", "pathlib.os.system", "random._os.system"]
)
def test_what_python_itself_can_do_is_no_settings(name: str) -> None:
    assert not is_harmless(name)
    assert is_harmless("yolo.os.system")  # nothing of other packages is imported


@pytest.mark.parametrize("names", [{1: STATE["0.bias"], "1": STATE["0.bias"]}, {"a\nb": torch.ones(1)}])
def test_names_that_cannot_be_kept_are_refused(names: dict[Any, Tensor], tmp_path: Path) -> None:
    torch.save(names, tmp_path / "it.pth")
    with pytest.raises(Refused, match="it has the name"):
        list(branches(unpickled(tmp_path / "it.pth")))


def test_tensors_that_cannot_be_written_are_refused_where_they_are_taken() -> None:
    assert can_be_written(torch.ones(2, 0)) and can_be_written(torch.tensor(3))
    bad = (torch.eye(3).to_sparse(), torch.ones(2, device="meta"), torch.ones(2, dtype=torch.complex128))
    assert not any(can_be_written(value) for value in bad)
    groups = {"state_dict": STATE, "index": {"w": bad[1]}}  # as `_groups` marks them
    assert chosen(groups).key == "state_dict"
    with pytest.raises(LookupError, match=r"holds 'w' sparse, quantised"):
        chosen(groups, key="index")


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
    with pytest.raises(UserError, match=r"raw\.bin is refused: it cannot be read as a checkpoint"):
        read_checkpoint(tmp_path / "raw.bin")
    assert not (tmp_path / "acted").exists()
    with pytest.raises(UserError, match="no such file"):
        read_checkpoint(tmp_path / "none.pt")


def test_a_file_with_one_wrong_bit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "it.pth"
    torch.save({"w": torch.full((999,), 0.7)}, path)
    content = bytearray(path.read_bytes())
    place = content.index(torch.tensor([0.7] * 9).numpy().tobytes()) + 99
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged: 'it/data/0' does not have its checksum; copy it again"):
        read_checkpoint(path)
    torch.serialization.set_crc32_options(compute_crc32=False)
    try:
        torch.save({"w": torch.full((999,), 0.7)}, path)
    finally:
        torch.serialization.set_crc32_options(compute_crc32=True)
    assert read_checkpoint(path).tensors["w"][5] == torch.tensor(0.7)


def test_a_tensor_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(100_000, 1_000_000)}, tmp_path / "wide.pt")
    with pytest.raises(UserError, match="more memory than a checkpoint of its size"):
        read_checkpoint(tmp_path / "wide.pt")


def test_without_weights_it_says_what_to_save() -> None:
    with pytest.raises(LookupError, match=r"save model\.state_dict"):
        chosen({"": {"epoch": torch.tensor(3)}, "optimizer.state": {"exp_avg": torch.ones(3)}})


@pytest.mark.parametrize(
    "name", ["base_model.model.0.lora_A.default.weight", "0.parametrizations.weight.0.base", "1._flat_param"]
)
def test_weights_to_be_computed_from_others_are_refused_with_the_way_out(name: str) -> None:
    state = {"0.weight": torch.ones(2, 2), name: torch.ones(2, 2)}
    with pytest.raises(
        LookupError, match=re.escape(name) + r".*(merge_and_unload|remove_parametrizations|FULL_STATE_DICT)"
    ):
        chosen({"": state})
    assert chosen({"": state}, as_is=True).tensors == state


def _prune(module: nn.Module) -> None:
    prune.random_unstructured(module, "weight", 0.5)  # type: ignore[no-untyped-call]


def test_an_optimiser_holds_no_weights() -> None:
    assert not list(branches({"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}))


def test_shared_dictionaries_are_read_once() -> None:
    laugh: dict[str, Any] = {"w": torch.ones(2)}
    for _ in range(5):
        laugh = {str(at): laugh for at in range(99)}
    assert len(list(branches(laugh))) == 1


@pytest.mark.parametrize(
    "found",
    [
        {"proj_g": torch.ones(3, 1), "proj_v": torch.ones(3, 3)},
        {"weight_g": torch.ones(9, 1), "weight_v": torch.ones(1, 9)},
        {"weight_orig": torch.ones(9, 1), "weight_mask": torch.ones(1, 9)},
        {"weight_orig": torch.ones(3, 3), "weight_u": torch.ones(2), "weight_v": torch.ones(3)},
        {"weight_g": torch.ones(3, 1, dtype=torch.int64), "weight_v": torch.ones(3, 3)},
    ],
)
def test_what_only_looks_like_a_reparametrisation_stays(found: dict[str, Tensor]) -> None:
    assert plain_weights(found) == (found, ())


def test_as_is_nothing_is_folded() -> None:
    state = {f"module.{n}": v for n, v in parametrizations.weight_norm(nn.Linear(3, 2)).state_dict().items()}
    assert chosen({"": state}, as_is=True).tensors == state


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
    "square transposed convolution": (lambda: nn.ConvTranspose2d(4, 4, 3), (2, 4, 5, 5)),
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
    x: Tensor = torch.randn(shape)
    original(x)
    original.eval()
    tensors, notes = plain_weights(original.state_dict())
    plain = make()
    plain.load_state_dict(tensors)
    assert notes
    torch.testing.assert_close(plain(x), original(x))
