"""Take a finished study into docs/results, prose included: python benchmarks/recording.py FOLDER NAME

FOLDER is the study's output folder, NAME its page under docs/results. Report, tables and figures are made by
`benchmarks/results.py`; then every phrase that tests/docs/results_numbers.py computes from the recorded numbers is
rewritten where it stands. What could not be found is printed, for a person to read those sentences again.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"


def phrases() -> dict[str, list[str]]:
    """Return the phrases of each page that hold numbers, as the recorded studies have them now."""
    spec = importlib.util.spec_from_file_location("results_numbers", ROOT / "tests" / "docs" / "results_numbers.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {page: list(compute()) for page, compute in module.FACTS.items()}


def record(folder: Path, name: str) -> None:
    """Write the study's report, tables and figures under its name."""
    with tempfile.TemporaryDirectory() as place:
        named = Path(place) / name
        named.symlink_to(folder.resolve())
        command = [sys.executable, str(ROOT / "benchmarks" / "results.py"), str(named), "--to", str(RESULTS)]
        subprocess.run(command, check=True)


def rewrite(page: Path, before: Sequence[str], after: Sequence[str]) -> list[str]:
    """Replace old phrases by new ones; return the old ones that the page does not have."""
    text, missing = page.read_text(encoding="utf-8"), []
    for old, new in zip(before, after, strict=True):
        if old not in text:
            missing.append(old)
        text = text.replace(old, new)
    page.write_text(text, encoding="utf-8")
    return missing


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("name")
    given = parser.parse_args(arguments)
    before: Mapping[str, Sequence[str]] = phrases()
    record(given.folder, given.name)
    for name, after in phrases().items():
        page = ROOT / "README.md" if name == "README" else RESULTS / f"{name}.md"
        for phrase in rewrite(page, before[name], after):
            print(f"{page.relative_to(ROOT)}: not found: {phrase!r}")
    print("Read the rewritten sentences: numbers of seeds, commands, running times and words such as 'both undecided'")


if __name__ == "__main__":
    main()
