"""The commands; each reads its options, calls one library function and prints what came back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from ._options import (
    AttackOptions,
    BenchOptions,
    CertifyOptions,
    CompareOptions,
    DataDir,
    DataSource,
    ExportOptions,
    FitOptions,
    Json,
    ModelSource,
    Out,
    PickOptions,
    PruneOptions,
    StudyOptions,
    StudySource,
    TrainOptions,
    flat,
)

app = typer.Typer(
    name="sparring",
    help="Measure, explain and exploit how sparsity changes a neural network's adversarial robustness.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def options(
    traceback: Annotated[bool, Option("--traceback", help="Show where in the code an error came from.")] = False,
) -> None:
    """Measure, explain and exploit how sparsity changes a neural network's adversarial robustness."""


@app.command()
@flat
def study(
    source: StudySource,
    how: StudyOptions,
    status: Annotated[Path | None, Option(help="Run nothing; say how far this folder is.")] = None,
    json: Json = False,
) -> int:
    """Run a study: train, prune, attack, and write the report. Run it again and it goes on where it stopped."""
    if status is not None:
        return show_progress(status, json)
    from ._study import run_study

    return run_study(source, how, as_json=json)


@app.command(name="status")
def show_progress(out: Out, json: Json = False) -> int:
    """Say how far a study is, also while another process runs it."""
    from ._study import show_status

    return show_status(out, as_json=json)


@app.command()
def merge(
    sources: Annotated[list[Path], Argument(help="Output folders of studies with the same foundations.")],
    out: Annotated[Path | None, Option("--out", "-o", help="Where to [default: into the first].")] = None,
    json: Json = False,
) -> int:
    """Unite studies that were run apart; every hash is checked, since another's folder may be damaged or forged."""
    from ._study import run_merge

    return run_merge(sources, out, as_json=json)


@app.command()
def report(out: Out) -> int:
    """Rebuild report.html, results.csv and figures from a study's folder, without models or data."""
    from ..report import publish

    path, verdict = publish(out)
    print(f"{verdict}\n\nreport: {path}")
    return 0


@app.command()
@flat
def train(how: TrainOptions, data: DataSource, fit: FitOptions) -> int:
    """Train a network and write it to one file."""
    from ._train import run_train

    return run_train(how, data, fit)


@app.command()
def convert(
    checkpoint: Annotated[Path, Argument(help="A file of torch.save's: .pt, .pth, .ckpt or .bin.")],
    out: Annotated[Path, Argument(help="The .safetensors file to write.")],
    key: Annotated[str | None, Option(help="Which of several sets of weights, as model_ema.")] = None,
) -> int:
    """Read the weights of a checkpoint, without running what is in it, and write them to a safetensors file."""
    from ._convert import run_convert

    return run_convert(checkpoint, out, key)


@app.command()
@flat
def prune(model: ModelSource, how: PruneOptions, data: DataSource, fit: FitOptions) -> int:
    """Prune a trained network, fine-tune it, and write it to one file."""
    from ._train import run_prune

    return run_prune(model, how, data, fit)


@app.command()
@flat
def attack(model: ModelSource, data: DataSource, how: AttackOptions, json: Json = False) -> int:
    """Attack any classifier on any data and print how it stands."""
    from ._attack import run_attack

    return run_attack(model, data, how, as_json=json)


@app.command()
@flat
def certify(model: ModelSource, data: DataSource, how: CertifyOptions, json: Json = False) -> int:
    """Prove how far images lie from the decision boundary, beside how near the best attack comes."""
    from ._attack import run_certify

    return run_certify(model, data, how, as_json=json)


@app.command()
@flat
def compare(how: CompareOptions, data: DataSource, json: Json = False) -> int:
    """Compare two studies or models, paired by image; exit code 1 if a larger drop than allowed is not excluded."""
    from ._attack import run_compare

    return run_compare(how, data, as_json=json)


@app.command()
@flat
def export(model: ModelSource, how: ExportOptions, data: DataSource) -> int:
    """Write a model as one small file, and say what that costs in accuracy and robustness."""
    from ._deploy import run_export

    return run_export(model, how, data)


@app.command()
@flat
def bench(model: ModelSource, data: DataSource, how: BenchOptions, json: Json = False) -> int:
    """Time a model on one core: packed, torch, and ONNX Runtime and OpenVINO where installed."""
    from ._deploy import run_bench

    return run_bench(model, data, how, as_json=json)


@app.command()
@flat
def pick(how: PickOptions, json: Json = False) -> int:
    """Pick a study's best network within limits: chosen on validation images, reported on test images, exported."""
    from ._deploy import run_pick

    return run_pick(how, as_json=json)


@app.command(name="list")
def list_(
    what: Annotated[str, Argument(help="attacks, models, data, presets, pruners, ... or nothing for all.")] = "",
    json: Json = False,
) -> int:
    """Show what there is of everything."""
    from ._info import show_list

    return show_list(what, as_json=json)


@app.command()
def doctor(data_dir: DataDir = None, json: Json = False) -> int:
    """Say whether this machine is ready: versions, cores, and which data are found where."""
    from ._info import show_doctor

    return show_doctor(data_dir, as_json=json)
