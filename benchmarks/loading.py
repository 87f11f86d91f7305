"""How long data sets take to load and to hash: python benchmarks/loading.py NAME_OR_PATH ... [--data-dir FOLDER].

Prints one JSON object a data set: seconds to load, seconds to hash, peak memory in MiB so far, and images a second.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import torch

from sparring import data


def measure(name: str, root: str | None) -> dict[str, object]:
    """Load and hash one data set twice, require the same data, and return the better times."""
    loads, hashes, identities = [], [], set()
    for _ in range(2):
        begun = time.perf_counter()
        dataset = data.load(name, root)
        loaded = time.perf_counter()
        identities.add(data.content_hash(dataset))
        loads.append(loaded - begun)
        hashes.append(time.perf_counter() - loaded)
    assert len(identities) == 1
    images = sum(len(split.x) for split in (dataset.train, dataset.valid, dataset.test))
    return {
        "name": dataset.name,
        "images": images,
        "load_s": round(min(loads), 3),
        "hash_s": round(min(hashes), 3),
        "images_per_s": round(images / min(loads)),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }


def main() -> None:
    """Measure each data set that is named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=["mnist-5k"])
    parser.add_argument("--data-dir")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.names:
        print(json.dumps(measure(name, given.data_dir)))


if __name__ == "__main__":
    main()
