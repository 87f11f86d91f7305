"""What the pages of docs/results may say in digits: every number worked out again from results.csv and ledger.json.

`FACTS` has for each page the phrases with numbers that it holds; digits anywhere else in its prose are an error.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "docs" / "results"
EPS = {"0.1": 0.1, "0.2": 0.2, "0.3": 0.3, "1/255": 1 / 255, "2/255": 2 / 255}


def signed(number: float, digits: int = 1) -> str:
    """Return a number with a real minus or a plus sign, none of a zero."""
    text = f"{number:+.{digits}f}".replace("-", "−")
    return text if text.strip("+−0.") else text[1:]


def interval(row: dict, digits: int = 1) -> str:
    """Return a row's effect with its interval, as "+5.7 [+1.3, +10.1]"."""
    estimate, low, high = (signed(row[name], digits) for name in ("estimate", "low", "high"))
    return f"{estimate} [{low}, {high}]"


def told(*rows: dict) -> str:
    """Return the verdict that rows of the ledger share; raise ValueError where they differ."""
    (verdict,) = {row["verdict"] for row in rows}
    return str(verdict)


class Numbers:
    """Hold one study's results.csv and its rows of the ledger."""

    def __init__(self, study: str) -> None:
        self.study = study

    @cached_property
    def rows(self) -> list[dict]:
        with (RESULTS / self.study / "results.csv").open(encoding="utf-8") as file:
            return list(csv.DictReader(file))

    @cached_property
    def claims(self) -> list[dict]:
        ledger = json.loads((RESULTS / "ledger.json").read_text(encoding="utf-8"))
        return [row for row in ledger if row["study"] == self.study]

    def claim(self, *words: str) -> dict:
        """Return the one row whose claim and test hold all the words."""
        (found,) = [row for row in self.claims if all(w in f"{row['claim']}. {row['test']}" for w in words)]
        return found

    def primary(self, words: str) -> dict:
        """Return the one primary claim that holds the words."""
        (found,) = [row for row in self.claims if row["primary"] and words in row["claim"]]
        return found

    def row(self, metric: str, method: str, sparsity: float, attack: str = "", eps: str = "", norm: str = "") -> dict:
        """Return the one row of results.csv; `norm` is asked for where a metric has several."""
        found = [
            row
            for row in self.rows
            if row["metric"] == metric
            and row["method"] == method
            and math.isclose(float(row["sparsity"]), sparsity)
            and (not attack or row["attack"] == attack)
            and (not eps or math.isclose(float(row["eps"] or 0), EPS[eps]))
            and (not norm or row["norm"] == norm)
            and row["split"] != "valid"
        ]
        (only,) = found
        return only

    def mean(self, *who: str | float, **more: str) -> float:
        return float(self.row(*who, **more)["mean"])  # type: ignore[arg-type]

    # What pages speak of, shares in per cent; without a method the dense control and the headline's method.

    def share(self, metric: str, sparsity: float, method: str, attack: str = "", eps: str = "") -> float:
        return 100 * self.mean(metric, method or ("magnitude" if sparsity else "control"), sparsity, attack, eps)

    def accuracy(self, sparsity: float = 0, method: str = "") -> float:
        return self.share("accuracy", sparsity, method)

    def fgsm(self, sparsity: float = 0, method: str = "", eps: str = "0.1") -> float:
        return self.share("robust_accuracy", sparsity, method, "fgsm", eps)

    def under(self, attack: str, sparsity: float = 0, method: str = "", eps: str = "0.1") -> float:
        return self.share("robust_accuracy", sparsity, method, attack, eps)

    def worst(self, sparsity: float = 0, method: str = "", eps: str = "0.1") -> float:
        return self.share("worst_case_accuracy", sparsity, method, "", eps)

    def distance(self, attack: str, sparsity: float = 0, method: str = "", *, correct: bool = False) -> float:
        metric = "mean_distance_correct" if correct else "mean_distance"
        return self.mean(metric, method or ("magnitude" if sparsity else "control"), sparsity, attack)

    def r_2(self, sparsity: float = 0, method: str = "") -> float:
        return self.distance("deepfool-50", sparsity, method)

    def certified(self, way: str, sparsity: float = 0, method: str = "") -> float:
        return self.mean("mean_certified_radius", method or ("magnitude" if sparsity else "control"), sparsity, way)


SPARSE = (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.985, 0.99, 0.995, 0.997)


def _at(value: Callable[[float], float], digits: int, sparsities: Sequence[float], unit: str = "") -> str:
    return ", ".join(f"{value(s):.{digits}f}{unit} at {100 * s:g}%" for s in sparsities)


