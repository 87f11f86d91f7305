"""Lower random models, and count the graphs that are not the model and the certificates that an image refutes.

    python benchmarks/lowering.py [--json] [--models 1000] [--seed 0] [--workers 2] [--plant KIND] [--only INDEX]

Every model is a chain of steps in one of the ways that people write them (random_steps.py); its images have at most 6
values, so that a dense sample sees the whole box. The judge knows nothing of sparring's own comparisons: it asks the
model at the corners and inside of the box, in batches and one image at a time, in another order, with and without
gradients, twice, and asks the graph the same. Each model is counted once:

    equal      lowered, and every logit is the model's
    refused    not lowered, by an error that sparring raises on purpose
    different  lowered, but the logits differ on more than 1% of the inputs, or the model was changed
    unsound    equal, but a certified radius (interval and CROWN, linf and l2) is above the distance of an input that
               the model itself assigns to another class
    crashed    any other exception

The exit code is 1 if one is different, unsound or crashed. `--plant` puts a fault into the lowering, which has to be
counted; `--only INDEX` prints one model's source and what was found; `--list` prints the operations and faults.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from judge import captured_once, certificates_refuted, differences
from planted import FAULTS, planted
from random_lowered import LOWERED
from random_models import RandomModel, build, draft_model
from random_oddities import ENDINGS, ODD
from random_steps import BOUNDED
from sparring import graph
from sparring.errors import UserError

OUTCOMES = ("equal", "refused", "different", "unsound", "crashed")
FAILURES = ("different", "unsound", "crashed")
SUPPORTED = BOUNDED | LOWERED  # named in docs/graph.md, which a test compares
SHARE = 0.3  # of all models, those that hold something that has no rule or is no function of one image
_PER_PROCESS = 250  # models, after which a worker is replaced: torch.export keeps some memory of every one


@dataclass(frozen=True)
class Finding:
    """What became of one model; `certified` counts the radii above zero that were tried."""

    index: int
    steps: tuple[str, ...]
    outcome: str
    detail: str
    certified: int
    seconds: float

    @property
    def supported(self) -> bool:
        return set(self.steps) <= set(SUPPORTED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    parser.add_argument("--models", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--plant", choices=FAULTS, help="put this fault into the lowering")
    parser.add_argument("--only", type=int, metavar="INDEX", help="show one model and what becomes of it")
    parser.add_argument("--list", action="store_true", help="list the supported operations and the faults")
    options = parser.parse_args()
    if options.list:
        print("supported:", *SUPPORTED, sep="\n  ")
        print("faults:", *(f"{name}: {fault.means}" for name, fault in FAULTS.items()), sep="\n  ")
    elif options.only is not None:
        show(options.seed, options.only, options.plant)
    else:
        findings = examine_all(options.models, options.seed, options.workers, options.plant)
        tally = summary(findings)
        print(json.dumps(tally) if options.json else in_words(tally))
        sys.exit(any(tally[name] for name in FAILURES))


def examine_all(models: int, seed: int, workers: int, plant: str | None = None) -> list[Finding]:
    """Examine the models 0, 1, ... of a seed; what is found does not depend on the number of workers."""
    task = partial(examine, seed, plant=plant)
    if workers <= 1:
        return [task(index) for index in range(models)]
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, maxtasksperchild=_PER_PROCESS) as pool:
        return list(pool.imap(task, range(models)))


def drawn(seed: int, index: int) -> RandomModel:
    return draft_model(seed, index, SUPPORTED, ODD, ENDINGS, share=SHARE, rare=LOWERED)


def examine(seed: int, index: int, plant: str | None = None) -> Finding:
    """Draw one model, lower it and judge what came of it."""
    torch.set_num_threads(1)
    drawing = drawn(seed, index)
    start = time.process_time()
    with warnings.catch_warnings(), planted(plant), captured_once():
        warnings.simplefilter("ignore")
        outcome, detail, certified = judged(drawing)
    return Finding(index, drawing.steps, outcome, detail, certified, time.process_time() - start)


def judged(drawing: RandomModel) -> tuple[str, str, int]:
    """Return the outcome, what there is to say of it, and the number of certificates tried."""
    try:
        model, fresh = build(drawing), build(drawing)
        try:
            lowered = graph.lower(model, drawing.shape)
        except UserError as error:
            return "refused", str(error), 0
        if found := differences(lowered, model, fresh, drawing.shape):
            return "different", "; ".join(found), 0
        found, certified = certificates_refuted(model, drawing.shape)
        return ("unsound" if found else "equal"), "; ".join(found), certified
    except Exception as error:  # whatever it is, it is a fault of the lowering
        return "crashed", f"{type(error).__name__}: {error}", 0


def summary(findings: list[Finding]) -> dict[str, Any]:
    """Count the outcomes; shares are of all models and of those made of supported operations alone."""
    count = Counter(finding.outcome for finding in findings)
    supported = [finding for finding in findings if finding.supported]
    lowered = [finding for finding in findings if finding.outcome in ("equal", "different", "unsound")]
    within = [finding for finding in lowered if finding.supported]
    return {
        "models": len(findings),
        **{outcome: count[outcome] for outcome in OUTCOMES},
        "lowered": round(len(lowered) / max(1, len(findings)), 4),
        "supported_models": len(supported),
        "supported_lowered": round(len(within) / max(1, len(supported)), 4),
        "certified": sum(finding.certified for finding in findings),
        "seconds": round(sum(finding.seconds for finding in findings), 1),
        "supported": list(SUPPORTED),
        "failures": [asdict(finding) for finding in findings if finding.outcome in FAILURES],
        "refused_though_supported": [asdict(finding) for finding in supported if finding.outcome == "refused"],
    }


def in_words(tally: dict[str, object]) -> str:
    lines = [", ".join(f"{tally[name]} {name}" for name in ("models", *OUTCOMES))]
    lines += [f"{name}: {tally[name]}" for name in ("lowered", "supported_models", "supported_lowered", "seconds")]
    for name in ("failures", "refused_though_supported"):
        lines += [f"{name}:"] * bool(tally[name])
        lines += [f"  {f['index']} {f['outcome']}: {f['detail']}" for f in tally[name]]  # type: ignore[attr-defined]
    return "\n".join(lines)


def show(seed: int, index: int, plant: str | None) -> None:
    """Print a model's source, the shape of its images and what was found."""
    drawing, finding = drawn(seed, index), examine(seed, index, plant)
    print(f"# images of shape {drawing.shape}{drawing.source}")
    print(f"# {'; '.join(drawing.steps)}\n# {finding.outcome}: {finding.detail}")


if __name__ == "__main__":
    main()
