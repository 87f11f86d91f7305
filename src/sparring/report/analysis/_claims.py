"""The claims of the ledger, and the comparison of a study that tests each of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from ...records import Kind
from ...statistics import Claim, Effect, Expects, Origin, Question, Row, ask, effect, no_gain
from .. import _numbers as numbers
from ._comparisons import gap
from ._cross_checks import suspicion
from ._findings import MANY_FAILED, ChosenGain, Findings, Result, choose, difference, margins_of, paired
from ._looks import judge_study
from ._metrics import NORMS, TRANSFER, Measure, PerImage, common, parts, pretty, pretty_eps, values
from ._records import Who

MARGIN = 2.0  # points or %: an effect that does not matter
DENSE: tuple[Kind, ...] = ("control", "reference")
# Claims about other methods: whether they gain too, or whether the headline's method gains more.
ITSELF: dict[Kind, str] = {
    "random": "random masks gain r_inf too",
    "channels": "pruning whole channels or filters gains r_inf too",
    "wide sparse": "a wider network, pruned to as many weights as the dense one has, gains r_inf",
}
OVER_IT: dict[Kind, str] = {
    "small dense": "the gain exceeds that of a dense network of equal size",
    "tuned decay": "the gain exceeds that of tuned weight decay",
}


def ledger(findings: Findings) -> list[Row]:
    """Return the claims that this study can test, each with its test, numbers and verdict."""
    return judge_study(findings.study, claims(findings))


def claims(findings: Findings) -> list[Question]:
    """Return the claims that this study can test, not yet judged; the paper's own are primary.

    Primary are the gain in ℓ∞ and ℓ2 at an appropriate sparsity, the loss of over-sparsified networks, and that the
    ℓ∞ gain survives the strongest attack. The plan fixes them before anything is run.
    """
    fgsm, r_2 = findings.first("budget", "fgsm"), findings.r_2
    asked: list[Question] = []
    if findings.method is not None:
        place = places(findings, findings.method)
        for measure, label in ((fgsm, "r_inf (FGSM)"), (r_2, "r_2 (DeepFool)")):
            if (result := findings.result(measure)) is not None:
                asked.append(_gain(findings, result, place, label))
        asked += _losses(findings, place)
    headline = findings.result(fgsm)
    if headline is not None:
        choice = choose(findings, headline, within=places(findings, headline.method).appropriate)
        asked += _survival(findings, headline)
        asked += _fine_tuning(findings, headline)
        asked += _other_methods(findings, headline, choice)
    asked += _chosen_weights(findings)
    asked += _activations(findings, fgsm)
    asked += _proofs(findings)
    asked += _verified(findings)
    asked += _transfers(findings)
    return asked


def has_linear_model(findings: Findings) -> bool:
    """Return whether the study's model is linear."""
    model = findings.study.plan.get("model")
    return (model.get("name") if isinstance(model, dict) else model) == "linear"


def _gain(findings: Findings, result: Result, place: Place, label: str) -> Question:
    """Yield claims of a gain at an appropriate sparsity; for linear networks the paper claims none in r_2."""
    none = has_linear_model(findings) and result.measure.role == "distance"
    kind = "linear" if has_linear_model(findings) else "nonlinear"
    text = f"linear networks gain no {label}" if none else f"{kind} networks gain {label} at an appropriate sparsity"
    choice = choose(findings, result, within=place.appropriate)
    claim = says("gain", text, "not above" if none else "above", primary=True, origin="paper")
    return at_choice(findings, result, choice, claim)


def _losses(findings: Findings, place: Place) -> Iterator[Question]:
    """Yield claims of losses of over-sparsified networks at the plan's highest sparsity; primary at one eps."""
    primary = [findings.first("budget", "fgsm"), findings.first("worst"), findings.r_2]
    others = [
        m
        for m in findings.collected
        if m.split == "test" and m not in primary and not m.naive
        if m.role == "worst" or (m.role, m.name, m.norm) == ("budget", "fgsm", "linf")
    ]
    for measure in (*primary, *others):
        result = findings.result(measure)
        if measure is None or result is None:
            continue
        what = "r_inf (FGSM)" if measure.role == "budget" else "r_2 (DeepFool)"
        what = f"accuracy under {attacks_of(findings, measure)}" if measure.role == "worst" else what
        text = f"over-sparsified networks lose {what}"
        if measure not in primary:
            text += f" at ε = {pretty_eps(measure.eps)}"
        claim = says("loss", text, "below", primary=measure in primary, origin="paper")
        known = [s for s in place.over if s in result.sparsities]
        if not known:
            claim = replace(claim, margin=0.0, unit=numbers.gain_unit(measure))
            yield unasked(claim, measure, "no sparsity of the plan is over-sparsified")
            continue
        yield at_sparsity(findings, result, known[-1], claim)
        if measure in primary:
            yield from _on_correct(findings, result, known[-1], text)


