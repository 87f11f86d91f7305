"""Write the findings of a study as plain-text sentences."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..statistics import (
    INDICATIVE_BELOW,
    MOST_POINTS,
    Row,
    minimum_detectable_effect,
    sweet_spot,
    with_seeds,
)
from . import _numbers as numbers
from .analysis._findings import MANY_FAILED, Findings, Result, seeds_phrase
from .analysis._looks import look_sentences
from .analysis._metrics import NORMS, Measure, pretty, pretty_eps
from .analysis._records import Study

ONE_SEED = "With one seed the intervals cover the choice of images only, so no gain, loss or sweet spot is claimed."


def subject(findings: Findings) -> str:
    """Return the model and the data in words."""
    given = (findings.study.plan.get(key) for key in ("model", "data"))
    model, data = (one.get("name", "?") if isinstance(one, dict) else "?" if one is None else one for one in given)
    return f"{model} on {data}"


@dataclass(frozen=True)
class Verdict:
    """The findings of a study in the order of a reader's questions; `str` is plain text in paragraphs.

    `found`: what sparsity did; `ship`: what to ship; `decided`: the ledger's verdicts on the paper's claims,
    and what would decide the others; `more`: single curves, looks; `short`: for the top of the page, what to ship and
    how many claims are undecided.
    """

    found: str
    ship: str = ""
    decided: Sequence[str] = ()
    more: Sequence[str] = ()
    short: str = ""

    def __str__(self) -> str:
        listed = "\n".join(f"- {sentence}" for sentence in (*self.decided, *self.more))
        return "\n\n".join(filter(None, [self.found, self.ship, listed]))


def headline(findings: Findings, ledger: Sequence[Row]) -> Verdict:
    """Return the verdict: what happened, what to ship, what the ledger decides, and what a sceptic asks."""
    if findings.method is None or not any(findings.result(m) for m in findings.main):
        return Verdict(f"{subject(findings)}: no sparse network can be compared with its dense control yet.")
    several = findings.seeds > 1
    found = [_happened(findings), _doubted(findings), _weak(findings), missing(findings.study)]
    others = ", ".join(m for m in findings.study.methods if m != findings.method)
    also = f"This summary is about the method “{findings.method}”; the study also has: {others}." if others else ""
    more = [_alone(findings) if several else "", also, *look_sentences(findings.study)]
    ship = _ship(findings) if several else f"{ONE_SEED} {_at(findings)}"
    told = " ".join(filter(None, found))
    decided = filter(None, [*verdicts(ledger), _few(ledger)])
    short = _short(findings, ledger) if several else ""
    return Verdict(told, ship, tuple(decided), tuple(filter(None, more)), short)


def chosen(findings: Findings) -> float | None:
    """Return the sparsity to ship: the sweet spot, else the lowest."""
    if findings.sweet_spot is not None and findings.sweet_spot.sparsity is not None:
        return findings.sweet_spot.sparsity
    first = next((r for m in findings.main if (r := findings.result(m))), None)
    return first.sparsities[0] if first else None


def _happened(findings: Findings) -> str:
    """Return a sentence on the effect of sparsity on each kind of robustness and on accuracy, over the whole curve."""
    proved = [m for m in findings.collected if m.role == "verified" and m.split == "test"]
    measures = [*told(findings), *proved[len(proved) // 2 :][:1]]
    found = [result for measure in measures if (result := findings.result(measure))]
    lowest, highest = min(r.sparsities[0] for r in found), max(r.sparsities[-1] for r in found)
    over = " to ".join(dict.fromkeys(map(numbers.percent, (lowest, highest))))
    over += numbers.of_all(findings.study, findings.method or "", (lowest, highest))
    over_seeds = f"over {seeds_phrase(findings.seeds)}; the 95% intervals hold at all sparsities together"
    only = "for one seed; the 95% intervals cover images only, so another seed may change differently"
    return (
        f"As {subject(findings)} gets sparser (method “{findings.method}”, {over}), "
        f"{'; '.join(f'{_named(r.measure)} {_trend(r)}' for r in found)}. Changes are relative to the dense control, "
        f"{over_seeds if findings.seeds > 1 else only}."
    )


def _named(measure: Measure) -> str:
    """Return a metric's name as a sentence about robustness needs it: with its norm and budget."""
    norm, eps = NORMS.get(measure.norm, measure.norm), f", ε {pretty_eps(measure.eps)}" if measure.eps else ""
    if measure.role == "distance":
        r_2 = ", r_2" if measure.phrase == "r_2" else ""
        return f"the mean {norm} distance ({pretty(measure.label)}{r_2})"
    names = {
        "worst": "worst-case accuracy",
        "budget": f"accuracy under {pretty(measure.label)}",
        "verified": "the share of images verified as robust",
    }
    return f"{names[measure.role]} ({norm}{eps})" if measure.role in names else measure.short