def lenet_300_100() -> list[str]:
    n = Numbers("paper-lenet-300-100")
    alone, kept = n.primary("gain r_2"), n.primary("lose accuracy under")
    best = [max(values) - zero for values, zero in ((map(n.fgsm, SPARSE), n.fgsm()), (map(n.worst, SPARSE), n.worst()))]
    pgd = max(n.under("pgd-40", s) for s in SPARSE) - n.under("pgd-40")
    return [
        f"by {best[0]:.1f}, {pgd:.1f} and {best[1]:.1f} points at the best sparsity",
        f"at eps 0.1 is {n.worst():.1f}% for the dense control",
        f"{n.worst(0.95):.1f}% at 95% and {n.worst(0.97):.1f}% at 97%, {n.worst(0.99):.1f}% at 99%",
        f"FGSM's gain of {interval(gain := n.primary('gain r_inf'))} points, by the paper's own "
        f"measure, is {told(gain)}",
        f"worst case's gain of {interval(worst := n.primary('the gain survives'))} at the sparsity that validation "
        f"images chose is {told(worst)}",
        f"That over-sparsified networks lose it is {told(n.primary('over-sparsified networks lose r_2'))}",
        f"is {n.under('standard'):.1f}% for the dense control, "
        + ", ".join(f"{n.under('standard', s):.1f}% at {100 * s:g}%" for s in (0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99)),
        f"and {n.under('standard', 0.997):.1f}% at 99.7%",
        f"r_2 falls from {n.r_2():.3f} to {n.r_2(0.5):.3f} at 50% and {n.r_2(0.997):.3f} at 99.7%",
        f"{n.distance('cw'):.2f} dense, " + _at(lambda s: n.distance("cw", s), 2, (0.8, 0.95, 0.99, 0.997)),
        f"random masks lose {-n.claim('random masks gain')['estimate']:.1f} points",
        f"channels {-n.claim('channels or filters')['estimate']:.1f} even at their best sparsity",
        f"fewer than half, {told(n.claim('dense → sparse'), n.claim('sparse → dense'))} each",
        f"has {n.claim('dense network of equal size')['estimate']:.1f} points less",
        f"even at their best sparsity, {told(n.claim('random masks gain'), n.claim('channels or filters'))} each",
        f"than the magnitude-pruned one, {told(n.claim('network of equal size'))}",
        f"r_2 at an appropriate sparsity is judged {told(alone)}: {interval(alone, 2)}%",
        f"under the worst case it is higher, {interval(kept)} points, {told(kept)}",
        f"leaves {n.worst(0.9, 'surgery'):.1f}% at 90%",
        f"{interval(n.claim('tuned weight decay'))} points, is {told(n.claim('tuned weight decay'))}",
        f"its worst case is {n.worst(0, 'tuned decay'):.1f}%",
        f"moves r_inf by {interval(n.claim('fine-tuning alone'))} points, {told(n.claim('fine-tuning alone'))}",
        f"accuracy is {n.accuracy(0.997):.1f}% at 99.7% ({n.accuracy():.1f}% dense)",
        f"FGSM {interval(n.primary('over-sparsified networks lose r_inf'))} points, "
        f"{told(n.primary('over-sparsified networks lose r_inf'))}",
        f"by {n.claim('certified')['estimate']:.0f}% at its best sparsity",
        f"rises to {1 + n.claim('ℓ∞ margin')['estimate'] / 100:.1f} times, both "
        f"{told(n.claim('certified'), n.claim('ℓ∞ margin'))}",
        f"ℓ∞ Lipschitz constant falls by {-(falls := n.claim('ℓ∞ Lipschitz constant falls'))['estimate']:.0f}% is "
        f"{told(falls)}",
        f"constant falls by {-n.claim('ℓ2 Lipschitz constant falls')['estimate']:.0f}% and margin / constant rises "
        f"by {n.claim('ℓ2 margin')['estimate']:.0f}%",
        f"{50 + n.claim('dense → sparse')['estimate']:.0f}% of the examples",
        f"sparse → dense {50 + n.claim('sparse → dense')['estimate']:.0f}%",
    ]


