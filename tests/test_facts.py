"""Every part that can be named has its facts, and the facts are true of it."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import pytest
import torch
from torch import Tensor, nn

from sparring import attacks, bounds, data, facts, graph, models, sparsity
from sparring.errors import Unsupported, UserError
from sparring.sparsity import PruningSpec, build_pruner
from sparring.units import parse_norm

README = (Path(__file__).parents[1] / "README.md").read_text()
TABLES: dict[str, tuple[Mapping[str, object], Mapping[str, Any]]] = {
    "attacks": (attacks.ATTACKS, facts.ATTACKS),
    "bounds": (bounds.BOUNDS, facts.BOUNDS),
    "lipschitz": (bounds.LIPSCHITZ, facts.LIPSCHITZ),
    "models": (models.MODELS, facts.MODELS),
}
# What is known of these stands in their own docstrings and signatures.
DESCRIBED: dict[str, Mapping[str, object]] = {
    "activations": sparsity.ACTIVATIONS,
    "data": data.DATASETS,
    "models": models.MODELS,
    "operations": {kind.__name__: kind for kind in get_args(graph.Op)},
    "pruners": sparsity.METHODS,
    "scores": sparsity.SCORES,
    "structures": sparsity.STRUCTURES,
}


@pytest.mark.parametrize("part", TABLES)
def test_every_part_has_its_facts(part: str) -> None:
    functions, known = TABLES[part]
    assert functions.keys() == known.keys()
    assert part == "models" or len({one.title for one in known.values()} - {""}) == len(known)


@pytest.mark.parametrize("part", DESCRIBED)
def test_every_part_says_in_one_line_what_it_is(part: str) -> None:
    for name, one in DESCRIBED[part].items():
        first = (inspect.getdoc(one) or "").split("\n")[0]
        assert first.endswith(".") and not first.startswith(f"{type(one).__name__}("), name


def test_facts_and_the_report_that_reads_them_do_without_torch() -> None:
    code = "import sys, sparring.facts, sparring.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", facts.ATTACKS)
def test_an_attack_is_for_the_norms_and_the_budgets_that_its_facts_name(name: str) -> None:
    known, attack = facts.ATTACKS[name], attacks.ATTACKS[name]
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    x = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    y, options = net(x).argmax(1), inspect.signature(attack).parameters
    few = {option: 1 for option in ("steps", "queries", "searches") if option in options}
    quick = partial(cast(Callable[..., Tensor], attack), **few)
    called = partial(quick, net, x, y, generator=torch.Generator().manual_seed(0))
    for norm in ("linf", "l2", "l1", "l0"):
        for eps in (0.01, None):
            needs_eps = known.kind == "budget" and eps is None
            refused = [UserError] if needs_eps else [Unsupported] if norm not in known.norms else []
            if refused:
                with pytest.raises(refused[0]):
                    called(norm=parse_norm(norm), eps=eps)
            elif name not in ("fast", "standard", "swift"):  # which are made of the others
                assert called(norm=parse_norm(norm), eps=eps).shape == x.shape


def test_facts_are_found_however_an_attack_is_configured() -> None:
    for name, attack in attacks.ATTACKS.items():
        found, known = attacks.facts_of(partial(attack)), facts.ATTACKS[name]
        assert (found.kind, found.norms, found.single_step) == (known.kind, known.norms, known.single_step)

    def fgsm(model, x, y, *, norm, eps=None, targets=None, generator=None):  # type: ignore[no-untyped-def]
        return x

    def smallest(model, x, y, *, norm, targets=None, generator=None):  # type: ignore[no-untyped-def]
        return x

    assert attacks.facts_of(fgsm) == facts.OWN_ATTACK, "a user's, of whatever name"
    assert attacks.facts_of(cast(Any, smallest)).kind == "minimum-norm"


def test_a_longer_search_is_not_weaker_and_kinds_of_question_do_not_mix() -> None:
    weaker = {(a, b) for a in facts.ATTACKS for b in facts.ATTACKS if facts.ATTACKS[a].is_weaker(facts.ATTACKS[b])}
    assert {("fgsm", "pgd"), ("square", "fast"), ("fast", "standard"), ("deepfool", "nearest")} <= weaker
    assert not {("pgd", "fgsm"), ("deepfool", "pgd"), ("pgd", "nearest"), ("cw", "nearest")} & weaker


@pytest.mark.parametrize("method", sparsity.METHODS)
def test_methods_take_a_sparsity_a_layer_where_their_signatures_say_so(method: str) -> None:
    spec = PruningSpec(method=method, layers={"1.weight": 0.5})
    if method in ("one-shot", "gradual", "bernoulli", "proximal"):
        build_pruner(spec, None)
    else:
        with pytest.raises(UserError, match="one sparsity for the network"):
            build_pruner(spec, None)


def test_the_table_of_attacks_in_the_readme_is_that_of_the_facts() -> None:
    rows = re.findall(r"^\| (.+?) \| `([a-z-]+)` \| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", README, flags=re.MULTILINE)
    assert {name: (title, kind, knowledge, norms, source) for title, name, kind, knowledge, norms, source in rows} == {
        name: (one.title, one.kind, one.knowledge, ", ".join(one.norms), one.source)
        for name, one in facts.ATTACKS.items()
    }