def _trend(result: Result) -> str:
    """Describe where a metric rises and falls beyond intervals that hold at all sparsities together, and how much."""
    gains = result.simultaneous

    def most(side: int) -> str:
        k = max(range(len(gains)), key=lambda k: side * gains[k].estimate)
        gain = numbers.gain(result.measure, gains[k], result.control)
        return f"at {result.words(result.sparsities[k])}: {gain}"

    parts, largest = [], most(1 if max(gains, key=lambda e: abs(e.estimate)).estimate > 0 else -1)
    if len(result.seeds) == 1:
        parts.append(f"changes {'most ' if len(gains) > 1 else ''}{largest}")
    for verb, side in () if parts else (("rises", 1), ("falls", -1)):
        shown = [s for s, e in zip(result.sparsities, gains, strict=True) if (e.low if side > 0 else -e.high) > 0]
        if shown:
            told = most(side) if len(shown) == 1 else f"{_where(result, shown)} ({most(side)})"
            parts.append(f"{verb} {told}")
    lost = max(result.failed, default=0.0)
    doubt = f", although the search failed on up to {numbers.percent(lost)} of images" if lost > MANY_FAILED else ""
    return (" and ".join(parts) or f"is not shown to change ({largest})") + doubt


def _where(result: Result, shown: Sequence[float]) -> str:
    """Return "from 80% on" if it includes all higher sparsities, else "at" and their names."""
    rest = result.sparsities[result.sparsities.index(shown[0]) :]
    if tuple(shown) != rest:
        return f"at {numbers.span(shown, result.sparsities)}"
    return "at every sparsity" if rest == result.sparsities else f"from {numbers.percent(shown[0])} on"


def _at(findings: Findings) -> str:
    """Describe a network's size and each main metric's change."""
    sparsity = chosen(findings)
    if sparsity is None:
        return ""
    ratio = size_ratio(findings, sparsity)
    parts = [] if ratio is None else [f"{ratio:.1f}× smaller" if ratio >= 1.05 else "not smaller on disk"]
    for measure in told(findings, fgsm=True):
        found = findings.result(measure)
        if found and (one := found.gain(sparsity)):
            parts.append(f"{measure.phrase} {numbers.gain(measure, one, found.control)}")
    return f"At {_share(findings, sparsity)} sparsity: {', '.join(parts)}."


def _share(findings: Findings, sparsity: float) -> str:
    return numbers.sparsity(findings.study, findings.method or "", sparsity)


def told(findings: Findings, *, fgsm: bool = False) -> list[Measure]:
    """Return the metrics of the first sentences: the strongest attack, one distance, accuracy."""
    strongest = findings.first("worst") or findings.first("budget", "pgd", "apgd") or findings.first("budget")
    wanted = [strongest, findings.first("budget", "fgsm") if fgsm else None]
    wanted += [findings.first("distance", "deepfool") or findings.first("distance"), findings.first("accuracy")]
    return list(dict.fromkeys(m for m in wanted if m is not None and findings.result(m)))


def size_ratio(findings: Findings, sparsity: float) -> float | None:
    """Return how many times fewer bytes the headline's networks need at a sparsity, on average over seeds."""
    ratios = [
        dense / sparse
        for network in findings.study.of(findings.method or "", sparsity)
        if (dense := network.metric("bytes_dense"))
        and (sparse := network.metric("bytes_packed", "deploy") or network.metric("bytes_sparse"))
    ]
    return sum(ratios) / len(ratios) if ratios else None