def robust_0_1() -> list[str]:
    n = Numbers("robust-lenet-300-100")
    plain = Numbers("paper-lenet-300-100")
    final = [n.worst(s) - n.worst(s, "magnitude (best epoch)") for s in SPARSE]
    near = [n.distance("nearest", s) - n.distance("nearest", s, "magnitude (best epoch)") for s in SPARSE]
    return [
        f"{interval(n.claim('survives the worst case'))} points under the worst case",
        f"plain training leaves {plain.worst(0.95):.1f}% of its best sparse network",
        f"{n.worst():.1f}% of the dense control survive",
        f"{n.worst():.1f}% dense, " + _at(n.worst, 1, (0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.997), "%"),
        f"{n.under('standard'):.1f}% dense, " + _at(lambda s: n.under("standard", s), 1, (0.8, 0.95, 0.99, 0.997), "%"),
        f"r_2 by {100 * (1 - n.r_2(0.7) / n.r_2()):.1f}% at 70%",
        f"accuracy is {n.accuracy():.2f}% dense and {n.accuracy(0.7):.2f}% at 70%, {n.accuracy(0.997):.1f}% at 99.7%",
        f"FGSM {interval(linf := n.claim('over-sparsified networks lose r_inf'))} points and "
        f"r_2 {interval(l2 := n.claim('over-sparsified networks lose r_2'))} %: {told(linf, l2)} (indicative)",
        f"{n.certified('crown'):.3f} dense, " + _at(lambda s: n.certified("crown", s), 3, (0.95, 0.99, 0.997)),
        f"from {n.distance('nearest'):.3f} to {n.distance('nearest', 0.997):.3f}",
        f"within {max(map(abs, final)):.1f} points of worst case and {max(map(abs, near)):.3f} of `nearest`",
        f"{n.worst() - n.worst(0, 'control (best epoch)'):.1f} points worse than its final one",
        f"{interval(n.claim('fine-tuning alone'))} points, {told(n.claim('fine-tuning alone'))}",
    ]


def robust_0_2() -> list[str]:
    n = Numbers("robust-lenet-300-100-eps-0.2")
    best = "magnitude (best epoch)"
    smallest = {s: n.distance("smallest", s) for s in (0, *SPARSE)}
    seeds = f"{n.worst(eps='0.2'):.1f}% dense, " + _at(
        lambda s: n.worst(s, eps="0.2"), 1, (0.5, 0.7, 0.8, 0.98, 0.99, 0.997), "%"
    )
    final = [n.worst(s, eps="0.2") - n.worst(s, best, eps="0.2") for s in SPARSE]
    final.append(n.worst(eps="0.2") - n.worst(0, "control (best epoch)", eps="0.2"))

    def under(attack: str, eps: str = "0.2") -> Callable[[float], float]:
        return lambda s: n.under(attack, s, eps=eps)

    return [
        seeds,
        f"{interval(n.claim('survives the worst case'))} points, {told(n.claim('survives the worst case'))}",
        f"accuracy {n.accuracy():.1f}% dense, {n.accuracy(0.8):.1f}% at 80%, {n.accuracy(0.95):.1f}% at 95%",
        f"{n.under('standard', eps='0.2'):.1f}% dense, "
        + _at(under("standard"), 1, (0.9, 0.97, 0.98, 0.985, 0.99, 0.995, 0.997), "%"),
        f"{n.worst(eps='0.2') - n.worst(0.997, eps='0.2'):.1f} points, as in the curve over three seeds",
        f"but {n.under('standard', eps='0.2') - n.under('standard', 0.997, eps='0.2'):.1f}",
        f"it is {n.under('pgd-40', eps='0.3'):.1f}% for the dense control, "
        + _at(under("pgd-40", "0.3"), 1, (0.97, 0.99, 0.995, 0.997), "%"),
        f"leaves {n.under('standard', 0.997, eps='0.2'):.1f}%",
        f"{smallest[0]:.3f} dense, {smallest[0.8]:.3f} at 80%, {smallest[0.95]:.3f} at 95%",
        f"`nearest` alone {n.distance('nearest', 0.99):.3f} at 99% and {n.distance('nearest', 0.997):.3f} at 99.7%, "
        f"all attacks together {smallest[0.99]:.3f} and {smallest[0.997]:.3f}",
        f"{n.certified('crown'):.3f} dense, " + _at(lambda s: n.certified("crown", s), 3, (0.95, 0.99, 0.997)),
        f"by at most {max(map(abs, final)):.1f} points",
        f"{interval(n.claim('fine-tuning alone'))} points under FGSM, {told(n.claim('fine-tuning alone'))}",
        f"FGSM {interval(linf := n.claim('over-sparsified networks lose r_inf'))} points and "
        f"r_2 {interval(l2 := n.claim('over-sparsified networks lose r_2'))} %: {told(linf, l2)} (indicative)",
    ]