def _on_correct(findings: Findings, result: Result, sparsity: float, text: str) -> Iterator[Question]:
    """Yield the claim of a loss on the images that both networks classify correctly, which excludes plain accuracy."""
    sides = [_correct_too(findings, result, sparsity, seed) for seed in result.seeds]
    known = {k: pair for k, pair in zip(result.seeds, sides, strict=True) if pair is not None}
    if known:
        one = paired(findings, result.measure, *({k: pair[side] for k, pair in known.items()} for side in (0, 1)))
        test = f"{result.method} at {result.words(sparsity)} − dense control"
        metric = f"{result.measure.phrase} where both are correct"
        sparse = [(result.method, sparsity, seed) for seed in known]
        claim = says("loss where both are correct", f"{text}, among images that both classify correctly", "below")
        yield about(findings, result, replace(claim, test=test, metric=metric), one, sparse)


def _correct_too(findings: Findings, result: Result, sparsity: float, seed: int) -> tuple[PerImage, PerImage] | None:
    """Return a metric of a sparse network and its dense control on the images that both classify correctly."""
    whos = [(result.method, sparsity, seed), (findings.study.control(result.method), 0.0, seed)]
    held, right = findings.collected[result.measure], findings.collected.get(Measure("accuracy"), {})
    if not all(who in held and who in right for who in whos):
        return None
    images = common([part[who].images for part in (held, right) for who in whos])
    both = right[whos[0]].at(images).top * right[whos[1]].at(images).top
    first, second = (PerImage(images, held[who].at(images).top * both, both) for who in whos)
    return first, second


def _survival(findings: Findings, fgsm: Result) -> Iterator[Question]:
    """Yield the claims that the gain at FGSM's best sparsity survives stronger attacks, the strongest first."""
    within = places(findings, fgsm.method).appropriate
    wanted = [findings.first("worst"), findings.first("budget", "pgd", "apgd")]
    for k, measure in enumerate(m for m in wanted if m is not None):
        result = findings.result(measure)
        if result is not None:
            text = f"the gain survives {attacks_of(findings, measure)}"
            choice = choose(findings, result, by=fgsm, within=within)
            yield at_choice(findings, result, choice, says("survival", text, primary=k == 0, origin="paper"))


def _fine_tuning(findings: Findings, fgsm: Result) -> Iterator[Question]:
    """Yield the claim that part of a gain over the network as trained is due to fine-tuning."""
    control, reference = (findings.study.control(fgsm.method, kind) for kind in DENSE)
    one = difference(findings, fgsm.measure, (control, 0.0), (reference, 0.0))
    if one is not None:
        claim = says("fine-tuning", "fine-tuning alone, without pruning, does not change r_inf", "none")
        claim = replace(claim, test="dense control − the network as trained")
        yield about(findings, fgsm, claim, one, [(reference, 0.0, seed) for seed in fgsm.seeds])


def _other_methods(findings: Findings, fgsm: Result, choice: ChosenGain | None) -> Iterator[Question]:
    """Yield claims that other ways to a sparse or small network have the gain too."""
    for method in (m for m in _comparable(findings) if m != fgsm.method):
        kind = findings.study.kind(method)
        if kind in ITSELF:
            result = findings.result(fgsm.measure, method)
            if result is not None:
                yield at_choice(findings, result, choose(findings, result), says("gain", f"{ITSELF[kind]} ({method})"))
        elif kind in OVER_IT and choice is not None:
            claim = says(f"over {method}", f"{OVER_IT[kind]} ({method})")
            yield from _against(findings, fgsm, choice, method, claim)


