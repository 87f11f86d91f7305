"""Show what a stronger attack takes away from a weaker one: both on the very images that both attacked.

    python benchmarks/gaps.py out/robust-lenet-300-100-eps-0.2 fast standard

prints a row for each network, averaged over the seeds that both attacked, at every budget that they share.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

from sparring.report.analysis._metrics import Measure, PerImage, collect, common
from sparring.report.analysis._records import load


def shares(one: PerImage, other: PerImage) -> tuple[float, float, int]:
    """Return the share of the common images that stands under each of two attacks, and how many images these are."""
    images = common([one.images, other.images])
    return float((one.at(images).top > 0).mean()), float((other.at(images).top > 0).mean()), len(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("weak")
    parser.add_argument("strong")
    options = parser.parse_args()
    budgets: dict[tuple[str, float | None], dict[str, Measure]] = defaultdict(dict)
    collected = collect(load(options.out))
    for measure in collected:
        if measure.role == "budget" and measure.split == "test":
            budgets[measure.norm, measure.eps][measure.attack] = measure
    for (norm, eps), by_name in budgets.items():
        if not {options.weak, options.strong} <= by_name.keys():
            continue
        weak, strong = (collected[by_name[name]] for name in (options.weak, options.strong))
        found = defaultdict(list)
        for who in sorted(weak.keys() & strong.keys()):
            found[who[:2]].append(shares(weak[who], strong[who]))
        print(f"{norm}, eps {eps:g}: % standing under {options.weak}, {options.strong}; images, seeds")
        for (method, sparsity), rows in found.items():
            first, second = (100 * sum(row[k] for row in rows) / len(rows) for k in (0, 1))
            print(f"  {method:28} {sparsity:6.1%}  {first:5.1f}  {second:5.1f}  {rows[0][2]:5}  {len(rows)}")


if __name__ == "__main__":
    main()