def lenet_5() -> list[str]:
    n = Numbers("paper-lenet-5")

    def line(label: str, s: float, method: str = "") -> str:
        shares = [n.accuracy(s, method), n.fgsm(s, method), n.under("pgd-40", s, method), n.worst(s, method)]
        shares += [n.under("standard", s, method), n.fgsm(s, method, "0.2")]
        distances = [n.r_2(s, method), n.distance("smallest", s, method)]
        return f"| {label} | {_cells(shares, 1)} | {_cells(distances, 3)} |"

    def others(method: str, *sparsities: float, name: str = "") -> list[str]:
        return [line(f"{name or method} {100 * s:g}%", s, method) for s in sparsities]

    rows = [line("0 (control)", 0), *(line(f"{100 * s:g}%", s) for s in SPARSE)]
    rows += [line("as trained (five seeds)", 0, "reference"), *others("surgery", 0.9, 0.95, 0.98)]
    rows += others("random", 0.5, 0.8, 0.95, 0.98, name="random masks") + others("channels", 0.5, 0.8, 0.9, 0.95)
    rows += [line("tuned decay", 0, "tuned decay"), *others("small dense", 0.8)]
    ratio = n.mean("bytes_dense", "control", 0) / n.mean("bytes_sparse", "magnitude", 0.97)
    lost = n.share("accuracy_valid", 0, "") - n.share("accuracy_valid", 0.997, "")
    kept = n.accuracy(0.98) - n.accuracy(0.98, "random")
    crown, loose = (
        [f"{n.certified(way, s):.{d}f}" for s in (0, 0.997)] for way, d in (("crown", 3), ("crown-interval", 4))
    )
    return [
        *rows,
        f"the worst case by {interval(n.claim('survives the worst case'))} points at 95%",
        f"PGD-40 by {interval(n.claim('survives PGD'))}",
        f"has {n.under('standard'):.1f}% for the dense control and {n.under('standard', 0.985):.1f}% at 98.5%",
        f"at eps 0.1 {interval(n.claim('nonlinear networks gain r_inf'))} points",
        f"{n.fgsm(eps='0.2'):.1f}% for the control and {n.fgsm(0.9, eps='0.2'):.1f}% at 90%",
        f"{interval(n.claim('nonlinear networks gain r_2'))} % at 97%",
        f"r_2 is {n.r_2():.3f} dense and {n.r_2(0.985):.3f} at 98.5%",
        f"{n.distance('cw'):.2f} dense, " + _at(lambda s: n.distance("cw", s), 2, (0.8, 0.95, 0.99, 0.997)),
        f"from {n.accuracy():.1f}% to {n.accuracy(0.97):.1f}% at 97%, {n.accuracy(0.99):.1f}% at 99%, "
        f"{n.accuracy(0.997):.1f}% at 99.7%",
        f"{ratio:.1f} times smaller at 97%",
        f"The loss of validation accuracy is {lost:.1f} points at 99.7%",
        f"keeps {kept:.1f} points more accuracy than random masks at 98%",
        f"{n.worst(0.98, 'surgery'):.1f}% under the worst case at 98%",
        f"leaves the worst case at {n.worst(0, 'tuned decay'):.1f}%",
        f"{n.worst(0.8, 'small dense'):.1f}% under the worst case, the sparse one {n.worst(0.8):.1f}%",
        f"{interval(n.claim('network of equal size'))} points better, {told(n.claim('network of equal size'))}",
        f"moves r_inf by {interval(n.claim('fine-tuning alone'))} points",
        f"by {n.claim('certified', '(crown)')['estimate']:.0f}% at the sparsest network "
        f"(CROWN, {crown[0]} to {crown[1]} in the mean",
        f"by {n.claim('certified', '(crown-interval)')['estimate']:.0f}% with CROWN over interval bounds "
        f"({loose[0]} to {loose[1]})",
        f"are certified {n.certified('crown-interval', 0.95, 'random'):.4f}",
        f"fall by {-n.claim('ℓ∞ Lipschitz constant falls')['estimate']:.0f}%",
        f"{50 + n.claim('dense → sparse')['estimate']:.0f}% of the adversarial examples",
    ]


def _cells(values: Sequence[float | None], digits: int) -> str:
    return " | ".join("–" if value is None else f"{value:.{digits}f}" for value in values)


KINDS = ("shifted ReLU", "threshold", "percentile", "MeanSparse", "stochastic pruning", "l1 penalty")


def _naive(n: Numbers, method: str, level: float) -> str:
    return f"{n.under('pgd-40 (naive)', level, method):.1f}% and {n.under('pgd-40', level, method):.1f}%"


def _gains(n: Numbers, kinds: Sequence[str]) -> list[str]:
    """Return each kind's gain under the worst case at its best level, as "percentile −0.5 [−0.9, −0.1]"."""
    rows = {kind: n.claim("gains robustness under the worst case", f"({kind})") for kind in kinds}
    return [f"{kind} {interval(row)}" for kind, row in rows.items()]


