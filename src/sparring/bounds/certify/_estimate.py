"""Estimate the time of each bound, to choose the tightest that fits in a time budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ...graph import Graph
from ...waiting import Stopwatch, courteous
from .._network import compacted, margin_rows, prepare
from .._region import check_pixels, region
from ._crown import bound_nodes, lower_bound
from ._open_units import crown_work, heavy, row_work

_LOOSE, _LIGHT, _HEAVY = (
    12,
    8,
    3,
)  # evaluations until a radius is found: of intervals, CROWN, and slow CROWN
_OPEN = 0.3  # share of the units before nonlinear nodes that CROWN refines: 0.1 to 0.3 near radii of networks seen
_ROWS = 8  # times the margins, with which a unit's time is measured: CROWN refines many units together
_ASCENT = 60  # passes with gradients that alpha-CROWN makes for its margins, in forward ones
_EPS = 1e-3
_STEPS = 4  # opening the network, and three measurements
TIGHTEST = ("alpha-crown", "crown", "crown-interval", "interval")


@courteous()
@torch.no_grad()
def estimate(
    model: nn.Module, x: Tensor, norm: float, *, progress: Callable[[int, int], None] | None = None
) -> dict[str, float]:
    """Estimate for each name in BOUNDS the seconds of one certified radius on these images (N, ...).

    Measures one image with intervals and one backward pass of its margins; CROWN's time is extrapolated from its
    multiplications, which is rough. `progress` gets the number of finished steps and the total. Raises as `radius`
    does.
    """
    check_pixels(x)
    steps = _Steps(progress)
    graph, pixels = compacted(prepare(model, tuple(x.shape[1:]), images=x[:1], certified=True), x[:1])
    return _estimate_over(graph, pixels, norm, steps)


def _estimate_over(graph: Graph, x: Tensor, norm: float, steps: _Steps) -> dict[str, float]:
    ball, rows = region(x, norm, _EPS), margin_rows(graph, graph(x.double()).argmax(1))
    last = len(graph.nodes) - 1
    _, relaxed = bound_nodes(graph, ball, backward=False)  # not measured: what is computed only once
    steps.ended_()
    forward = steps.seconds_(lambda: bound_nodes(graph, ball, backward=False))
    backward = steps.seconds_(lambda: lower_bound(graph, last, rows, ball, relaxed))
    many = steps.seconds_(lambda: lower_bound(graph, last, rows.repeat(1, _ROWS, 1), ball, relaxed))
    rate = many / (_ROWS * rows.shape[1] * row_work(graph, last))
    evaluations = _HEAVY if heavy(graph) else _LIGHT
    crown = evaluations * _OPEN * crown_work(graph) * rate
    return {
        "interval": _LOOSE * forward,
        "crown-interval": _LOOSE * (forward + backward),
        "crown": crown,
        "alpha-crown": crown + evaluations * _ASCENT * backward,
    }


class _Steps:
    """Time the steps of an estimate, and report how many are done."""

    def __init__(self, progress: Callable[[int, int], None] | None) -> None:
        self.progress, self.done = progress, -1
        self.ended_()

    def ended_(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, _STEPS)

    def seconds_(self, work: Callable[[], object]) -> float:
        watch = Stopwatch()
        work()
        seconds = watch.seconds()
        self.ended_()
        return seconds


def tightest(seconds_each: Mapping[str, float], images: int, seconds: float) -> str:
    """Return the tightest method whose estimate for this number of images fits into the time, or else intervals."""
    return next((name for name in TIGHTEST if images * seconds_each[name] <= seconds), "interval")