def _against(findings: Findings, fgsm: Result, choice: ChosenGain, method: str, claim: Claim) -> Iterator[Question]:
    """Compare the headline's networks with another method's at its sparsity nearest to the first seed's."""
    held = findings.collected[fgsm.measure]
    nearest = min(findings.study.sparsities(method), key=lambda s: abs(s - choice.sparsities[0]))
    chosen = dict(zip(fgsm.seeds, choice.sparsities, strict=True))
    mine = {k: held[fgsm.method, s, k] for k, s in chosen.items() if (fgsm.method, s, k) in held}
    theirs = {k: held[method, nearest, k] for k in chosen if (method, nearest, k) in held}
    one = paired(findings, fgsm.measure, mine, theirs)
    if one is not None:
        told = f"{fgsm.method} at {fgsm.words(*sorted(set(choice.sparsities)))} − {method}"
        told += f" at {numbers.sparsity(findings.study, method, nearest)}" if nearest else ""
        sides = [*((fgsm.method, s, k) for k, s in chosen.items()), *((method, nearest, k) for k in chosen)]
        yield about(findings, fgsm, replace(claim, test=told), one, sides, choices=choice.choices)


def _chosen_weights(findings: Findings) -> Iterator[Question]:
    """Yield the claim that it matters which weights stay: pruned against random masks at the highest sparsity."""
    accuracy = findings.first("accuracy")
    masks = [m for m in _comparable(findings) if findings.study.kind(m) == "random"]
    for method in (m for m in _comparable(findings) if masks and findings.study.kind(m) in ("pruned", "surgery")):
        result = findings.result(accuracy, masks[0])
        shared = set(findings.study.sparsities(method)).intersection(result.sparsities if result else ())
        one = None
        if accuracy is not None and shared:
            one = difference(findings, accuracy, (method, max(shared)), (masks[0], max(shared)))
        if one is not None and result is not None:
            share = numbers.sparsity(findings.study, method, max(shared))
            test = f"{method} − {masks[0]}, both at {share}"
            text = f"chosen weights keep more accuracy than random ones ({method})"
            sides = [(m, max(shared), n.seed) for m in (method, masks[0]) for n in findings.study.of(m, max(shared))]
            claim = says(f"chosen weights, {method}", text)
            yield about(findings, result, replace(claim, test=test), one, sides)


def _comparable(findings: Findings) -> list[str]:
    """Return the methods at the same checkpoint (final or best epoch) as the headline's."""
    study = findings.study
    return [m for m in study.methods if study.checkpoint(m) == study.checkpoint(findings.method)]


def _activations(findings: Findings, fgsm: Measure | None) -> Iterator[Question]:
    """Yield claims that each method with sparse activations gains, also in the worst case, and what BPDA removes."""
    for method in (m for m in _comparable(findings) if findings.study.kind(m) == "activations"):
        for measure in (fgsm, findings.first("worst")):
            result = findings.result(measure, method)
            if measure is not None and result is not None:
                text = f"activation sparsity gains robustness under {attacks_of(findings, measure)} ({method})"
                claim = says("activation gain", text, origin="later work")
                yield at_choice(findings, result, choose(findings, result), claim)
        for measure in (m for m in findings.collected if m.role == "budget" and m.naive):
            naive = findings.result(measure, method)
            honest = findings.result(replace(measure, naive=False), method)
            if naive is not None and honest is not None:
                name = pretty(honest.measure.attack)
                text = f"activation sparsity's gain under naive {name} survives BPDA ({method})"
                choice = choose(findings, honest, by=naive)
                if choice is not None:
                    claim = says("naive gain", text, origin="later work")
                    yield at_choice(findings, honest, choice, claim)