def activation_300_100() -> list[str]:
    n = Numbers("paper-activation-lenet-300-100")
    k = "k-winners"
    naive, default = (n.under(name, 0.95, k) - n.under("pgd-40") for name in ("pgd-40 (naive)", "pgd-40"))
    worst = n.worst(0.95, k) - n.worst()
    return [
        f"{k} {interval(gain := n.claim('gains robustness under the worst case', k))} points at 95% zeros",
        f"for {n.accuracy() - n.accuracy(0.95, k):.1f} points of accuracy, {told(gain)}",
        *_gains(n, KINDS),
        f"(the control: {n.under('pgd-40'):.1f}%)",
        f"threshold 1.0 {_naive(n, 'threshold', 1.0)}",
        f"percentile 80% {_naive(n, 'percentile', 0.8)}",
        f"MeanSparse 0.3 {_naive(n, 'MeanSparse', 0.3)}",
        f"k-winners 90% {_naive(n, k, 0.9)}, 95% {_naive(n, k, 0.95)}",
        f"naive PGD ({signed(naive)} points at 95%) over the default PGD ({signed(default)}) "
        f"to the worst case ({signed(worst)})",
        f"leaves {n.under('standard', 0.95, k):.1f}% against the control's {n.under('standard'):.1f}%",
        f"{n.under('standard', 0.7, k):.1f}% at 70% and {n.under('standard', 0.8, k):.1f}% at 80%",
        f"at 95% gains {interval(gain := n.claim('the gain survives the worst case'))} points under the worst case, "
        f"{told(gain)}",
        f"on one seed: {n.under('standard', 0.95):.1f}%",
        f"costs {n.accuracy() - n.accuracy(0.95):.2f} points of accuracy",
        f"percentile at 95% keeps {n.accuracy(0.95, 'percentile'):.1f}% accuracy and "
        f"{n.under('standard', 0.95, 'percentile'):.1f}% under `standard`",
        f"penalty of 1 {n.accuracy(1, 'l1 penalty'):.1f}% and {n.under('standard', 1, 'l1 penalty'):.1f}%",
    ]


def activation_5() -> list[str]:
    n = Numbers("paper-activation-lenet-5")
    k = "k-winners"

    def line(label: str, level: float, method: str) -> str:
        naive = None if method == "magnitude" else n.under("pgd-40 (naive)", level, method)
        shares = [n.accuracy(level, method), n.fgsm(level, method), naive, n.under("pgd-40", level, method)]
        shares += [n.under("fast", level, method), n.under("standard", level, method)]
        return f"| {label} | {_cells(shares, 1)} | {n.distance('nearest', level, method):.3f} |"

    tests = [r for r in n.rows if r["metric"] == "accuracy" and r["split"] == "test" and r["method"] != "reference"]
    shares = ("magnitude", k, "percentile")
    rows = [
        line(
            row["method"] + ("" if not level else f" {100 * level:g}%" if row["method"] in shares else f" {level:g}"),
            level,
            row["method"],
        )
        for row in tests
        for level in [float(row["sparsity"])]
    ]
    drawn = [n.distance("nearest", level, "stochastic pruning") for level in (0.5, 1, 2)]
    return [
        *rows,
        f"all {told(*(row for row in n.claims if row['estimate'] is not None))}",
        *_gains(n, (*KINDS, k)),
        f"under `fast` {n.under('fast', 0.95, k):.1f}% at 95% zeros against the control's {n.under('fast'):.1f}%, "
        f"under `standard` the same {n.under('standard', 0.95, k):.1f}%",
        f"{n.distance('nearest', 0.95, k):.3f} against {n.distance('nearest'):.3f}",
        f"Naive PGD-40 leaves the control {n.under('pgd-40 (naive)'):.1f}%, k-winners at 95% "
        f"{n.under('pgd-40 (naive)', 0.95, k):.1f}%, percentile at 90% "
        f"{n.under('pgd-40 (naive)', 0.9, 'percentile'):.1f}%, threshold 1.0 "
        f"{n.under('pgd-40 (naive)', 1, 'threshold'):.1f}%",
        f"the worst case leaves them {n.worst(0.95, k):.1f}%, {n.worst(0.9, 'percentile'):.1f}% and "
        f"{n.worst(1, 'threshold'):.1f}%, the control {n.worst():.1f}%",
        f"Naive FGSM sees {n.under('fgsm (naive)', 0.95, k) - n.fgsm():.1f} points for k-winners at 95%, the default "
        f"one {signed(n.fgsm(0.95, k) - n.fgsm())}",
        f"ends at {min(drawn):.3f} to {max(drawn):.3f} (control {n.distance('nearest'):.3f})",
        f"at 95% gains {interval(n.claim('the gain survives the worst case'))} points under the worst case",
        f"on one: {n.under('standard', 0.95):.1f}% against {n.under('standard'):.1f}%",
        f"percentile at 95% keeps {n.accuracy(0.95, 'percentile'):.1f}% accuracy and "
        f"{n.under('standard', 0.95, 'percentile'):.1f}% under `standard`",
        f"penalty of 1 {n.accuracy(1, 'l1 penalty'):.1f}% and {n.under('standard', 1, 'l1 penalty'):.1f}%",
    ]


