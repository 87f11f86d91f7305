"""Sparsity is of all matrices: what the forward pass uses is really zero, whatever computes it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from sparring import sparsity
from sparring.errors import UserError
from sparring.files import load_tensors, save_tensors
from sparring.matrices import matrices as sparsity_matrices
from sparring.metrics import size
from sparring.models import load_weights_
from sparring.sparsity import SCORES, PruningSpec, Rule, build_pruner, counts
from sparring.train import Recipe, fit, predict

pytestmark = pytest.mark.filterwarnings(
    "ignore:LSTM with projections",
    "ignore:`torch.nn.utils.weight_norm` is deprecated",
    "ignore::sparring.sparsity.CollapsedLayerWarning",
)
X = torch.rand(12, 2, 6, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(12) % 3
IMAGES = (X * 255).to(torch.uint8)


class Net(nn.Module):
    """A layer under test between a convolution and a linear layer."""

    def __init__(self, layer: nn.Module, run: Callable[[nn.Module, Tensor], Tensor], features: int) -> None:
        super().__init__()
        self.stem, self.layer, self.run, self.out = nn.Conv2d(2, 6, 3, padding=1), layer, run, nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.run(self.layer, self.stem(x)).flatten(1))


class Standardised(nn.Conv2d):
    """Weight standardisation (Qiao et al. 2019): a zero becomes minus the mean."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class SamePadded(nn.Conv2d):
    """A convolution with a forward of its own that uses its weight as it is."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias, groups=self.groups)


class Bare(nn.Module):
    """A matrix that is no layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.shift = nn.Parameter(torch.randn(36, 8)), nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bci,io->bco", x.flatten(2), self.matrix) + self.shift


class Held(nn.Module):
    """A matrix in a buffer, beside a mask, which is none."""

    matrix: Tensor
    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.randn(216, 8))
        self.register_buffer("mask", torch.ones(216, 8).tril())

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.matrix * self.mask)