def _proofs(findings: Findings) -> Iterator[Question]:
    """Yield claims that certified robustness, not only robustness under attack, grows with sparsity."""
    for measure in (m for m in findings.collected if m.role in ("certified", "lipschitz", "ratio")):
        result = findings.result(measure)
        if result is None:
            continue
        norm = NORMS.get(measure.norm, measure.norm)
        if measure.role == "lipschitz":
            text = f"the {norm} Lipschitz constant falls with sparsity (here: the sparsest; {measure.attack})"
            claim = says("fall", text, "below", origin="paper")
            yield at_sparsity(findings, result, result.sparsities[-1], claim)
        else:
            what = f"certified {norm} radius" if measure.role == "certified" else f"{norm} margin / Lipschitz constant"
            choice = choose(findings, result, within=places(findings, result.method).appropriate)
            text = f"the {what} rises at an appropriate sparsity ({measure.attack})"
            origin: Origin = "paper" if measure.role == "ratio" else "this project"
            yield at_choice(findings, result, choice, says("rise", text, origin=origin))


def _verified(findings: Findings) -> Iterator[Question]:
    """Yield claims that sparse networks are easier to verify, and separately that they are more robust."""
    for measure in (m for m in findings.collected if m.role == "verified"):
        result, stable = findings.result(measure), findings.result(replace(measure, role="stable"))
        if result is None or stable is None:
            continue
        kept = [s for s in places(findings, result.method).appropriate if s in result.sparsities]
        at = f"{NORMS.get(measure.norm, measure.norm)} ε = {pretty_eps(measure.eps)}"
        choice = choose(findings, result, within=kept)
        text = f"sparse networks are easier to verify: more images are verified at the same budget ({at})"
        yield at_choice(findings, result, choice, says("verified", text, origin="later work"))
        if choice is not None:
            yield _separated(findings, result, choice, kept, at)
        text = f"weight sparsity leaves fewer ReLUs unstable ({at})"
        sparsity = kept[-1] if kept else stable.sparsities[-1]
        yield at_sparsity(findings, stable, sparsity, says("stable", text, origin="later work"))


def _separated(findings: Findings, result: Result, choice: ChosenGain, kept: Sequence[float], at: str) -> Question:
    """Yield the claim that robust accuracy rises, however undecided images turn out: brackets must separate.

    A gain is tested by its lower end, evidence against one by the largest upper end at any sparsity.
    """
    text = f"robust accuracy rises at an appropriate sparsity, by proof: the brackets separate ({at})"
    told = result.words(*sorted(set(choice.sparsities)))
    test = f"{result.method} at {told}: verified − not falsified of the dense control (the best of {choice.choices})"
    metric = f"robust accuracy, {at}"
    claim = replace(says("verified robust", text), test=f"{metric}, {test}", metric=metric)
    ends = {s: gap(findings, result.measure, (result.method, s)) for s in kept}
    most = [e[1].scaled(100.0) for e in ends.values() if e is not None]
    one = ends[choice.sparsities[0]]
    if one is None or len(most) < len(kept) or len(set(choice.sparsities)) > 1:
        return unasked(claim, result.measure, "no pairs of networks at one sparsity")
    asked = ask(claim, one[0].scaled(100.0), choices=choice.choices)
    if asked.effect is None or asked.effect.seeds == 1:
        return asked
    against = max(e.p for e in most) if all(e.estimate < 0 for e in most) else 1.0
    p = asked.p if asked.effect.estimate > 0 else 1.0  # a lower end below zero does not prove a loss
    small = max(no_gain(e, claim.limit) for e in most)
    if result.gains.dropped:
        small = against = math.nan
    return replace(asked, p=p, p_small=small, p_against=against, p_done=1.0)


def _transfers(findings: Findings) -> Iterator[Question]:
    """Yield claims that most examples transfer, at the highest appropriate sparsity with records, else the lowest."""
    for measure in (m for m in findings.collected if m.role in TRANSFER):
        held = {who: one for who, one in findings.collected[measure].items() if one.bottom.any()}
        tried = sorted({sparsity for method, sparsity, _ in held if method == findings.method})
        if not tried or findings.method is None:
            continue
        kept = [s for s in tried if s in places(findings, findings.method).appropriate]
        sparsity = kept[-1] if kept else tried[0]
        seeds = [one for who, one in sorted(held.items()) if who[:2] == (findings.method, sparsity)]
        images = common([one.images for one in seeds])
        if len(images) < 2 or not all(one.at(images).bottom.any() for one in seeds):
            continue
        told = numbers.sparsity(findings.study, findings.method, sparsity)
        way = "dense → sparse" if measure.role == "to sparse" else "sparse → dense"
        text = f"adversarial examples transfer {way} (most of them fool the other network too)"
        test = f"{measure.title}, {findings.method} at {told}: share of those that could − 50%"
        one = effect(values(seeds, images) - 0.5).scaled(100.0).priced(findings.study.looks.price)
        metric = f"{pretty(measure.label)} examples that transfer {measure.role}"
        claim = says(f"transfer {measure.slug} {findings.method}", text)
        yield ask(replace(claim, test=test, metric=metric), one)