def _small(study: str) -> tuple[Numbers, list[str]]:
    """Return a small CIFAR-10 study and the rows of its table."""
    n = Numbers(study)

    def line(label: str, s: float, method: str = "") -> str:
        one, two = "1/255", "2/255"
        shares = [n.accuracy(s, method), n.fgsm(s, method, one), n.under("rfgsm", s, method, one)]
        shares += [n.under("pgd-40", s, method, one), n.worst(s, method, one), n.under("standard", s, method, one)]
        shares += [n.fgsm(s, method, two), n.under("pgd-40", s, method, two)]
        carlini = None if s in (0.5, 0.9) else n.distance("cw", s, method)
        distances = [n.r_2(s, method), n.distance("smallest", s, method), carlini]
        return f"| {label} | {_cells(shares, 1)} | {_cells(distances, 3)} |"

    rows = [line("as trained", 0, "reference"), line("control", 0)]
    return n, [*rows, *(line(f"magnitude {100 * s:g}%", s) for s in (0.5, 0.8, 0.9, 0.95, 0.98))]


def _losses(n: Numbers, sparsities: Sequence[float]) -> str:
    return _at(lambda s: n.worst(eps="1/255") - n.worst(s, eps="1/255"), 1, sparsities)


def _correct(n: Numbers, *sparsities: float) -> str:
    first, *others = (n.distance("deepfool-50", s, correct=True) for s in (0, *sparsities))
    told = " and ".join(f"{value:.3f} at {100 * s:g}%" for value, s in zip(others, sparsities, strict=True))
    return f"from {first:.3f} (control) to {told}"


def resnet() -> list[str]:
    n, rows = _small("paper-resnet-32-small")
    return [
        *rows,
        f"the mean worst case is lower, in points, by {_losses(n, (0.5, 0.8, 0.9, 0.95, 0.98))}",
        f"r_2 by {100 * (1 - n.r_2(0.8) / n.r_2()):.0f}% at 80%",
        f"At 50% the worst case changes by {interval(n.claim('survives the worst case'))} points, "
        f"r_2 by {interval(n.claim('nonlinear networks gain r_2'))} %",
        _correct(n, 0.8, 0.98),
        "pruning reduces accuracy immediately: " + _at(lambda s: n.accuracy() - n.accuracy(s), 1, (0.5, 0.8, 0.95)),
        f"r_inf {interval(linf := n.claim('over-sparsified networks lose r_inf'))} points and "
        f"r_2 {interval(l2 := n.claim('over-sparsified networks lose r_2'))} % at 98%, which at a second look with "
        f"three seeds is {told(linf, l2)}",
        f"the mean radius is {n.certified('interval', 0.5):.0f} at 50% and {n.certified('interval', 0.98):.0e} at 98%",
    ]


def vgg() -> list[str]:
    n, rows = _small("paper-vgg-like-small")
    resnet_loses = (one := Numbers("paper-resnet-32-small")).accuracy() - one.accuracy(0.98)
    dense, sparse = n.certified("interval"), n.certified("interval", 0.98)
    return [
        *rows,
        f"r_2 changes by {interval(n.claim('nonlinear networks gain r_2'))} %",
        f"the worst case by {interval(n.claim('survives the worst case'))} points",
        f"{n.under('standard', eps='1/255'):.0f}% the control, {n.under('standard', 0.5, eps='1/255'):.0f}% at 50% and "
        f"{n.under('standard', 0.8, eps='1/255'):.0f}% at 80%",
        "r_2 is lower by " + _at(lambda s: 100 * (1 - n.r_2(s) / n.r_2()), 1, (0.8, 0.9, 0.95, 0.98), "%"),
        f"the worst case, in points, by {_losses(n, (0.9, 0.95, 0.98))}",
        f"FGSM {interval(linf := n.claim('over-sparsified networks lose r_inf'))} points, "
        f"r_2 {interval(l2 := n.claim('over-sparsified networks lose r_2'))} % at 98%, the second is {told(l2)} "
        f"(indicative), the first {told(linf)}",
        _correct(n, 0.95, 0.98),
        f"(at 98% it loses {n.accuracy() - n.accuracy(0.98):.1f} points of accuracy, ResNet {resnet_loses:.1f})",
        f"mean {dense:.1e} in the control, {sparse:.1e} at 98%",
    ]


