"""Attacks: pure functions with one head, and the evaluator that judges them."""

from __future__ import annotations

from .distance import deepfool
from .evaluate import Attack, AttackResult, robust_accuracy, run
from .flags import FLAGS, Flag
from .gradient import fgsm, pgd, rfgsm

ATTACKS: dict[str, Attack] = {
    "deepfool": deepfool,
    "fgsm": fgsm,
    "pgd": pgd,
    "rfgsm": rfgsm,
}

__all__ = [
    "ATTACKS",
    "FLAGS",
    "Attack",
    "AttackResult",
    "Flag",
    "deepfool",
    "fgsm",
    "pgd",
    "rfgsm",
    "robust_accuracy",
    "run",
]
