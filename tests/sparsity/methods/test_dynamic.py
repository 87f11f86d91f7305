"""Methods that regrow: counts stay exact, splices happen, frozen stays frozen, state survives a resume."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparring.errors import UserError
from sparring.metrics import size
from sparring.sparsity import (
    NM,
    CollapsedLayerWarning,
    Masks,
    Pruner,
    Rule,
    Step,
    all_ones,
    apply_,
    bernoulli,
    dynamic_network_surgery,
    hydra,
    iterative,
    magnitude,
    movement,
    proximal,
    prunable,
    rigged_lottery,
    sparse_evolution,
    sparsity_of,
)

STEPS = 40


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None) -> Tensor:
    return F.cross_entropy(model(x), y)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


class Trainer:
    """The least training loop that honours the contract, dense weights included."""

    def __init__(self, pruner: Pruner, model: nn.Module | None = None) -> None:
        self.pruner, self.model = pruner, model or network()
        self.masks: Masks = all_ones(self.model)
        self.history: list[Masks] = []
        self.gradients: dict[str, Tensor] = {}

    def run(self, start: int = 0, stop: int = STEPS) -> Trainer:
        for step in range(start, stop):
            generator = torch.Generator().manual_seed(step)
            x, y = torch.rand(20, 1, 4, 4, generator=generator), torch.randint(3, (20,), generator=generator)
            forward = {n: (self.model.get_parameter(n) * m).detach().requires_grad_() for n, m in self.masks.items()}
            value = F.cross_entropy(torch.func.functional_call(self.model, forward, (x,)), y)
            slopes = torch.autograd.grad(value, list(forward.values()))
            with torch.no_grad():
                for (name, _), slope in zip(forward.items(), slopes, strict=True):
                    self.model.get_parameter(name).grad = slope
                    self.model.get_parameter(name).sub_(slope, alpha=0.5)
            if not self.pruner.dense_weights:
                apply_(self.model, self.masks)
            self.masks = self.pruner(Step(self.model, self.masks, step, STEPS, (x, y), cross_entropy, generator))
            self.history.append(self.masks)
        return self


def weight_sparsities(history: list[Masks]) -> list[float]:
    return [sparsity_of(masks) for masks in history]


def test_surgery_follows_the_papers_rule() -> None:
    model = network()
    sizes = {n: p.detach().clone() for n, p in model.named_parameters()}
    pruner = dynamic_network_surgery(c_rate=0.5, gamma=0.0)
    run = Trainer(pruner, model).run(0, 1)
    for prefix in ("1.", "3."):
        # The thresholds are those of the weights at the first call, that is, after one step.
        values = torch.cat([model.get_parameter(prefix + part).detach().abs().flatten() for part in ("weight", "bias")])
        threshold = values.mean() + 0.5 * values.std(correction=0)
        for part in ("weight", "bias"):
            kept = model.get_parameter(prefix + part).detach().abs() > 0.9 * threshold
            assert torch.equal(run.masks[prefix + part], kept)
    assert not torch.equal(sizes["1.weight"], model.get_parameter("1.weight"))


def test_surgery_splices_and_counts_it() -> None:
    pruner = dynamic_network_surgery(c_rate=0.3, gamma=0.0, stop=1.0)
    run = Trainer(pruner).run()
    series = pruner.series()
    for step, pruned, spliced in zip(*series.values(), strict=True):
        before = run.history[step - 1] if step else {n: torch.ones_like(m) for n, m in run.history[0].items()}
        after = run.history[step]
        assert pruned == sum(int((before[n] & ~after[n]).sum()) for n in after)
        assert spliced == sum(int((after[n] & ~before[n]).sum()) for n in after)
    assert sum(series["spliced"]) > 0
    assert all(bool((run.model.get_parameter(n) != 0).all()) for n in prunable(run.model)), "weights stay dense"


def test_surgery_reaches_a_target_exactly() -> None:
    run = Trainer(dynamic_network_surgery(0.8, stop=0.5, rule=Rule(floor=0.1))).run()
    assert round(sparsity_of(run.masks) * 228) == round(0.8 * 228)
    assert run.history[-1] is run.history[STEPS // 2]


def test_surgery_gets_rarer() -> None:
    pruner = dynamic_network_surgery(c_rate=0.0, gamma=10.0, power=2.0, stop=1.0)
    Trainer(pruner).run()
    assert len(pruner.series()["step"]) < 5


@pytest.mark.parametrize("factory", [sparse_evolution, rigged_lottery])
def test_regrowth_moves_weights_and_keeps_their_number(factory: type) -> None:
    run = Trainer(factory(0.7, every=3)).run()
    per_layer = [{name: int(mask.sum()) for name, mask in masks.items()} for masks in run.history]
    assert all(count == per_layer[0] for count in per_layer)
    assert sparsity_of(run.masks) == pytest.approx(0.7, abs=1 / 228)
    assert any(not torch.equal(a["1.weight"], b["1.weight"]) for a, b in itertools.pairwise(run.history))
    assert size(run.model).nonzero_weights <= sum(int(m.sum()) for m in run.masks.values())


def test_rigl_grows_where_the_gradient_is_largest() -> None:
    run = Trainer(rigged_lottery(0.7, every=1, fraction=0.2)).run(0, 2)
    before, after = run.history
    for name in before:
        grown = after[name] & ~before[name]
        slope = run.model.get_parameter(name).grad
        assert slope is not None
        others = ~after[name] & ~before[name]
        if bool(grown.any()) and bool(others.any()):
            assert slope.abs()[grown].min() >= slope.abs()[others].max()
        assert bool((run.model.get_parameter(name)[grown] == 0).all())


def test_movement_scores_and_sparsity() -> None:
    run = Trainer(movement(0.6, stop=0.5, every=4, rule=Rule(floor=0.1))).run()
    assert round(sparsity_of(run.masks) * 228) == round(0.6 * 228)


def test_hydra_leaves_weights_alone_while_it_learns_masks() -> None:
    run = Trainer(hydra(0.6, stop=0.5))
    run.run(0, 1)
    frozen = {name: value.detach().clone() for name, value in run.model.named_parameters()}
    run.run(1, STEPS // 2)
    assert all(torch.equal(value, frozen[name]) for name, value in run.model.named_parameters())
    assert any(not torch.equal(a["1.weight"], b["1.weight"]) for a, b in itertools.pairwise(run.history))
    assert set(map(round, [s * 228 for s in weight_sparsities(run.history)])) == {round(0.6 * 192) + round(0.6 * 36)}
    chosen = run.masks
    run.run(STEPS // 2)
    assert run.masks is chosen
    assert any(not torch.equal(value, frozen[name]) for name, value in run.model.named_parameters())


def test_hydra_with_its_own_loss_equals_the_training_loss_where_they_agree() -> None:
    own = Trainer(hydra(0.6, stop=0.5, loss=cross_entropy)).run()
    given = Trainer(hydra(0.6, stop=0.5)).run()
    # Biases move in neither, so that the two gradients are of the same function.
    assert all(torch.equal(own.masks[name], given.masks[name]) for name in own.masks)


def test_bernoulli_has_the_right_mean_and_is_not_exact() -> None:
    model = nn.Linear(200, 300)
    batch, generator = (torch.rand(1, 200), torch.zeros(1, dtype=torch.int64)), torch.Generator().manual_seed(0)
    masks = bernoulli(0.4)(Step(model, all_ones(model), 0, 10, batch, cross_entropy, generator))
    assert abs(sparsity_of(masks) - 0.4) < 4 * (0.24 / 60_000) ** 0.5
    assert sparsity_of(masks) != 0.4


def test_proximal_steps_shrink_and_then_prune() -> None:
    run = Trainer(proximal(0.5, strength=0.005, stop=0.5, rule=Rule(floor=0.1)))
    run.run(0, STEPS // 2 - 1)
    assert size(run.model).sparsity > 0.05
    run.run(STEPS // 2 - 1)
    assert sparsity_of(run.masks) == 0.5


def test_iterative_rewinds_and_prunes_geometrically() -> None:
    pruner = iterative(magnitude, 0.75, rounds=2, rewind_at=0.0)
    run = Trainer(pruner).run(0, 1)
    early = {name: value.detach().clone() for name, value in run.model.state_dict().items()}
    first = -(-STEPS // 3)
    run.run(1, first)
    assert sparsity_of(run.masks) == pytest.approx(0.5, abs=1 / 228)
    for name, value in run.model.state_dict().items():
        mask = run.masks.get(name, torch.ones_like(value, dtype=torch.bool))
        assert torch.equal(value, early[name] * mask)
    run.run(first)
    assert sparsity_of(run.masks) == 0.75
    kept = Trainer(iterative(magnitude, 0.75, rounds=2, rewind="learning-rate")).run(0, first)
    assert not torch.equal(kept.model.get_parameter("1.weight"), early["1.weight"] * kept.masks["1.weight"])


@pytest.mark.parametrize(
    "make",
    [
        lambda: dynamic_network_surgery(c_rate=0.2, stop=1.0),
        lambda: movement(0.5, every=3),
        lambda: hydra(0.5),
        lambda: iterative(magnitude, 0.5, rounds=2),
    ],
    ids=["dns", "movement", "hydra", "iterative"],
)
def test_state_survives_a_resume(make: type) -> None:
    whole = Trainer(make()).run()
    half = Trainer(make()).run(0, STEPS // 2)
    resumed = Trainer(make(), half.model)
    resumed.masks = half.masks
    resumed.pruner.load_state_({name: value.clone() for name, value in half.pruner.state().items()})
    resumed.run(STEPS // 2)
    assert all(torch.equal(whole.masks[name], resumed.masks[name]) for name in whole.masks)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


def test_a_collapsed_layer_is_never_silent() -> None:
    with pytest.warns(CollapsedLayerWarning):
        Trainer(dynamic_network_surgery(c_rate=50.0)).run(0, 1)


@pytest.mark.parametrize("factory", [dynamic_network_surgery, sparse_evolution, rigged_lottery, bernoulli])
def test_methods_of_single_weights_refuse_structures(factory: type) -> None:
    with pytest.raises(UserError, match="cannot keep the structure NM"):
        factory(0.5, rule=Rule(structure=NM(2, 4)))
