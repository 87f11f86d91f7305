"""Selection is exact under ties, for every structure and scope, and never brings a weight back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparring.errors import UserError
from sparring.sparsity import (
    NM,
    Blocks,
    Channels,
    CollapsedLayerWarning,
    Inputs,
    Scores,
    Structure,
    Unstructured,
    erdos_renyi_kernel,
    select,
    sparsity_of,
)

SIZES = st.integers(1, 3)


@st.composite
def tied_scores(draw: st.DrawFn) -> Scores:
    """Scores of up to three layers, of few distinct values; all structures below divide their shapes."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    levels = draw(st.integers(1, 40))
    scores = {}
    for i in range(draw(SIZES)):
        shape = (2 * draw(SIZES), 4 * draw(SIZES), *([3, 3] if draw(st.booleans()) else []))
        scores[f"{i}.weight"] = torch.randint(0, levels, shape, generator=generator) / levels
    return scores


sparsities = st.floats(0, 0.95)
structures = st.sampled_from([Unstructured(), Blocks(2, 1), Blocks(1, 2), Inputs(4), Channels()])
pytestmark = pytest.mark.filterwarnings("ignore::sparring.sparsity.CollapsedLayerWarning")


@settings(max_examples=100, deadline=None)
@given(tied_scores(), sparsities, structures)
def test_global_sparsity_is_exact_to_one_unit(scores: Scores, sparsity: float, structure: Structure) -> None:
    masks = select(scores, sparsity, structure=structure)
    total = sum(s.numel() for s in scores.values())
    unit = max(structure.sizes(scores).values())
    assert abs(sparsity_of(masks) * total - sparsity * total) <= unit / 2 + 1e-6 + 0.5
    assert {n: m.shape for n, m in masks.items()} == {n: s.shape for n, s in scores.items()}


@settings(max_examples=60, deadline=None)
@given(tied_scores(), sparsities, structures, st.sampled_from(["layer", "erk"]))
def test_layer_sparsity_is_exact_in_every_layer(
    scores: Scores, sparsity: float, structure: Structure, scope: str
) -> None:
    masks = select(scores, sparsity, structure=structure, scope=scope)
    wanted = erdos_renyi_kernel(scores, sparsity) if scope == "erk" else dict.fromkeys(scores, sparsity)
    for name, unit in structure.sizes(scores).items():
        assert isinstance(unit, int)
        removed = int((~masks[name]).sum())
        assert removed % unit == 0
        assert removed == unit * round(wanted[name] * scores[name].numel() / unit)


@settings(max_examples=60, deadline=None)
@given(tied_scores(), sparsities, sparsities, structures)
def test_masks_never_grow_within(scores: Scores, a: float, b: float, structure: Structure) -> None:
    first = select(scores, min(a, b), structure=structure)
    second = select({n: s.flip(0) for n, s in scores.items()}, max(a, b), structure=structure, within=first)
    assert all(bool((second[n] <= first[n]).all()) for n in scores)


@settings(max_examples=60, deadline=None)
@given(tied_scores(), sparsities)
def test_no_kept_score_is_below_a_removed_one(scores: Scores, sparsity: float) -> None:
    masks = select(scores, sparsity)
    kept = [float(s[masks[n]].min()) for n, s in scores.items() if masks[n].any()]
    gone = [float(s[~masks[n]].max()) for n, s in scores.items() if not masks[n].all()]
    assert not kept or not gone or min(kept) >= max(gone)


@settings(max_examples=60, deadline=None)
@given(tied_scores(), st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4)]), st.floats(0, 1))
def test_n_of_m_in_every_group_at_every_step(scores: Scores, nm: tuple[int, int], share: float) -> None:
    structure, full = NM(*nm), 1 - nm[0] / nm[1]
    partial = select(scores, share * full, structure=structure)
    total = sum(s.numel() for s in scores.values())
    assert round(sparsity_of(partial) * total) == round(share * full * total)
    masks = select({n: -s for n, s in scores.items()}, full, structure=structure, within=partial)
    for name, mask in masks.items():
        groups = mask.movedim(1, -1).unflatten(-1, (-1, nm[1]))
        assert bool((groups.sum(-1) == nm[0]).all())
        assert bool((mask <= partial[name]).all())


def test_ties_keep_the_first_in_order() -> None:
    masks = select({"a": torch.ones(2, 2), "b": torch.ones(1, 4)}, 0.75)
    assert masks["a"].tolist() == [[True, True], [False, False]]
    assert not masks["b"].any()


