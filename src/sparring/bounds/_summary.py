"""Summarise certificates of images next to the result of an attack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from ..proofs import refuse_refuted
from ..units import html_table, norm_name, percent
from .certify._certificates import radius

VACUOUS = 1 / 2550
"""A radius below a tenth of a grey level, which is vacuous for images with 256 levels."""


class Attacked(Protocol):
    """The parts of a minimum-norm attack's `attacks.AttackResult` that are used; both have shape (N,)."""

    @property
    def clean_correct(self) -> Tensor: ...
    @property
    def distance(self) -> Tensor: ...


@dataclass(frozen=True)
class Summary:
    """Certificates of N images next to the distances at which an attack succeeded.

    radius: (N,), float64, certified. `certified_accuracy` and `attacked_accuracy` give, for each eps, the fraction of
    all images that are classified correctly with a certificate, and under the attack. Medians are over correctly
    classified images, None if there are none.
    """

    radius: Tensor
    accuracy: float
    certified_accuracy: dict[float, float]
    attacked_accuracy: dict[float, float]
    radius_median: float | None
    distance_median: float | None
    distance_over_radius_median: float | None

    def shown(self) -> dict[str, str]:
        """Return the values to display, by name."""
        rows = {"images": str(len(self.radius)), "accuracy": percent(self.accuracy)}
        for eps, share in self.certified_accuracy.items():
            attacked = percent(self.attacked_accuracy[eps])
            rows[f"eps {eps:g}"] = f"certified {percent(share)}, under attack {attacked}"
        medians = {"certified radius": self.radius_median, "distance of the attack": self.distance_median}
        return rows | {f"median {name}": f"{one:.4g}" for name, one in medians.items() if one is not None}

    def __repr__(self) -> str:
        return f"Summary({'; '.join(f'{name}: {text}' for name, text in self.shown().items())})"

    def _repr_html_(self) -> str:
        return html_table(self.shown())


def summary(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    norm: float,
    attacked: Attacked,
    *,
    eps: Sequence[float],
    method: str = "crown",
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Certify images x (N, ...) in [0, 1] with labels y (N,), and compare the radii with the distances of an attack.

    `attacked` is the result of a minimum-norm attack in the same norm on the same images and model; `progress` as for
    `radius`. Raises as `radius` does, and UserError if an adversarial example lies within a certified radius.
    """
    radii = radius(model, x, y, norm, method=method, progress=progress)
    right, distance = attacked.clean_correct, attacked.distance
    refuse_refuted(radii, distance, norm=norm_name(norm))
    return Summary(
        radii,
        _share(right),
        {budget: _share(right & (radii >= budget)) for budget in eps},
        {budget: _share(right & (distance > budget)) for budget in eps},
        _median(radii[right]),
        _median(distance[right]),
        _median(distance[right].double() / radii[right].clamp_min(1e-12)),
    )


def _share(images: Tensor) -> float:
    return float(images.double().mean())


def _median(values: Tensor) -> float | None:
    return float(values.median()) if len(values) else None
