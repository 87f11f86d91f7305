from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparring.errors import UserError
from sparring.models import MODELS, Blueprint, build, load_model, load_weights_, save_model
from sparring.plugins import import_object


def make(name: str, **options: object) -> nn.Module:
    shape = options.pop("shape", (1, 28, 28))
    return build(name, shape=shape, classes=10, mean=(0.5,) * shape[0], std=(0.25,) * shape[0], **options)  # type: ignore[arg-type,index]


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [
        ("linear", (1, 28, 28), 7_850),
        ("lenet-300-100", (1, 28, 28), 266_610),
        ("lenet-5", (1, 28, 28), 431_080),
        ("small-cnn", (3, 32, 32), 214_918),
        ("vgg-like", (3, 32, 32), 14_027_658),
        ("resnet-32", (3, 32, 32), 466_906),
    ],
)
def test_sizes_are_the_literature_s(name: str, shape: tuple[int, ...], parameters: int) -> None:
    model = make(name, shape=shape)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 17, 24)])
def test_shapes_adapt(name: str, shape: tuple[int, ...]) -> None:
    options = {"width": 0.1} if name in ("vgg-like", "resnet-32", "lenet-5", "lenet-300-100") else {}
    model = make(name, shape=shape, **options).eval()
    assert model(torch.rand(2, *shape)).shape == (2, 10)


def test_normalisation_is_the_first_layer() -> None:
    seen: list[Tensor] = []
    model = make("lenet-300-100")
    model.get_submodule("1").register_forward_hook(lambda m, i, o: seen.append(i[0]))
    model(torch.full((1, 1, 28, 28), 0.75))
    assert torch.allclose(seen[0], torch.ones(()))


def test_one_seed_gives_one_network_and_leaves_the_global_stream_alone() -> None:
    before = torch.random.get_rng_state()
    first, again, other = make("mlp", seed=1), make("mlp", seed=1), make("mlp", seed=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lenet-30-100", {}, "Did you mean 'lenet-300-100'"),
        ("lenet-5", {"shape": (1, 8, 8)}, "at least 16"),
        ("resnet-32", {"depth": 31}, "6n \\+ 2"),
        ("linear", {"width": 2.0}, "no option 'width'"),
        ("lenet-5", {"width": -1.0}, "width"),
        ("no_such_module:factory", {}, "cannot import"),
        ("math:nothing", {}, "has no 'nothing'"),
        ("math:pi", {}, "not a function"),
        ("os:getcwd", {}, "not a torch.nn.Module"),
    ],
)
def test_mistakes_are_named(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(name, **options)


def test_a_user_s_factory_gets_what_it_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "import math, torch\n"
        "def net(shape, classes):\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(math.prod(shape), classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    assert make("mine:net")(torch.rand(3, 1, 28, 28)).shape == (3, 10)
    assert import_object("mine:net").__name__ == "net"


def test_weights_that_do_not_fit_are_refused() -> None:
    model = make("linear")
    good = {name: value.clone() for name, value in model.state_dict().items()}
    for change, message in (
        ({"6.weight": torch.zeros(1)}, "model does not have"),
        ({"2.weight": torch.zeros(3, 3)}, "shape"),
        ({"2.bias": torch.full((10,), torch.nan)}, "NaN"),
    ):
        with pytest.raises(UserError, match=message):
            load_weights_(model, {**good, **change})
    del good["2.bias"]
    with pytest.raises(UserError, match="lack"):
        load_weights_(model, good)


def test_a_model_file_goes_there_and_back(tmp_path: Path) -> None:
    blueprint = Blueprint("mlp", (1, 4, 4), 3, (0.5,), (0.2,), widths=(5,))
    model = blueprint.build(seed=3)
    masks = {"2.weight": torch.rand(5, 16) > 0.5}
    model.get_parameter("2.weight").data.mul_(masks["2.weight"])
    path = save_model(tmp_path / "m.safetensors", model, blueprint, masks)
    again, found, kept = load_model(path)
    assert found == blueprint
    assert torch.equal(kept["2.weight"], masks["2.weight"])
    x = torch.rand(2, 1, 4, 4)
    assert torch.equal(model.eval()(x), again(x))


def test_masks_are_evidence_of_what_was_pruned(tmp_path: Path) -> None:
    blueprint = Blueprint("mlp", (1, 4, 4), 3, (0.5,), (0.2,), widths=(5,))
    model = blueprint.build(seed=3)
    for masks, reason in (
        ({"2.weight": torch.zeros(5, 16, dtype=torch.bool)}, "are not zero: .* was changed"),
        ({"2.weight": torch.ones(16, dtype=torch.bool)}, "to no weight"),
        ({"9.weight": torch.ones(5, 16, dtype=torch.bool)}, "to no weight"),
        ({"2.weight": torch.ones(5, 16)}, "to no weight"),
    ):
        path = save_model(tmp_path / "m.safetensors", model, blueprint, masks)
        with pytest.raises(UserError, match=reason):
            load_model(path)


def test_a_model_file_that_names_code_is_refused(tmp_path: Path) -> None:
    model = build("mlp", shape=(1, 2, 2), classes=2, mean=(0.0,), std=(1.0,))
    path = save_model(tmp_path / "m.safetensors", model, Blueprint("os:system", (1, 2, 2), 2, (0.0,), (1.0,)))
    with pytest.raises(UserError, match="which is code"):
        load_model(path)