def test_floor_keeps_the_best_of_a_layer_that_would_collapse() -> None:
    scores = {"small": torch.arange(8.0).view(2, 4), "large": torch.arange(100.0, 192.0).view(4, 23)}
    with pytest.warns(CollapsedLayerWarning, match="'small'"):
        select(scores, 0.5)
    masks = select(scores, 0.5, floor=0.25)
    assert sparsity_of(masks) == 0.5
    assert masks["small"].flatten().tolist() == [False] * 6 + [True] * 2
    with pytest.raises(UserError, match="protect"):
        select(scores, 0.9, floor=0.25)


def test_by_hand_leaves_unnamed_layers_alone() -> None:
    scores = {"a": torch.arange(8.0).view(2, 4), "b": torch.arange(8.0).view(2, 4)}
    masks = select(scores, {"b": 0.5})
    assert masks["a"].all()
    assert masks["b"].sum() == 4
    with pytest.raises(UserError, match="unknown layer 'c'"):
        select(scores, {"c": 0.5})


def test_tied_channels_go_together() -> None:
    scores = {"a": torch.rand(4, 3), "b": torch.rand(4, 5), "c": torch.rand(6, 4)}
    masks = select(scores, 0.5, structure=Channels({"a": torch.arange(1, 5), "b": torch.arange(1, 5)}))
    assert torch.equal(masks["a"].all(1), masks["b"].all(1))
    assert torch.equal(masks["a"].any(1), masks["a"].all(1))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(UserError, match="not finite"):
        select({"a": torch.tensor([[1.0, value]])}, 0.5)


def test_blocks_of_inputs_are_channels_at_one_position_and_other_layers_lose_single_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {"conv": torch.rand(6, 8, 3, 3, generator=generator), "first": torch.rand(6, 1, 5, 5, generator=generator)}
    masks = select(scores, 0.7, structure=Inputs(4), scope="layer")
    fours = masks["conv"].view(6, 2, 4, 3, 3)
    assert (fours == fours[:, :, :1]).all()
    means = scores["conv"].view(6, 2, 4, 3, 3).mean(2)
    assert means[fours[:, :, 0]].min() > means[~fours[:, :, 0]].max()
    assert int((~masks["first"]).sum()) == round(0.7 * 150)


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, math.nan])
def test_sparsity_out_of_range_is_refused(sparsity: float) -> None:
    with pytest.raises(UserError, match="fraction removed"):
        select({"a": torch.rand(2, 2)}, sparsity)


def test_what_cannot_be_had_is_refused_with_the_reason() -> None:
    scores = {"a": torch.rand(4, 6)}
    with pytest.raises(UserError, match="is already pruned"):
        select(scores, 0.1, within=select(scores, 0.5))
    with pytest.raises(UserError, match="groups of 4"):
        select(scores, 0.5, structure=NM(2, 4))
    with pytest.raises(UserError, match="blocks of 3"):
        select(scores, 0.5, structure=Blocks(3, 1))
    with pytest.raises(UserError, match="protect"):
        select(scores, 0.75, structure=NM(1, 2))
    with pytest.raises(UserError, match="Did you mean 'global'"):
        select(scores, 0.5, scope="globl")


def test_half_precision_and_odd_memory_layouts() -> None:
    score = torch.randn(4, 8, 3, 3).to(memory_format=torch.channels_last)
    assert sparsity_of(select({"a": score.bfloat16()}, 0.5)) == 0.5
    plain, strided = select({"a": score.contiguous()}, 0.5), select({"a": score}, 0.5)
    assert torch.equal(plain["a"], strided["a"])


@settings(max_examples=25, deadline=None)
@given(
    st.integers(5_000, 40_000),
    st.sampled_from([0.0, 0.3, 0.5, 0.97]),
    st.sampled_from([-1.0, 0.0, 9.0]),
    st.floats(0, 0.999),
    st.integers(0, 99),
)
def test_many_scores_of_which_one_value_prevails(
    count: int, share: float, value: float, sparsity: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(count, 1, generator=generator)
    score[torch.rand(count, 1, generator=generator) < share] = value
    mask = select({"a": score}, sparsity)["a"]
    keep = count - round(sparsity * count)
    assert int(mask.sum()) == keep
    assert torch.equal(score[mask].sort().values, score.flatten().sort().values[count - keep :])


def test_sorted_and_periodic_scores() -> None:
    for score in (torch.arange(20_000.0), torch.arange(20_000.0).remainder(10), -torch.arange(20_000.0)):
        for sparsity in (0.001, 0.5, 0.999):
            mask = select({"a": score.view(-1, 1)}, sparsity)["a"].flatten()
            assert float(score[mask].min()) == float(score.sort().values[round(sparsity * 20_000)])