class Hooked(nn.Module):
    """A matrix of a module of one's own, computed by an old-style hook."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(216, 8))
        nn.utils.weight_norm(self, "matrix")

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


class Adapted(nn.Linear):
    """A linear layer with a low-rank addition that begins with zeros (Hu et al. 2022)."""

    def __init__(self) -> None:
        super().__init__(216, 8)
        self.down, self.up = nn.Parameter(torch.randn(2, 216)), nn.Parameter(torch.zeros(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.up @ self.down, self.bias)


def _same(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def _rows(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x.flatten(2).transpose(1, 2))[0]


def _attend(layer: nn.Module, x: Tensor) -> Tensor:
    x = x.flatten(2).transpose(1, 2)
    return layer(x, x[..., :6], x[..., :6])[0]


def _flat(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x.flatten(1))


def _conv() -> nn.Conv2d:
    return nn.Conv2d(6, 8, 3, padding=1)


KINDS: dict[str, Callable[[], Net]] = {
    "plain": lambda: Net(_conv(), _same, 288),
    "weight_norm": lambda: Net(parametrizations.weight_norm(_conv()), _same, 288),
    "weight_norm of a linear layer along inputs": lambda: Net(
        parametrizations.weight_norm(nn.Linear(216, 8), dim=1), _flat, 8
    ),
    "spectral_norm": lambda: Net(parametrizations.spectral_norm(_conv()), _same, 288),
    "old weight_norm": lambda: Net(nn.utils.weight_norm(_conv()), _same, 288),
    "old spectral_norm": lambda: Net(nn.utils.spectral_norm(_conv()), _same, 288),
    "pruned by torch": lambda: Net(prune.l1_unstructured(_conv(), "weight", 0.3), _same, 288),
    "lstm": lambda: Net(nn.LSTM(6, 5, num_layers=2, batch_first=True, bidirectional=True), _rows, 360),
    "gru": lambda: Net(nn.GRU(6, 5, batch_first=True), _rows, 180),
    "rnn": lambda: Net(nn.RNN(6, 5, batch_first=True), _rows, 180),
    "projected lstm": lambda: Net(nn.LSTM(6, 5, proj_size=3, batch_first=True), _rows, 108),
    "lstm under spectral_norm": lambda: Net(
        parametrizations.spectral_norm(nn.LSTM(6, 5, batch_first=True), "weight_hh_l0"), _rows, 180
    ),
    "lstm under weight_norm": lambda: Net(
        parametrizations.weight_norm(nn.LSTM(6, 5, batch_first=True), "weight_hh_l0"), _rows, 180
    ),
    "attention": lambda: Net(nn.MultiheadAttention(6, 2, batch_first=True), _attend, 216),
    "attention with keys of its own": lambda: Net(
        nn.MultiheadAttention(6, 2, kdim=6, vdim=6, batch_first=True), _attend, 216
    ),
    "transposed": lambda: Net(nn.ConvTranspose2d(6, 4, 2), _same, 196),
    "transposed under weight_norm": lambda: Net(parametrizations.weight_norm(nn.ConvTranspose2d(6, 4, 2)), _same, 196),
    "depthwise": lambda: Net(nn.Conv2d(6, 6, 3, groups=6), _same, 96),
    "conv1d": lambda: Net(nn.Conv1d(6, 4, 3), lambda layer, x: layer(x.flatten(2)), 136),
    "transposed conv1d": lambda: Net(nn.ConvTranspose1d(6, 4, 3), lambda layer, x: layer(x.flatten(2)), 152),
    "conv3d": lambda: Net(nn.Conv3d(1, 4, 3), lambda layer, x: layer(x[:, None]), 256),
    "a forward of its own": lambda: Net(SamePadded(6, 8, 3), _same, 288),
    "a depthwise forward of its own": lambda: Net(SamePadded(6, 6, 3, groups=6), _same, 216),
}
LEFT: dict[str, tuple[Callable[[], Net], int]] = {
    "orthogonal": (lambda: Net(parametrizations.orthogonal(nn.Linear(216, 8)), _flat, 8), 216 * 8),
    "standardised": (lambda: Net(Standardised(6, 8, 3, padding=1), _same, 288), 6 * 8 * 9),
    "bare": (lambda: Net(Bare(), _same, 48), 36 * 8),
    "held in a buffer": (lambda: Net(Held(), _flat, 8), 216 * 8),
    "hooked": (lambda: Net(Hooked(), _flat, 8), 216 * 8),
}  # fmt: skip


def _made(kind: Callable[[], Net]) -> Net:
    torch.manual_seed(3)
    return kind()


def _used(model: Net) -> tuple[int, int]:
    """Return how many weights the forward pass multiplies with and how many are zero, read off torch's functions."""
    seen: dict[int, Tensor] = {}

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            name, kwargs = getattr(func, "__name__", ""), kwargs or {}
            if name.startswith("conv") or name == "linear":
                found = [args[1]]
            elif name in ("lstm", "gru", "rnn_tanh"):
                found = [value for value in args[-7] if value.dim() > 1]
            elif name == "multi_head_attention_forward":
                found = [args[5], args[11], *(value for key, value in kwargs.items() if key.endswith("proj_weight"))]
            else:
                found = []
            seen.update({value.data_ptr(): value.detach().clone() for value in found if isinstance(value, Tensor)})
            return func(*args, **kwargs)

    with torch.no_grad(), Spy():
        model.eval()(X[:2])
    return sum(v.numel() for v in seen.values()), sum(int((v == 0).sum()) for v in seen.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", (0.5, 0.99))
def test_as_many_weights_as_asked_are_zero_in_the_forward_pass(kind: str, share: float) -> None:
    model = _made(KINDS[kind])
    masks = Rule().masks(model, sparsity.magnitude(model), share, masks=sparsity.all_ones(model))
    sparsity.apply_(model, masks)
    total, zeros = _used(model)
    sized = size(model)
    assert sized.weights == sized.matrices == total and not any(m.excuse for m in sparsity_matrices(model))
    assert sized.weights - sized.nonzero_weights == zeros
    assert zeros >= math.floor(share * total) - 1
    assert bool(model(X).isfinite().all()), "rows without a weight are zero, not 0/0"


@pytest.mark.parametrize("kind", LEFT)
def test_what_cannot_be_pruned_is_named_and_counted(kind: str) -> None:
    build, left = LEFT[kind]
    model = _made(build)
    masks = sparsity.select(sparsity.magnitude(model), 0.5)
    assert not any("layer" in name for name in masks)
    sparsity.apply_(model, masks)
    counted = size(model)
    assert counted.matrices - counted.weights == left and len([m for m in sparsity_matrices(model) if m.excuse]) == 1
    assert counted.sparsity == pytest.approx(0.5, abs=0.01)
    assert counted.sparsity_matrices == pytest.approx(0.5 * counted.weights / counted.matrices, abs=0.01)


def test_a_weight_to_which_others_are_added_is_left_out_though_they_begin_with_zeros() -> None:
    found = {m.name: m.excuse for m in sparsity_matrices(_made(lambda: Net(Adapted(), _flat, 8)))}
    assert [name for name, excuse in found.items() if excuse is None] == ["stem.weight", "out.weight"]
    assert {"layer.weight", "layer.down", "layer.up"} < set(found)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantised_matrices_are_counted_and_cannot_be_saved(tmp_path) -> None:  # type: ignore[no-untyped-def]
    try:
        layer = torch.ao.nn.quantized.dynamic.Linear(216, 8)
    except (AttributeError, RuntimeError):
        pytest.skip("this torch has no quantised layers")
    model = nn.Sequential(nn.Linear(4, 216), layer)
    counted, left_out = size(model), {m.name: m.excuse for m in sparsity_matrices(model) if m.excuse is not None}
    assert (counted.weights, counted.matrices, left_out) == (864, 864 + 216 * 8, {"1.weight": "quantised"})
    with pytest.raises(UserError, match="before you quantise it"):
        save_tensors(tmp_path / "net.safetensors", nn.Sequential(layer).state_dict())


def test_vectors_tables_of_normalisation_and_gains_are_no_matrices() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.LayerNorm((4, 4, 4)), nn.PReLU(4))
    model.scale = nn.Parameter(torch.ones(4, 1, 1))
    assert size(model).matrices == 72