class Linear(Numbers):
    """Hold a study of linear classifiers, of which results.csv has one row a classifier: means are over the pairs."""

    def pairs(self, loss: str, path: str, step: float) -> list[dict]:
        who = [row for row in self.rows if (row["loss"], row["path"], float(row["step"])) == (loss, path, step)]
        return [row for row in who if row["classes"].count(" ") == 1]

    def over_pairs(self, column: str, loss: str, path: str = "dense", step: float = 0.0) -> float:
        values = [float(row[column]) for row in self.pairs(loss, path, step)]
        return sum(values) / len(values)

    def together(self, column: str, loss: str, path: str = "dense", step: float = 0.0) -> float:
        found = [row for row in self.rows if (row["loss"], row["path"], float(row["step"])) == (loss, path, step)]
        (only,) = [row for row in found if row["classes"].count(" ") > 1]
        return float(only[column])

    def line(self, loss: str, path: str, step: float) -> str:
        names = {"dense": "dense", "magnitude": "magnitude pruning", "l1": "ℓ1 penalty", "l2": "ℓ2 penalty"}
        shares = [100 * self.over_pairs(c, loss, path, step) for c in ("accuracy", "fgsm.0.1", "r_inf_boxed.0.1")]
        shares.append(100 * self.over_pairs("r_inf_unboxed.0.1", loss, path, step))
        lengths = [self.over_pairs(f"r_2_{form}", loss, path, step) for form in ("deepfool", "boxed", "unboxed")]
        ratios = [float(r["theorem.l1"]) / float(r["theorem.l2"]) for r in self.pairs(loss, path, step)]
        lengths.append(sum(ratios) / len(ratios))
        told = "chosen" if path == "dense" else f"{step:g}"
        sparsity = f"{100 * self.over_pairs('sparsity', loss, path, step):.3g}%"
        return f"| {names[path]} | {told} | {sparsity} | {_cells(shares, 1)} | {_cells(lengths, 2)} |"


def linear() -> list[str]:
    n = Linear("paper-linear")
    steps = dict.fromkeys((row["loss"], row["path"], float(row["step"])) for row in n.rows)
    order = ("dense", "magnitude", "l1", "l2")
    rows = [n.line(*who) for who in sorted(steps, key=lambda who: (who[0], order.index(who[1]), who[2]))]

    def effect(loss: str, way: str, *words: str) -> str:
        return interval(n.claim(f"{loss}, {way}", *words))

    def fgsm(path: str = "dense", step: float = 0.0) -> float:
        return 100 * n.over_pairs("fgsm.0.1", "logistic", path, step)

    def all_ten(column: str) -> list[float]:
        places = [("dense", 0.0), ("l2", 0.001), ("l1", 0.01), ("magnitude", 0.95)]
        return [100 * n.together(column, "logistic", *place) for place in places]

    costs = [
        100 * (n.over_pairs("accuracy", "logistic", *place) - n.over_pairs("accuracy", "logistic"))
        for place in (("magnitude", 0.95), ("l1", 0.01))
    ]
    tight = [r for r in n.rows if r["theorem.markov.0.1"]]
    apart = max(abs(float(r["fgsm.0.1"]) - float(r["r_inf_boxed.0.1"])) for r in tight)
    solved = [r for r in n.rows if r["path"] != "dense" and float(r["r_2_boxed"]) and not float(r["failed_deepfool"])]
    excess = [float(r["r_2_deepfool"]) / float(r["r_2_boxed"]) - 1 for r in solved]
    markov = [n.over_pairs("theorem.markov.0.1", "logistic", p, s) for loss, p, s in steps if loss == "logistic"]
    dense = n.over_pairs("theorem.markov.0.1", "logistic")
    below = sum(float(r["theorem.markov.0.1"]) < 1 for r in n.pairs("logistic", "dense", 0.0))
    fails = max(n.over_pairs("failed_nearest", *who) for who in steps)
    r_inf, r_2 = (n.over_pairs(c, "logistic") for c in ("r_inf_unboxed.0.1", "r_2_unboxed"))
    fgsm_ten, boxed_ten, accuracy_ten = (all_ten(c) for c in ("fgsm.0.1", "r_inf_boxed.0.1", "accuracy"))
    tops = [n.over_pairs("theorem.numerator", "logistic", *place) for place in (("dense", 0.0), ("magnitude", 0.95))]
    return [
        *rows,
        f"ver the {len(n.pairs('svm', 'dense', 0.0))} pairs",
        f"{signed(costs[0])} points for magnitude pruning at 95%, {signed(costs[1])} for the ℓ1 penalty at 94.5%",
        f"C = 0.001 has {fgsm('l2', 0.001):.1f}% under FGSM where the dense choice has {fgsm():.1f}% and magnitude "
        f"pruning at best {max(fgsm('magnitude', s) for s in (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)):.1f}%",
        f"raises r_2 to {n.over_pairs('r_2_boxed', 'logistic', 'l2', 0.001):.2f}",
        f"ℓ1 path's {effect('logistic', 'ℓ1 penalty', 'exceeds')} points",
        f"says r_inf {100 * r_inf:.1f}% and r_2 {r_2:.2f}",
        f"they are {100 * n.over_pairs('r_inf_boxed.0.1', 'logistic'):.1f}% and "
        f"{n.over_pairs('r_2_boxed', 'logistic'):.2f}",
        f"on every two-class classifier (within {apart:.3f})",
        f"exceeds the exact one by {100 * sum(excess) / len(excess):.2f}% in the mean",
        f"it is {dense:.2f} for the dense classifier and at most {max(markov):.1f}",
        f"for {below} of the {len(n.pairs('logistic', 'dense', 0.0))} dense classifiers",
        f"numerator from {tops[0]:.1f} to {tops[1]:.1f}",
        f"on {100 * fails:.1f}% of the images at most",
        f"from {fgsm_ten[0]:.1f}% (dense) to {fgsm_ten[1]:.1f}% with C = 0.001 and {fgsm_ten[2]:.1f}% with the ℓ1 "
        f"penalty at {100 * n.together('sparsity', 'logistic', 'l1', 0.01):.0f}% sparsity (accuracy "
        + ", ".join(f"{value:.1f}" for value in accuracy_ten[:3])
        + "%)",
        f"reaches {fgsm_ten[3]:.1f}% at 95% ({accuracy_ten[3]:.1f}%)",
        "the closed forms are " + ", ".join(f"{value:.1f}" for value in boxed_ten[:3]) + f" and {boxed_ten[3]:.1f}%",
        f"r_2 is {effect('svm', 'ℓ1 penalty', 'ℓ2 robustness.')} % at the best step",
    ]


