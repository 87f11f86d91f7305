"""Attacks: pure functions with one head, and the evaluator that judges them."""

from __future__ import annotations

from .carlini import cw
from .decoupled import ddn
from .distance import deepfool
from .evaluate import Attack, AttackResult, robust_accuracy, run
from .flags import FLAGS, Flag
from .gradient import fgsm, pgd, rfgsm
from .hybrid import nearest

ATTACKS: dict[str, Attack] = {
    "cw": cw,
    "ddn": ddn,
    "deepfool": deepfool,
    "fgsm": fgsm,
    "nearest": nearest,
    "pgd": pgd,
    "rfgsm": rfgsm,
}

__all__ = [
    "ATTACKS",
    "FLAGS",
    "Attack",
    "AttackResult",
    "Flag",
    "cw",
    "ddn",
    "deepfool",
    "fgsm",
    "nearest",
    "pgd",
    "rfgsm",
    "robust_accuracy",
    "run",
]