# -- a comparison as a question: its unit, its margin, and whether its attacks are reliable ---------------------------


@dataclass(frozen=True)
class Place:
    """A method's sparsities by accuracy, determined before robustness is seen.

    `appropriate`: accuracy within the plan's margin of the dense control's; `over`: from the first sparsity that loses
    more than the second margin on. `split` says on which images ("" if accuracy was not measured).
    """

    appropriate: tuple[float, ...]
    over: tuple[float, ...]
    split: str


def places(findings: Findings, method: str) -> Place:
    """Classify a method's sparsities by validation accuracy (or by test accuracy, if there is no other)."""
    margins = margins_of(findings.study)
    for split in ("valid", "test"):
        result = findings.result(Measure("accuracy", split), method)
        if result is not None:
            gains = {s: result.gains.at(s).estimate for s in result.sparsities}
            kept = tuple(s for s, gain in gains.items() if gain >= -margins["accuracy"])
            lost = [k for k, gain in enumerate(gains.values()) if gain < -margins["over_sparsified"]]
            return Place(kept, result.sparsities[lost[0] :] if lost else (), split)
    return Place((), (), "")


def attacks_of(findings: Findings, measure: Measure) -> str:
    """Return the names of the attacks behind a measure: "FGSM, PGD-40 and fast"."""
    return numbers.listed(pretty(m.label) for m in parts(findings.collected, measure))


def says(
    kind: str, text: str, expects: Expects = "above", *, primary: bool = False, origin: Origin = "this project"
) -> Claim:
    """Return a claim without a test; its key is the kind of claim, to which a test adds its own."""
    return Claim(text, expects, MARGIN, "points", "", primary=primary, origin=origin, key=kind)


def unasked(claim: Claim, measure: Measure, why: str) -> Question:
    """Return a claim about a metric as a question that this study does not answer."""
    key = f"{claim.key} {measure.slug}"
    return replace(ask(replace(claim, test=measure.phrase, metric=measure.phrase, key=key), None), unknown=why)


def at_choice(findings: Findings, result: Result, choice: ChosenGain | None, claim: Claim) -> Question:
    """Return the question whether a method gains over the dense control at a chosen sparsity, or None."""
    if choice is None:
        margin = margins_of(findings.study)["accuracy"]
        return unasked(claim, result.measure, f"no sparsity loses at most {100 * margin:.3g} points of accuracy")
    chosen = sorted(set(choice.sparsities))
    how = "for each seed the sparsity that the other seeds chose on validation images"
    if choice.choices > 1 or len(result.seeds) == 1:
        how = f"the best of {choice.choices}, corrected for all of them"
    claim = replace(claim, test=f"{result.method} at {result.words(*chosen)} ({how}) − dense control")
    sparse = [(result.method, s, seed) for seed, s in zip(result.seeds, choice.sparsities, strict=True)]
    question = about(findings, result, claim, choice.effect, sparse, curve=choice.curve, choices=choice.choices)
    question = replace(question, failed=result.failures(chosen), gain=(result.measure.slug, result.method))
    if not result.gains.dropped:
        return question
    gone = "whether it is so at the sparsities that the plan dropped"
    return replace(question, p_small=math.nan, p_against=math.nan, unknown=gone)


def at_sparsity(findings: Findings, result: Result, sparsity: float, claim: Claim) -> Question:
    """Return the question of a method's gain over the dense control at a sparsity that was not chosen by results."""
    claim = replace(claim, test=f"{result.method} at {result.words(sparsity)} − dense control")
    sparse = [(result.method, sparsity, seed) for seed in result.seeds]
    question = about(findings, result, claim, result.gain(sparsity), sparse)
    return replace(question, failed=result.failures([sparsity]))