def _ship(findings: Findings) -> str:
    """Return a paragraph on the sparsity to ship: its cost, what limits it, and what wider allowances would permit."""
    spot = findings.sweet_spot
    if spot is None:
        return _at(findings)
    allowed = ", ".join(f"{m.phrase} {_margin(m, d)}" for m, d in findings.margins.items())
    if findings.unwatched:
        unwatched = numbers.listed(m.phrase for m in findings.unwatched)
        allowed += f"; not checked, because searches failed or the control's mean is zero: {unwatched}"
    limit = next((m for m in findings.margins if m.slug == spot.limit), None)
    ends = f"{limit.phrase} is the limit" if limit else ""
    more = (
        ""
        if spot.at_most is None or spot.at_most == spot.sparsity
        else f"the data do not rule out {_share(findings, spot.at_most)}"
    )
    then = "; ".join(filter(None, [ends, more])) or "no higher sparsity was tested"
    if spot.at_most is None:
        first = f"Ship none of these: even the lowest sparsity loses more than allowed ({ends})"
    elif spot.sparsity is None:
        first = f"No sparsity is shown to stay within the allowed losses: {then}"
    else:
        name = f"{_share(findings, spot.sparsity)} sparsity, the sweet spot"
        first = f"Ship {name}: up to it, all losses stay within their allowances ({then})"
    wide = wider(findings)
    double = f" Twice these losses would allow {_share(findings, wide)}." if wide and wide != spot.sparsity else ""
    return f"{first}. {_at(findings)} Allowed losses: {allowed}.{double}"


def _short(findings: Findings, ledger: Sequence[Row]) -> str:
    """Return one line on what to ship and what is not known."""
    spot = findings.sweet_spot
    none = "none of these sparsities is shown to stay within the allowed losses"
    ship = none if spot is None or spot.sparsity is None else f"{_share(findings, spot.sparsity)} sparsity"
    measured = [row for row in ledger if row.claim.primary and row.effect is not None]
    undecided = sum(row.verdict == "undecided" for row in measured)
    return f"To ship: {ship}. Not known yet: {undecided} of {len(measured)} primary claims are undecided."


def wider(findings: Findings, factor: float = 2.0) -> float | None:
    """Return the sweet spot with each metric's margin multiplied."""
    watched = {m: r for m in findings.margins if (r := findings.result(m))}
    curves = {m.slug: r.gains for m, r in watched.items()}
    return sweet_spot(curves, {m.slug: factor * findings.margins[m] for m in watched}).sparsity if curves else None


def _margin(measure: Measure, margin: float) -> str:
    return f"{100 * margin:.3g} points" if measure.is_share else f"{-100 * math.expm1(-margin):.3g}%"


def _weak(findings: Findings) -> str:
    """Return a warning if no attack was strong."""
    if findings.first("worst") or findings.first("budget", "pgd", "apgd"):
        return ""
    if findings.first("budget", "fgsm"):
        return "No attack stronger than FGSM was run; a gain under FGSM alone is not evidence of robustness."
    return "No attack with a budget was run, so the study does not measure robust accuracy."


def _few(ledger: Sequence[Row]) -> str:
    """Return a sentence on the gains that few and more seeds can show: the last primary gain that can be reproduced."""
    primary = [row for row in ledger if row.claim.primary and row.question.effect is not None]
    gains = [row for row in primary if row.claim.expects == "above" and row.claim.unit == "points"]
    one = gains[-1].question.effect if gains else None
    if one is None or not 1 < one.seeds < INDICATIVE_BELOW or one.se == 0:
        return ""
    told = []
    for seeds in (one.seeds, INDICATIVE_BELOW, 2 * INDICATIVE_BELOW):
        least = minimum_detectable_effect(with_seeds(one, seeds), alpha=0.05 / len(primary))
        told.append(f"{numbers.amount(least, 'points') if least <= MOST_POINTS else 'none'} with {seeds}")
    return (
        f"Few seeds can show only large gains. For “{gains[-1].claim.text}” to be reproduced at a first look with a "
        f"probability of 80%, the true gain must be {numbers.listed(told)} seeds."
    )


