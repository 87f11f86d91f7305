"""`sparring verify`: is the label the same in the whole ball, does the property hold?"""

from __future__ import annotations

import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import bounds, deploy
from ..bounds import Verdict
from ..data import as_float
from ..devices import CPU, Place, place_of
from ..errors import UserError
from ..files import check_writable, write_atomic
from ..graph import GraphModule, from_onnx, onnx_runtime, read_onnx
from ..models import load_model
from ..study import chosen_images
from ..threat import Threat
from ..units import duration, parse_eps, parse_norm
from ._app import DataSource, ModelSource, VerifyOptions, Where
from ._printing import print_json, print_table
from ._progress import shown_images
from ._sources import ONNX, PACKED, SAVED, check_named, check_seconds, open_both, plain_form

FALSIFIED, UNKNOWN = 1, 3


def run_verify(
    model: ModelSource, asked: Path | None, how: VerifyOptions, data: DataSource, where: Where, *, as_json: bool
) -> int:
    """Print each answer; return 0 if all is verified, 1 if anything is falsified, else 3.

    Proofs are made on the CPU; the network that checks counter-examples runs on the device of `where`.
    """
    place = place_of(where.device, where.dtype)
    _check(how, asked)
    verdicts = _about_images(model, how, data, place) if asked is None else [_about_property(model, asked, how, place)]
    about = {"model": model.model, "property": asked and str(asked), "seconds": how.seconds, "device": place.device}
    rows = [_row(number, verdict) for number, verdict in enumerate(verdicts)]
    if as_json:
        print_json({**about, "results": rows})
    else:
        print_table(
            ("image" if asked is None else "property", "answer", "bound", "nodes", "seconds"), map(_shown, rows), left=2
        )
        counts = Counter(row["status"] for row in rows)
        print(", ".join(f"{counts[status]} {status}" for status in ("verified", "falsified", "unknown")))
        print("".join(f"unknown: {why}\n" for why in dict.fromkeys(v.why for v in verdicts if v.why)), end="")
    found = {verdict.status for verdict in verdicts}
    return FALSIFIED if "falsified" in found else UNKNOWN if "unknown" in found else 0


def _check(how: VerifyOptions, asked: Path | None) -> None:
    """Raise UserError for options that contradict each other."""
    check_seconds(how.seconds)
    if (asked is None) == (how.eps == ""):
        raise UserError("give a property in VNN-LIB or --eps, one of them")
    if asked is None and how.counter_example is not None:
        raise UserError("--counter-example needs a property in VNN-LIB; drop it to verify labels of images")


def _about_images(model: ModelSource, how: VerifyOptions, data: DataSource, place: Place) -> list[Verdict]:
    norm, eps = parse_norm(how.norm), parse_eps(how.eps)
    Threat(norm, eps)
    network, dataset = open_both(model, data, plain=True, images=how.images)
    x, y = chosen_images(dataset, "test", 0, how.images)
    images, found = as_float(x), list[Verdict]()
    run = torch.no_grad()(place.answers(network, images))
    with shown_images() as tell:
        for i in range(len(y)):
            tell(f"verify, at most {duration(how.seconds)} an image", i, len(y))
            told = partial(_tell, f"image {i} of {len(y)}")
            one = images[i : i + 1], y[i : i + 1]
            found += bounds.verify(network, *one, norm, eps, run=run, seconds=how.seconds, progress=told)
    return found


def _about_property(model: ModelSource, path: Path, how: VerifyOptions, place: Place) -> Verdict:
    asked = bounds.read_vnnlib(path)
    if how.counter_example is not None:
        check_writable(how.counter_example)
    network, shape = _open_alone(model)
    if model.model.endswith(ONNX) and place == CPU:
        run = onnx_runtime(read_onnx(model.model))
    else:
        run = torch.no_grad()(place.answers(network, torch.zeros(1, *shape)))
    told = partial(_tell, str(path))
    verdict, case = bounds.verify_property(network, shape, asked, run=run, seconds=how.seconds, progress=told)
    if how.counter_example is not None:
        box = None if case is None else case.box
        write_atomic(
            how.counter_example, bounds.results_text(verdict.status, verdict.x_adv, verdict.logits, box).encode()
        )
    return verdict


def _open_alone(source: ModelSource) -> tuple[nn.Module, tuple[int, ...]]:
    """Return the model of a file, in a form that can be analysed, and the shape of its images."""
    check_named(source)
    name = source.model
    if name.endswith(ONNX):
        network = GraphModule(from_onnx(name)).eval()
        return network, network.shape
    if name.endswith(PACKED):
        packed = deploy.load(name)
        return plain_form(deploy.PackedModule(packed)), packed.program.shape
    if not name.endswith(SAVED):
        raise UserError(f"a property needs a model file ({', '.join(SAVED)}), and '{name}' is not one")
    model, blueprint, _ = load_model(name)
    return model, blueprint.shape


def _tell(what: str, bound: float, open_: int, nodes: int) -> None:
    if sys.stderr.isatty():
        text = f"{what}: bound {bound:.4g}, {open_} sub-problems open, {nodes} bounded"
        print(f"\r{text} \033[K", end="", file=sys.stderr, flush=True)


def _row(number: int, verdict: Verdict) -> dict[str, Any]:
    return {
        "number": number,
        "status": verdict.status,
        "bound": verdict.bound,
        "nodes": verdict.nodes,
        "seconds": verdict.seconds,
        "limit": verdict.limit,
    }


def _shown(row: dict[str, Any]) -> list[str]:
    return [str(row["number"]), row["status"], f"{row['bound']:.4g}", str(row["nodes"]), f"{row['seconds']:.2f}"]