def about(
    findings: Findings,
    result: Result,
    claim: Claim,
    one: Effect | None,
    sparse: Iterable[Who],
    *,
    curve: Sequence[Effect] = (),
    choices: int = 1,
) -> Question:
    """Return the question about one effect in a result's unit; unreliable if its attacks are on any network."""
    unit = numbers.gain_unit(result.measure, result.control)
    absolute = unit == numbers.ABSOLUTE  # the control's mean is zero, so there is no margin
    metric = claim.metric or result.measure.phrase
    margin, test = 0.0 if absolute else MARGIN, f"{metric}, {claim.test}"
    key = f"{claim.key} {result.measure.slug} {result.method}"
    claim = replace(claim, margin=margin, unit=unit, test=test, log=unit == "%", metric=metric, key=key)
    scale = 1.0 if absolute else 100.0
    sparse = list(sparse)
    whos = {*sparse, *((findings.study.control(method), 0.0, seed) for method, _, seed in sparse)}
    doubt = suspicion(findings.study, findings.collected, findings.doubts, result.measure, whos)
    if not doubt and max(result.failures([s for _, s, _ in sparse if s in result.sparsities])) > MANY_FAILED:
        doubt = f"the search failed on more than {MANY_FAILED:.0%} of images"
    scaled = [e.scaled(scale) for e in curve]
    return ask(claim, None if one is None else one.scaled(scale), curve=scaled, choices=choices, doubt=doubt)


# -- the one claim of the paper that needs two studies: nonlinear networks gain more in ℓ2 than linear ones ---------

TEXT = "nonlinear networks gain more r_2 (DeepFool) than linear ones at matched accuracy loss"


def across(found: Sequence[Findings]) -> Iterator[tuple[str, Question]]:
    """Yield the claim for every nonlinear and linear study of the same data, with both studies' names.

    Asked at the nonlinear networks' highest appropriate sparsity and at the linear ones' whose loss of accuracy is
    nearest to theirs there, so that neither was chosen by robustness; paired by image, and seed by seed in their order.
    """
    for one in (f for f in found if not has_linear_model(f)):
        for other in (f for f in found if has_linear_model(f) and f.study.data == one.study.data):
            question = _question(one, other)
            if question is not None:
                yield f"{one.study.name} and {other.study.name}", question


def _question(one: Findings, other: Findings) -> Question | None:
    measure = one.r_2
    first, second = one.result(measure), other.result(measure)
    if measure is None or first is None or second is None or first.images != second.images:
        return None
    kept = [s for s in places(one, first.method).appropriate if s in first.sparsities]
    losses = _accuracy_losses(other, second.sparsities)
    if not kept or not losses or any(numbers.gain_unit(measure, r.control) != "%" for r in (first, second)):
        return None
    wanted = _accuracy_losses(one, kept)[kept[-1]]
    nearest = min(losses, key=lambda s: (abs(losses[s] - wanted), abs(s - kept[-1])))
    sides = ((one, first, kept[-1]), (other, second, nearest))
    seeds = min(len(first.seeds), len(second.seeds))
    gains = [r.gains.differences[r.sparsities.index(s)][:seeds] for _, r, s in sides]
    doubts = [
        suspicion(f.study, f.collected, f.doubts, measure, {(r.method, s, k), (f.study.control(r.method), 0.0, k)})
        for f, r, s in sides
        for k in r.seeds
    ]
    mine, theirs = (f"{f.study.name} at {numbers.percent(s)}" for f, _, s in sides)
    test = f"r_2, {mine} − {theirs}"
    claim = Claim(TEXT, "above", MARGIN, "%", test, log=True, origin="paper", metric="r_2")
    gained = effect(gains[0] - gains[1]).scaled(100.0).priced(max(f.study.looks.price for f in (one, other)))
    return ask(claim, gained, doubt=", ".join({d for d in doubts if d}))


def _accuracy_losses(findings: Findings, sparsities: Sequence[float]) -> dict[float, float]:
    """Return the networks' losses of accuracy against the dense control, on the images of `places`."""
    split = places(findings, findings.method or "").split
    result = findings.result(Measure("accuracy", split)) if split == "valid" or split == "test" else None
    if result is None:
        return {}
    return {s: -result.gains.at(s).estimate for s in sparsities if s in result.sparsities}
