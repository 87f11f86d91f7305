"""Alpha spent over looks: whoever looks at a study again after it grew or shrank may be wrong once more."""

from __future__ import annotations

FIRST = 0.8  # of alpha: most studies are run as planned and looked at once


def look_price(look: int) -> float:
    """Return what the p-values of the k-th look, from 1, are multiplied by.

    The first look spends four fifths of alpha and the k-th alpha / (5 k (k - 1)); all looks that there can ever be
    spend alpha together, so by Bonferroni's inequality no number of them is too many. Raises ValueError for k < 1.
    """
    if look < 1:
        raise ValueError(f"looks are counted from 1, not {look}")
    return 1 / FIRST if look == 1 else look * (look - 1) / (1 - FIRST)
