"""Networks that people have go through attack and packed export, and the artefact answers as they do."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparring import attacks, deploy
from sparring.outputs import logits_of
from sparring.sparsity import apply_, magnitude, select
from sparring.threat import LINF, Threat

from .architectures import ARCHITECTURES, FIRST_ROUND

SHAPE = (3, 32, 32)


def drawn(name: str, sparsity: float = 0.0) -> tuple[nn.Module, Tensor]:
    """Return a network in eval mode, whose batch normalisation has the moments of the images beside it."""
    torch.manual_seed(0)
    model, x = (
        ARCHITECTURES[name](SHAPE, 10).train(),
        torch.rand(12, *SHAPE) ** (0.2 * torch.arange(1, 13))[:, None, None, None],
    )
    apply_(model, select(magnitude(model), sparsity, scope="layer"))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model(x)
        return model.eval(), x


def test_the_first_round_is_of_eight() -> None:
    assert len(ARCHITECTURES) == 21
    assert len(set(FIRST_ROUND) & set(ARCHITECTURES)) == 8


def test_the_table_of_the_docs_has_them_all() -> None:
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    block = page.split("<!-- matrix: written by benchmarks/models.py -->")[1].split("<!-- end of matrix -->")[0]
    assert re.findall(r"^\| (\w+) \| \d", block, re.M) == list(ARCHITECTURES)


@pytest.mark.parametrize("name", FIRST_ROUND)
def test_an_attack_goes_through(name: str) -> None:
    model, x = drawn(name)
    before = x.clone()
    with torch.no_grad():
        y = logits_of(model(x)).argmax(1)
    for attack, threat in (("fgsm", Threat(LINF, 0.1)), ("pgd", Threat(LINF, 0.1))):
        result = attacks.run(model, x[:4], y[:4], attacks.ATTACKS[attack], threat)
        with torch.no_grad():
            fooled = logits_of(model(result.x_adv)).argmax(1) != y[:4]
        assert torch.equal(result.success, fooled)
        assert bool(result.success.any()) or attack == "fgsm"
        assert "partial-gradients" not in {flag.name for flag in result.flags}
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", FIRST_ROUND)
def test_a_packed_network_gives_the_logits_of_the_sparse_one(name: str, tmp_path: Path) -> None:
    model, x = drawn(name, 0.8)
    packed = deploy.load(deploy.export(model, tmp_path / "net.sparring", shape=SHAPE))
    with torch.no_grad():
        single = logits_of(model(x))
        exact = logits_of(copy.deepcopy(model).double()(x.double()))
    largest = float(exact.abs().max())
    assert float(exact.std(0).mean()) > 1e-4 * largest  # images differ, so that agreement means something
    allowed = max(5e-6 * largest, 2 * float((single - exact).abs().max()))
    assert float((packed(x) - exact).abs().max()) <= allowed
