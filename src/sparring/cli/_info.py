"""`sparring list` and `sparring doctor`: list the named parts, describe this machine."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .. import __version__, attacks, data, models, sparsity
from ..devices import DEVICES, usable_device
from ..errors import UnknownNameError, UserError
from ..facts import ATTACKS, BOUNDS, LIPSCHITZ
from ..study import available_cores, presets
from ._printing import print_json

PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "safetensors", "highspy", "llvmlite", "mlxtend")
EXTRAS = ("onnxruntime", "openvino", "ray", "mlflow-skinny", "tensorboard", "foolbox", "timm", "transformers")


def _tables() -> dict[str, dict[str, str]]:
    return {
        "activations": _described(sparsity.ACTIVATIONS),
        "attacks": {
            name: f"{one.title}: {one.kind}, {', '.join(one.norms)}, {one.knowledge}; {one.source}"
            for name, one in ATTACKS.items()
        },
        "bounds": {name: one.title for name, one in BOUNDS.items()},
        "data": _described(data.DATASETS),
        "flags": attacks.FLAGS,
        "lipschitz": {name: one.title for name, one in LIPSCHITZ.items()},
        "models": _described(models.MODELS),
        "presets": presets(),
        "pruners": _described(sparsity.METHODS),
        "scores": _described(sparsity.SCORES),
        "structures": _described(sparsity.STRUCTURES),
    }


def _described(table: Mapping[str, object]) -> dict[str, str]:
    return {name: (inspect.getdoc(part) or "").split("\n")[0] for name, part in table.items()}


def show_list(what: str, *, as_json: bool) -> None:
    """Print the names in one table, or in all."""
    tables = _tables()
    if what and what not in tables:
        raise UnknownNameError("list", what, tables)
    chosen = {what: tables[what]} if what else tables
    if as_json:
        print_json(chosen)
        return
    for title, table in chosen.items():
        print(title)
        for name, text in table.items():
            print(f"  {name:31} {text}")


def show_doctor(data_dir: Path | None, *, as_json: bool) -> None:
    """Print versions, cores and data; exit code 0: whatever is missing is only needed by some commands."""
    facts = _facts(data_dir)
    if as_json:
        print_json(facts)
        return
    for name, value in facts.items():
        print(f"{name}:" if isinstance(value, dict) else f"{name:20} {value}")
        for key, detail in value.items() if isinstance(value, dict) else ():
            print(f"  {key:16} {detail or 'not found'}")


def _facts(data_dir: Path | None) -> dict[str, Any]:
    found = {entry.name: entry.where or "ships with a package" for entry in data.available(data_dir)}
    return {
        "sparring": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "devices": {name: _device(name) for name in DEVICES},
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "disk_free_gib": round(shutil.disk_usage(".").free / 2**30, 1),
        "packages": {name: _version(name) for name in PACKAGES},
        "extras": {name: _version(name) for name in EXTRAS} | {"torchvision": _torchvision()},
        "data": {name: found.get(name) for name in data.DATASETS},
    }


def _device(name: str) -> str | None:
    try:
        usable_device(name)
    except UserError:
        return None
    return "covered by the tests" if name == "cpu" else "found; sparring was never tested on such a device"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torchvision() -> str | None:
    """Return its version, and a way out if it cannot be imported: its operators are built for one version of torch."""
    found = _version("torchvision")
    if (
        found is None
        or subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode == 0
    ):
        return found
    return (
        f"{found}, cannot be imported with torch {torch.__version__}. sparring works without its operators; for other "
        "code, such as transformers' Trainer, install both from the index that torch came from: "
        f"pip install --force-reinstall torchvision torch=={torch.__version__.partition('+')[0]}"
    )
