"""What is published: one version, workflows that call what CI runs, and forms that follow their schemas."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SCHEMAS = {
    "vendor.github-workflows": WORKFLOWS,
    "vendor.github-issue-forms": [*(ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml")],
    "vendor.github-issue-config": [ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml"],
    "vendor.citation-file-format": [ROOT / "CITATION.cff"],
}


def _read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_one_version() -> None:
    found = re.findall(r"^## (\d+\.\d+\.\d+)", _read("CHANGELOG.md"), re.M)
    cited = re.findall(r"^version: (.*)$", _read("CITATION.cff"), re.M)
    assert [found[0]] == cited == [PROJECT["version"]]


def test_workflows_call_the_targets_that_ci_runs() -> None:
    called = {
        target for path in WORKFLOWS for target in re.findall(r"run: make (\w+)", path.read_text(encoding="utf-8"))
    }
    targets = set(re.findall(r"^(\w+):", _read("Makefile"), re.M))
    assert called <= targets
    assert set(re.findall(r"^part (\w+)", _read(".ci/run"), re.M)) - {"setup"} <= called
    hooks = re.findall(r"entry: make (\w+)", _read(".pre-commit-config.yaml"))
    assert hooks and set(hooks) <= targets


@pytest.mark.parametrize("schema", SCHEMAS)
def test_files_follow_their_schemas(schema: str) -> None:
    if importlib.util.find_spec("check_jsonschema") is None:
        pytest.skip("the schemas come with check-jsonschema, of sparring[all]")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *map(str, SCHEMAS[schema])]
    assert SCHEMAS[schema]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_lower_bound_is_a_constraint() -> None:
    done = subprocess.run([sys.executable, ".ci/lowest"], cwd=ROOT, capture_output=True, text=True, check=True)
    bounds = dict(line.split("==") for line in done.stdout.splitlines())
    assert len(bounds) > len(PROJECT["dependencies"]) and bounds["torch"] == "2.13"