def readme() -> list[str]:
    plain, conv, robust = (
        Numbers(f"{name}") for name in ("paper-lenet-300-100", "paper-lenet-5", "robust-lenet-300-100")
    )
    resnet, vgg = Numbers("paper-resnet-32-small"), Numbers("paper-vgg-like-small")
    sparse = Numbers("paper-activation-lenet-300-100")
    ratio = conv.mean("bytes_dense", "control", 0) / conv.mean("bytes_sparse", "magnitude", 0.97)
    return [
        f"gains {interval(plain.primary('the gain survives'))} points of "
        f"worst-case ℓ∞ accuracy, {told(plain.primary('the gain survives'))}",
        f"and {interval(plain.primary('gain r_inf'))} under FGSM, {told(plain.primary('gain r_inf'))}",
        f"a gain in ℓ2 distance is judged {told(plain.primary('gain r_2'))}",
        f"{told(*(row for row in Numbers('paper-linear').claims if row['primary']))} for both losses",
        f"{interval(conv.claim('survives the worst case'))} points of worst case at 95%, "
        f"{told(conv.claim('survives the worst case'))}",
        f"k-winners, {told(sparse.claim('robustness under the worst case', 'k-winners'))}",
        f"at 97% it is {ratio:.1f} times smaller",
        f"its accuracy lower by {conv.accuracy() - conv.accuracy(0.97):.1f} points",
        f"70% sparsity costs no accuracy and {100 * (1 - robust.r_2(0.7) / robust.r_2()):.1f}% of r_2",
        f"lower by {_losses(resnet, (0.8,)).replace(' at', ' points at')} and by {_losses(resnet, (0.98,))}",
        f"r_2 is lower from 80% on, the worst case by {_losses(vgg, (0.98,)).replace(' at', ' points at')}",
    ]


FACTS: dict[str, Callable[[], list[str]]] = {
    "paper-lenet-300-100": lenet_300_100,
    "paper-lenet-5": lenet_5,
    "paper-activation-lenet-300-100": activation_300_100,
    "paper-activation-lenet-5": activation_5,
    "paper-linear": linear,
    "README": readme,
    "paper-resnet-32-small": resnet,
    "paper-vgg-like-small": vgg,
    "robust-lenet-300-100": robust_0_1,
    "robust-lenet-300-100-eps-0.2": robust_0_2,
}
