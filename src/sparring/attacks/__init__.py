"""Attacks: functions with one signature, and the evaluator that judges them.

Examples:
    >>> import torch
    >>> from sparring import attacks
    >>> from sparring.threat import LINF, Threat
    >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)).eval()
    >>> _ = net[1].weight.data.copy_(torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0]]))
    >>> _ = net[1].bias.data.copy_(torch.tensor([-0.2, 0]))
    >>> x, y = torch.full((1, 1, 2, 2), 0.1), torch.tensor([0])
    >>> attacks.run(net, x, y, attacks.fgsm, Threat(LINF, 0.06)).success
    tensor([True])
    >>> round(float(attacks.run(net, x, y, attacks.nearest, Threat(LINF)).distance), 3)
    0.05
"""

from __future__ import annotations

from functools import partial

from ._entry import refuse_norm
from ._meter import Progress, with_title
from .algorithms._apgd import apgd
from .algorithms._cw import cw
from .algorithms._ddn import ddn
from .algorithms._deepfool import deepfool
from .algorithms._ensembles import apgd_targeted, fab_targeted, fast, standard, swift, worst_case
from .algorithms._fab import fab
from .algorithms._losses import dlr
from .algorithms._nearest import nearest
from .algorithms._pgd import fgsm, pgd, rfgsm
from .algorithms._sigma_zero import sigma_zero
from .black_box._hopskipjump import hopskipjump
from .black_box._square import square
from .evaluation._audit import AuditRow, audit, check_budgets, check_order, check_silence, check_unlimited
from .evaluation._batches import run_batches
from .evaluation._run import AttackResult, check_convergence, lend, robust_accuracy, run
from .evaluation._sanity_checks import FLAGS, Flag
from .evaluation._scoring import Attack, batch_size_for, facts_of, images_at_once, need_of

ATTACKS: dict[str, Attack] = {
    "apgd": apgd,
    "apgd-dlr": partial(apgd, objective=dlr),
    "apgd-targeted": apgd_targeted,
    "cw": cw,
    "ddn": ddn,
    "deepfool": deepfool,
    "fab": fab,
    "fab-targeted": fab_targeted,
    "fast": fast,
    "fgsm": fgsm,
    "hopskipjump": hopskipjump,
    "nearest": nearest,
    "pgd": pgd,
    "rfgsm": rfgsm,
    "sigma-zero": sigma_zero,
    "square": square,
    "standard": standard,
    "swift": swift,
}

__all__ = [
    "ATTACKS",
    "FLAGS",
    "Attack",
    "AttackResult",
    "AuditRow",
    "Flag",
    "Progress",
    "apgd",
    "apgd_targeted",
    "audit",
    "batch_size_for",
    "check_budgets",
    "check_convergence",
    "check_order",
    "check_silence",
    "check_unlimited",
    "cw",
    "ddn",
    "deepfool",
    "fab",
    "fab_targeted",
    "facts_of",
    "fast",
    "fgsm",
    "hopskipjump",
    "images_at_once",
    "lend",
    "nearest",
    "need_of",
    "pgd",
    "refuse_norm",
    "rfgsm",
    "robust_accuracy",
    "run",
    "run_batches",
    "sigma_zero",
    "square",
    "standard",
    "swift",
    "with_title",
    "worst_case",
]