def verdicts(ledger: Sequence[Row]) -> Iterator[str]:
    """Return the ledger's verdicts on the primary claims; those that were not measured come last, together."""
    primary = [row for row in ledger if row.claim.primary]
    for row in primary:
        if (e := row.effect) is not None:
            p = f"; {row.question.doubt}" if row.question.doubt else numbers.decisive(row)
            more = f"; a decision needs about {row.needed:,} seeds or more" if row.needed else ""
            text = row.claim.text[:1].upper() + row.claim.text[1:]
            yield f"{text}: {row.told} ({numbers.signed(e, row.claim.unit)}, {numbers.seeds(e.seeds)}{p}{more})."
    missed: dict[str, list[str]] = defaultdict(list)
    for row in primary:
        if row.effect is None:
            missed[row.why].append(row.claim.text)
    yield from (f"Not measured ({why}): {'; '.join(texts)}." for why, texts in missed.items())


def _alone(findings: Findings) -> str:
    """Return sentences on single curves, corrected only for their own sparsities."""
    found = [r for m in findings.main if m.role != "distance-correct" and (r := findings.result(m))]
    over = [(r, r.over_sparsified) for r in found if r.over_sparsified is not None and r.measure.role != "accuracy"]
    lost = ", ".join(f"{r.measure.phrase} from {_share(findings, s)} on" for r, s in over)
    unseen = [r for r in found if not any(r.gains.gains()) and not any(r.gains.losses())]
    parts = [f"losses above the allowance are shown for {lost}" if lost else "no loss is shown to exceed its allowance"]
    if unseen:
        parts.append(f"no change is shown for {', '.join(f'{r.measure.phrase} ({_least(r)})' for r in unseen)}")
    return f"Each curve taken alone (not a verdict): {'; '.join(parts)}."


def _least(result: Result) -> str:
    alpha = 0.05 / (len(result.sparsities) + result.gains.dropped)
    least = max(minimum_detectable_effect(e, alpha=alpha) for e in result.gains.effects)
    told = numbers.detectable(result.measure, result.control, least)
    return "none detectable" if told == "none" else f"detectable: {told}"


def _doubted(findings: Findings) -> str:
    """Return warnings of attacks that another attack contradicts."""
    if not findings.doubts:
        return ""
    where: dict[str, set[float]] = defaultdict(set)
    for doubt in findings.doubts:
        where[pretty(doubt.attack)].add(doubt.who[1])
    grid = sorted(set().union(*where.values()))
    attacks = numbers.listed(f"{attack} at {numbers.span(sorted(found), grid)}" for attack, found in where.items())
    networks = len({doubt.who for doubt in findings.doubts})
    count = "one network" if networks == 1 else f"{networks} networks"
    return f"Unreliable: {attacks} sparsity, on {count}; another attack contradicts these results (see Flags)."


def missing(study: Study) -> str:
    """Describe missing and failed tasks of a study, if any."""
    failed = sum(r.error is not None for r in study.records.values())
    parts = [f"{len(study.missing)} tasks have not finished"] if study.missing else []
    parts += [f"{failed} tasks failed"] if failed else []
    return f"Incomplete: {' and '.join(parts)}; the figures show the available results." if parts else ""


def methods(findings: Findings) -> str:
    """Return a methods paragraph, ready to paste."""
    seeds = numbers.seeds(findings.seeds)
    return (
        f"We trained {subject(findings)} with {seeds} and compared each pruned network with a dense control: the same "
        f"network, fine-tuned without pruning for the same number of steps with the same recipe. {_recipe(findings)}"
        f"{_attacks(findings)}Robust accuracy is the fraction of images that are classified correctly before and after "
        f"the attack. r_2 is the mean ℓ2 norm of DeepFool's perturbation, with 0 for misclassified images; it is "
        f"reported next to the mean over correctly classified images. Images on which a minimum-norm attack failed "
        f"count with the largest distance that any attack found in that norm. "
        f"Differences are paired by seed and by image. Their standard error is the closed form of the crossed "
        f"bootstrap, which draws the same images for all seeds. The 95% intervals use Student's quantiles and "
        f"Satterthwaite's degrees of freedom; p-values use one degree of freedom less than the number of seeds. "
        f"Distances are compared by the logarithm of the ratio of means. The p-values of a curve's sparsities are "
        f"corrected by Holm's method. A peak is reported only if the ledger reproduces a gain; it is the set of "
        f"sparsities that are not significantly worse than the best (joint bootstrap draws). A metric is "
        f"over-sparsified from the first sparsity at which it is shown to lose more than its margin, if this holds "
        f"at all higher sparsities. The sweet spot is the highest sparsity up to which the lower bound of every "
        f"watched metric stays within its allowance."
    )