SPECS: dict[str, PruningSpec] = {
    **{name: PruningSpec(score=name) for name in SCORES},
    "by layer": PruningSpec(scope="layer"),
    "erk": PruningSpec(scope="erk"),
    "gradual": PruningSpec(method="gradual"),
    **{name: PruningSpec(method=name) for name in ("bernoulli", "proximal", "iterative", "dns", "movement", "hydra")},
    "set": PruningSpec(method="set", every=2),
    "rigl": PruningSpec(method="rigl", every=2),
}


@pytest.mark.parametrize("kind", ("weight_norm", "spectral_norm", "pruned by torch", "lstm", "attention", "transposed"))
@pytest.mark.parametrize("way", SPECS)
def test_every_pruner_prunes_every_kind_or_refuses(way: str, kind: str) -> None:
    model = _made(KINDS[kind])
    pruner = build_pruner(SPECS[way], 0.7)
    if way == "wanda" and kind in ("lstm", "attention", "transposed"):
        with pytest.raises(UserError, match="does not expose"):
            fit(model, IMAGES, Y, Recipe(epochs=4, batch_size=4), pruner=pruner, masks=sparsity.all_ones(model))
        return
    found = fit(model, IMAGES, Y, Recipe(epochs=4, batch_size=4), pruner=pruner, masks=sparsity.all_ones(model))
    total, zeros = _used(model)
    assert total == size(model).weights
    assert zeros >= round(sparsity.sparsity_of(found.masks) * total)
    if way not in ("bernoulli",):
        assert sparsity.sparsity_of(found.masks) == pytest.approx(0.7, abs=0.01)
    assert bool(predict(model, IMAGES).isfinite().all())


