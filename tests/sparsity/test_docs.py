"""The examples of docs/pruners.md run as they stand, and its tables name what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from sparring.sparsity import ACTIVATIONS, METHODS, STRUCTURES, PruningSpec, Step, all_ones, build_pruner, sparsity_of

PAGE = (Path(__file__).parents[2] / "docs" / "pruners.md").read_text()


@pytest.mark.parametrize("spec", [PruningSpec(score="my_pruning:sensitivity"), PruningSpec(method="my_pruning:early")])
def test_examples_prune(spec: PruningSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_pruning.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)))
    monkeypatch.syspath_prepend(tmp_path)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 10))
    pruner, masks = build_pruner(spec, 0.75), all_ones(model)
    batch = torch.rand(4, 1, 4, 4), torch.randint(10, (4,))
    for step in range(20):
        loss = lambda m, x, y, g: nn.functional.cross_entropy(m(x), y)  # noqa: E731
        masks = pruner(Step(model, masks, step, 20, batch, loss, torch.Generator()))
    assert sparsity_of(masks) == 0.75


@pytest.mark.parametrize("name", [*METHODS, *ACTIVATIONS, *STRUCTURES])
def test_everything_is_named(name: str) -> None:
    assert f"`{name}`" in PAGE or f'"{name}"' in PAGE