_LOSSES = {
    "pgd-at": "PGD adversarial training",
    "trades": "TRADES",
    "ibp": "certified training by IBP",
    "crown-ibp": "certified training by CROWN-IBP",
}


def _recipe(findings: Findings) -> str:
    """Describe how networks were trained; empty if the plan has no recipe or no networks."""
    plan = findings.study.plan
    recipe, finetune, training, model = (plan.get(name) for name in ("recipe", "finetune", "training", "model"))
    if not (findings.collected and isinstance(training, dict)):
        return ""
    given = isinstance(model, dict) and model.get("weights") is not None
    first = "The dense network was given" if given else f"Training took {_epochs(recipe)}"
    said = f"{first}; fine-tuning took {_epochs(finetune)}"
    name = _LOSSES.get(str(training.get("loss")))
    if name is None:
        return f"{said}. "
    norm, eps, steps, ramp = (training.get(key) for key in ("norm", "eps", "steps", "ramp"))
    grown = f"; ε grew to its value over a fraction of {ramp} of the dense network's training"
    inner = f", {steps} steps" if training["loss"] in ("pgd-at", "trades") else ""
    said += f", with {name} ({NORMS.get(str(norm), norm)}, ε = {eps}{inner})"
    return f"{said}{'' if ramp is None or given else grown}. "


_OPTIMIZERS = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}


def _epochs(recipe: object) -> str:
    told = recipe if isinstance(recipe, dict) else {}
    epochs, optimizer, lr, decay, batch = (
        told.get(name, "?") for name in ("epochs", "optimizer", "lr", "weight_decay", "batch_size")
    )
    optimizer = _OPTIMIZERS.get(optimizer, optimizer)
    return f"{epochs} epochs ({optimizer}, learning rate {lr}, weight decay {decay}, batch size {batch})"


def _attacks(findings: Findings) -> str:
    """Describe which attacks ran on how many test images."""
    met: dict[int, list[str]] = {}
    for measure, held in findings.collected.items():
        if measure.role in ("budget", "distance") and measure.split == "test" and measure.name != "smallest" and held:
            met.setdefault(max(len(one.images) for one in held.values()), []).append(measure.short)
    parts = [f"{count:,} by {', '.join(dict.fromkeys(met[count]))}" for count in sorted(met, reverse=True)]
    return f"Number of test images that were attacked per network: {'; '.join(parts)}. " if parts else ""


def bibtex(findings: Findings) -> str:
    """Return the entries to cite."""
    version = str(findings.study.environment.get("sparring") or "0.1.0")
    return f"""@software{{sparring,
  title = {{sparring: how sparsity changes a neural network's adversarial robustness}},
  version = {{{version}}},
  year = {{2026}}
}}
@inproceedings{{guo2018sparse,
  title = {{Sparse {{DNN}}s with Improved Adversarial Robustness}},
  author = {{Guo, Yiwen and Zhang, Chao and Zhang, Changshui and Chen, Yurong}},
  booktitle = {{Advances in Neural Information Processing Systems}},
  year = {{2018}}
}}
@inproceedings{{moosavi2016deepfool,
  title = {{{{DeepFool}}: a simple and accurate method to fool deep neural networks}},
  author = {{Moosavi-Dezfooli, Seyed-Mohsen and Fawzi, Alhussein and Frossard, Pascal}},
  booktitle = {{IEEE Conference on Computer Vision and Pattern Recognition}},
  year = {{2016}}
}}"""
