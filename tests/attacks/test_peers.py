"""Side by side with other libraries, where they are installed: no larger norms, no fewer successes, same budget."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from sparring import models
from sparring.attacks import AttackResult, ddn, deepfool, nearest, pgd, run
from sparring.data import Dataset, as_float
from sparring.threat import L2, LINF, Threat, distance

# As many passes as a hundred steps of DDN.
EQUAL = partial(nearest, steps=93)
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs, not ours


@pytest.fixture(scope="module", params=["digits", "mnist-5k"])
def task(request: pytest.FixtureRequest, digits: Dataset) -> tuple[nn.Module, Tensor, Tensor]:
    """Return LeNet-300-100 trained on real images and a hundred of them that it classifies correctly."""
    if request.param == "mnist-5k":
        model, x, y = request.getfixturevalue("trained")
        return model.requires_grad_(False), x, y
    model = models.build("lenet-300-100", shape=(1, 8, 8), classes=10, mean=digits.mean, std=digits.std)
    optimiser = torch.optim.Adam(model.parameters(), 2e-3)
    x, y = as_float(digits.train.x), digits.train.y
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        for rows in torch.randperm(len(x), generator=generator).split(128):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimiser.step()
    x, y = as_float(digits.test.x), digits.test.y
    right = (model.eval()(x).argmax(1) == y).nonzero().squeeze(1)[:100]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model, x[right], y[right]


def ours(task: tuple[nn.Module, Tensor, Tensor], attack, threat: Threat) -> AttackResult:  # type: ignore[no-untyped-def]
    return run(*task, attack, threat, generator=torch.Generator().manual_seed(0))


def judged(task: tuple[nn.Module, Tensor, Tensor], x_adv: Tensor) -> tuple[float, float]:
    """Return a peer's success rate and the mean l_2 norm of its successes."""
    model, x, y = task
    with torch.no_grad():
        won = model(x_adv.clamp(0, 1)).argmax(1) != y
    return float(won.double().mean()), float(distance(x_adv - x, L2)[won].mean())


def holds(result: AttackResult, success: float, mean: float, slack: float = 1e-3) -> None:
    assert float(result.success.double().mean()) >= success
    assert float(result.distance[result.success].mean()) <= mean * (1 + slack)


def test_foolbox(task: tuple[nn.Module, Tensor, Tensor]) -> None:
    foolbox = pytest.importorskip("foolbox")
    model, x, y = task
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    theirs = foolbox.attacks.L2DeepFoolAttack(steps=50, candidates=10)(wrapped, x, y, epsilons=None)[1]
    holds(ours(task, deepfool, Threat(L2)), *judged(task, theirs))
    theirs = foolbox.attacks.DDNAttack(steps=100)(wrapped, x, y, epsilons=None)[1]
    holds(ours(task, ddn, Threat(L2)), *judged(task, theirs), slack=2e-3)
    holds(ours(task, EQUAL, Threat(L2)), *judged(task, theirs), slack=2e-3)
    torch.manual_seed(0)
    theirs = foolbox.attacks.LinfPGD(steps=40)(wrapped, x, y, epsilons=0.1)[1]
    assert float(ours(task, pgd, Threat(LINF, 0.1)).success.double().mean()) >= judged(task, theirs)[0] - 0.01


def test_adversarial_library(task: tuple[nn.Module, Tensor, Tensor]) -> None:
    adv_lib = pytest.importorskip("adv_lib.attacks", exc_type=ImportError)
    model, x, y = task
    holds(ours(task, deepfool, Threat(L2)), *judged(task, adv_lib.df(model, x, y, steps=50)))
    theirs = judged(task, adv_lib.ddn(model, x, y, steps=100))
    holds(ours(task, ddn, Threat(L2)), *theirs, slack=2e-3)
    holds(ours(task, EQUAL, Threat(L2)), *theirs, slack=2e-3)
    torch.manual_seed(0)
    theirs = judged(task, adv_lib.pgd_linf(model, x, y, 0.1, steps=40))
    assert float(ours(task, pgd, Threat(LINF, 0.1)).success.double().mean()) >= theirs[0] - 0.01


def test_art(task: tuple[nn.Module, Tensor, Tensor]) -> None:
    pytest.importorskip("art")
    from art.attacks.evasion import DeepFool, ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    model, x, y = task
    wrapped = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), 10, clip_values=(0, 1), device_type="cpu"
    )
    made = partial(DeepFool, wrapped, max_iter=50, epsilon=0.02, batch_size=100, verbose=False)
    holds(ours(task, deepfool, Threat(L2)), *judged(task, torch.from_numpy(made().generate(x.numpy(), y.numpy()))))
    attack = ProjectedGradientDescentPyTorch(
        wrapped, eps=0.1, eps_step=0.01, max_iter=40, num_random_init=1, batch_size=100, verbose=False
    )
    theirs = judged(task, torch.from_numpy(attack.generate(x.numpy(), y.numpy())))
    assert float(ours(task, pgd, Threat(LINF, 0.1)).success.double().mean()) >= theirs[0] - 0.01
