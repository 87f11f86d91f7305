"""Words of a plan become pruners, or a refusal that says why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparring import sparsity
from sparring.errors import UserError
from sparring.sparsity import (
    METHODS,
    SCORES,
    STRUCTURES,
    Masks,
    Pruner,
    PruningSpec,
    Step,
    all_ones,
    apply_,
    build_pruner,
    sparsity_of,
)


def prune(pruner: Pruner, steps: int = 12) -> float:
    return sparsity_of(masks_of(pruner, steps))


def masks_of(pruner: Pruner, steps: int = 12) -> Masks:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    masks, generator = all_ones(model), torch.Generator().manual_seed(0)
    for step in range(steps):
        batch = torch.rand(8, 1, 4, 4, generator=generator), torch.randint(8, (8,), generator=generator)
        model.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        loss = lambda m, x, y, g: F.cross_entropy(m(x), y)  # noqa: E731
        masks = pruner(Step(model, masks, step, steps, batch, loss, generator))
        if not pruner.dense_weights:
            apply_(model, masks)
    return masks


@pytest.mark.parametrize("method", METHODS)
def test_every_method_reaches_its_sparsity(method: str) -> None:
    tolerance = 0.2 if method == "bernoulli" else 0.005
    assert prune(build_pruner(PruningSpec(method=method), 0.5)) == pytest.approx(0.5, abs=tolerance)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("method", ["one-shot", "gradual", "iterative"])
@pytest.mark.parametrize("structure", sorted(set(STRUCTURES) - {"channels"}))
def test_scores_structures_and_schedules_are_orthogonal(score: str, method: str, structure: str) -> None:
    spec = PruningSpec(method=method, score=score, structure=structure, floor=0.01)
    assert prune(build_pruner(spec, 0.5), steps=6) == pytest.approx(0.5, abs=0.021)


@pytest.mark.parametrize("method", ["movement", "hydra", "proximal"])
@pytest.mark.parametrize("structure", ["2:4", "blocks-4x4"])
def test_learned_masks_keep_structures(method: str, structure: str) -> None:
    spec = PruningSpec(method=method, structure=structure, floor=0.01)
    assert prune(build_pruner(spec, 0.5)) == pytest.approx(0.5, abs=0.021)


@pytest.mark.parametrize("method", ["one-shot", "gradual", "iterative", "movement", "hydra"])
def test_channels_go_with_their_biases_and_classes_stay(method: str) -> None:
    masks = masks_of(build_pruner(PruningSpec(method=method, structure="channels"), 0.5))
    gone = ~masks["1.weight"].any(1)
    assert int(gone.sum()) == 8
    assert torch.equal(masks["1.bias"], ~gone)
    assert torch.equal(masks["1.weight"].all(1), ~gone)
    assert masks["3.weight"].all()


def test_a_users_own_score_and_pruner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_pruning.py").write_text(
        "from sparring.sparsity import gradual, prunable\n"
        "def small_ones(model, batch=None, *, loss=None, generator=None):\n"
        "    return {name: -w.detach().abs() for name, w in prunable(model).items()}\n"
        "def backwards(sparsity):\n"
        "    return gradual(small_ones, sparsity)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert prune(build_pruner(PruningSpec(score="own_pruning:small_ones"), 0.5)) == 0.5
    assert prune(build_pruner(PruningSpec(method="own_pruning:backwards"), 0.25)) == 0.25


@pytest.mark.parametrize(
    ("spec", "sparsity", "reason"),
    [
        (PruningSpec(method="gradul"), 0.5, "Did you mean 'gradual'"),
        (PruningSpec(score="magnitud"), 0.5, "Did you mean 'magnitude'"),
        (PruningSpec(structure="2:5"), 0.5, "unknown structure"),
        (PruningSpec(scope="layers"), 0.5, "Did you mean 'layer'"),
        (PruningSpec(method="set", score="magnitude"), 0.5, "'set' has no option 'score'"),
        (PruningSpec(rounds=3), 0.5, "'gradual' has no option 'rounds'"),
        (PruningSpec(method="dns", structure="channels"), 0.5, "cannot keep the structure"),
        (PruningSpec(method="dns", c_rate=1.0), 0.5, "give one of them"),
        (PruningSpec(structure="2:4", scope="erk"), 0.5, "cannot be allocated by 'erk'"),
        (PruningSpec(layers={"a": 0.5}, scope="erk"), None, "has no effect"),
        (PruningSpec(layers={"a": 0.5}), 0.5, "a sparsity of the network has no effect"),
        (PruningSpec(method="set", layers={"a": 0.5}), None, "one sparsity for the network"),
        (PruningSpec(structure="2:4"), 0.8, "cannot reach 80.00%"),
        (PruningSpec(), None, "needs a sparsity"),
        (PruningSpec(), 1.5, "fraction removed"),
        (PruningSpec(method="os:getcwd"), 0.5, "must accept the keyword 'sparsity'"),
        (PruningSpec(score="nowhere:at_all"), 0.5, "cannot import 'nowhere'"),
    ],
)
def test_refusals_name_their_reason(spec: PruningSpec, sparsity: float | None, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        build_pruner(spec, sparsity)


@pytest.mark.parametrize("structure", ["2:4", "channels"])
def test_transposed_convolutions_are_spared_from_structures_of_rows(structure: str) -> None:
    body = (nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.ConvTranspose2d(8, 4, 1))
    model = nn.Sequential(*body, nn.Flatten(), nn.Linear(16, 4))
    spec = sparsity.PruningSpec(method="one-shot", structure=structure)
    with pytest.warns(sparsity.LeftDenseWarning, match=r"leaves '4.weight' dense"):
        given = sparsity.spared(spec, model)
    rule, ones, batch = sparsity.build_pruner(given, 0.5).rule, sparsity.all_ones(model), torch.rand(2, 4, 2, 2)
    masks = rule.masks(model, sparsity.magnitude(model), 0.5, masks=ones, batch=(batch, torch.zeros(2).long()))
    assert bool(masks["4.weight"].all()) and float(masks["0.weight"].double().mean()) == 0.5
    sparsity.apply_(model.eval(), masks)
    if structure == "channels":
        small = sparsity.remove_channels(model, masks, (4, 2, 2))
        assert torch.allclose(small(batch), model(batch), atol=1e-6) and small.state_dict()["0.weight"].shape[0] == 4
    assert sparsity.spared(sparsity.PruningSpec(method="one-shot"), model).spare is None