@pytest.mark.parametrize("kind", ("weight_norm", "old weight_norm", "weight_norm of a linear layer along inputs"))
def test_rows_that_died_come_back_under_weight_norm(kind: str) -> None:
    model = _made(KINDS[kind])
    masks = sparsity.all_ones(model)
    (name,) = [n for n in masks if n.startswith("layer")]
    axis = 1 if "inputs" in kind else 0
    masks[name].movedim(axis, 0)[:2] = False
    fit(model, IMAGES, Y, Recipe(epochs=2, batch_size=4), masks=masks)
    (matrix,) = [m for m in sparsity_matrices(model) if m.name == name]
    assert not bool(matrix.value().movedim(axis, 0)[:2].any()) and bool(model(X).isfinite().all())
    fit(model, IMAGES, Y, Recipe(epochs=2, batch_size=4), masks=sparsity.all_ones(model))
    assert bool(matrix.value().movedim(axis, 0)[:2].any()), "their gain learns again"


def test_spectral_norm_of_nothing_is_refused() -> None:
    model = _made(KINDS["spectral_norm"])
    masks = sparsity.all_ones(model)
    name = next(n for n in masks if n.startswith("layer"))
    with pytest.raises(UserError, match="set a floor"):
        sparsity.apply_(model, {name: torch.zeros_like(masks[name])})


@pytest.mark.parametrize("kind", ("weight_norm", "spectral_norm", "pruned by torch", "lstm", "attention"))
def test_masks_and_weights_survive_a_file(kind: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = _made(KINDS[kind])
    masks = sparsity.select(sparsity.magnitude(model), 0.9)
    sparsity.apply_(model, masks)
    save_tensors(tmp_path / "net.safetensors", model.state_dict() | {f"mask/{n}": m for n, m in masks.items()})
    tensors = load_tensors(tmp_path / "net.safetensors")
    other = KINDS[kind]()
    load_weights_(other, {n: v for n, v in tensors.items() if not n.startswith("mask/")})
    loaded = {n.removeprefix("mask/"): v for n, v in tensors.items() if n.startswith("mask/")}
    assert loaded.keys() == masks.keys()
    assert _used(other) == _used(model)
    torch.testing.assert_close(other.eval()(X), model.eval()(X))


def test_two_of_four_leaves_layers_without_whole_groups_dense() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.Flatten(),
        nn.Linear(16, 4),
    )  # fmt: skip
    with pytest.warns(sparsity.LeftDenseWarning, match=r"'0.weight' \(3 inputs\), '2.weight' \(1 inputs\)"):
        masks = sparsity.select(sparsity.magnitude(model), 0.5, structure=sparsity.NM(2, 4))
    assert bool(masks["0.weight"].all() and masks["2.weight"].all())
    for name in ("4.weight", "6.weight"):
        groups = masks[name].movedim(1, -1).unflatten(-1, (-1, 4))
        assert bool((groups.sum(-1) == 2).all())
    with pytest.raises(UserError, match="set it to 0"), pytest.warns(sparsity.LeftDenseWarning):
        sparsity.select(sparsity.magnitude(model), {"0.weight": 0.5}, structure=sparsity.NM(2, 4))
    rule = Rule(structure=sparsity.NM(2, 4))
    with pytest.warns(sparsity.LeftDenseWarning):
        assert list(rule.open(sparsity.all_ones(model))) == ["4.weight", "6.weight"]
    with pytest.raises(UserError, match="which no layer has"):
        sparsity.select(sparsity.magnitude(model[:2]), 0.5, structure=sparsity.NM(2, 4))
    with pytest.raises(UserError, match="rows are inputs"), pytest.warns(sparsity.LeftDenseWarning):
        transposed = _made(KINDS["transposed"])
        rule.masks(transposed, sparsity.magnitude(transposed), 0.5, masks=sparsity.all_ones(transposed))


def test_counts_are_of_what_a_network_holds() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    nn.utils.parametrizations.weight_norm(model[1])
    left = counts(model)
    assert (left.weights, left.biases, left.matrices, left.left_out) == (2048 + 320, 42, 2048 + 320, {})
    with torch.no_grad():
        model.get_parameter("3.weight").zero_()
    assert counts(model).weight_sparsity == pytest.approx(320 / 2368)
    attention = counts(nn.MultiheadAttention(16, 2))
    assert attention.matrices == 4 * 256 and attention.matrix_sparsity == 0
