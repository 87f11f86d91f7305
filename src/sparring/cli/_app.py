"""The commands; each reads its options, calls one library function and prints what came back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from ..facts import BOUNDS
from ..files import check_writable
from ..units import parse_budgets, parse_eps, parse_norm

app = typer.Typer(
    name="sparring",
    help="Measure, explain and exploit how sparsity changes a neural network's adversarial robustness.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

DataDir = Annotated[Path | None, typer.Option("--data-dir", help="Where to look for data first.")]
Download = Annotated[bool, typer.Option("--download", help="Fetch missing data from its public mirror.")]
Json = Annotated[bool, typer.Option("--json", help="Print machine-readable results.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print plain lines, no live view.")]
Weights = Annotated[Path | None, typer.Option("--weights", help="A safetensors file with the model's weights.")]
Loss = Annotated[str, typer.Option(help="standard, pgd-at or trades.")]
Eps = Annotated[str, typer.Option(help="Budget of training under attack, in [0, 1], as 0.1 or 8/255.")]
Budgets = Annotated[str, typer.Option(help="Budgets in [0, 1], separated by commas, as 0.1,8/255.")]
Seed = Annotated[int, typer.Option(help="Seed of initialisation and order.", min=0, max=2**32 - 1)]
Images = Annotated[int, typer.Option(help="How many test images.", min=1)]
ModelArgument = Annotated[
    str, typer.Argument(help="A name, a file (.safetensors, .sparring), or package.module:factory.")
]


@app.callback()
def options(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where in the code an error came from.")] = False,
) -> None:
    """Measure, explain and exploit how sparsity changes a neural network's adversarial robustness."""


def _take_threads(threads: int | None) -> int | None:
    """Let torch's work be shared by so many threads from here on."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    return threads


Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        max=1024,
        help="Threads that share the work [default: one per core].",
        callback=_take_threads,
    ),
]


@app.command()
def study(
    plan: Annotated[str, typer.Argument(help="A preset's name or a TOML file; see `sparring list presets`.")] = "quick",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Output folder [default: out/PLAN].")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE in TOML; repeatable.")] = None,
    model: Annotated[str | None, typer.Option(help="A model's name or your own package.module:factory.")] = None,
    weights: Weights = None,
    workers: Annotated[
        int | None, typer.Option(help="Tasks at a time [default: one per core].", min=0, max=1024)
    ] = None,
    data_dir: DataDir = None,
    download: Download = False,
    register: Annotated[
        bool, typer.Option("--register", help="Write the plan's hash before the first record; the report says so.")
    ] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Try failed cells again.")] = False,
    device: Annotated[str, typer.Option(help="cpu, a GPU such as cuda:0, or auto: a GPU if there is one.")] = "auto",
    ray: Annotated[str | None, typer.Option(help="Run on the Ray cluster at ADDRESS, or auto.")] = None,
    mlflow: Annotated[str | None, typer.Option(help="Log progress to this MLflow URI.")] = None,
    tensorboard: Annotated[Path | None, typer.Option(help="Log progress for TensorBoard to this folder.")] = None,
    status: Annotated[Path | None, typer.Option(help="Run nothing; say how far this folder is.")] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> int:
    """Run a study: train, prune, attack, and write the report. Run it again and it goes on where it stopped."""
    if status is not None:
        return show_progress(status, json)
    if out is not None:
        check_writable(out, folder=True)
    from ._study import run_study

    named = {"model.name": model, "model.weights": weights}
    changes = [*(overrides or ()), *(f"{key}='{value}'" for key, value in named.items() if value is not None)]
    return run_study(
        plan, out, tuple(changes), workers, data_dir, download, register=register, retry=retry, device=device, ray=ray,
        mlflow=mlflow, tensorboard=tensorboard, quiet=quiet, as_json=json,
    )  # fmt: skip


@app.command(name="status")
def show_progress(out: Annotated[Path, typer.Argument(help="A study's output folder.")], json: Json = False) -> int:
    """Say how far a study is, also while another process runs it."""
    from ._folders import show_status

    return show_status(out, as_json=json)


@app.command()
def merge(
    sources: Annotated[list[Path], typer.Argument(help="Output folders of studies with the same foundations.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where to [default: into the first].")] = None,
    json: Json = False,
) -> int:
    """Unite studies that were run apart; every hash is checked, since another's folder may be damaged or forged."""
    from ._folders import run_merge

    return run_merge(sources, out, as_json=json)


@app.command()
def report(out: Annotated[Path, typer.Argument(help="A study's output folder.")]) -> int:
    """Rebuild report.html, results.csv and figures from a study's folder, without models or data."""
    from ..report import publish

    path, verdict = publish(out)
    print(f"{verdict}\n\nreport: {path}")
    return 0


@app.command()
def train(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="The model file to write.")],
    data: Annotated[str, typer.Option(help="Data set: a name or a path.")] = "mnist-5k",
    recipe: Annotated[
        list[str] | None, typer.Option("--set", help="Recipe KEY=VALUE, as epochs=5 [default: the model's own].")
    ] = None,
    width: Annotated[float | None, typer.Option(help="Multiple of the named model's layer widths.")] = None,
    depth: Annotated[int | None, typer.Option(help="Depth of resnet-32: 6n + 2 layers.")] = None,
    loss: Loss = "standard",
    eps: Eps = "0.1",
    ramp: Annotated[
        float | None, typer.Option(help="Share of the training over which eps grows to its value; for a large eps.")
    ] = None,
    seed: Seed = 0,
    data_dir: DataDir = None,
    download: Download = False,
    threads: Threads = None,
    quiet: Quiet = False,
) -> int:
    """Train a network and write it to one file."""
    budget = parse_eps(eps)
    _check_out(out, ".safetensors")
    from ._models import run_train

    return run_train(
        model, out, data, tuple(recipe or ()), width, depth, loss, budget, ramp, seed, data_dir, download, quiet=quiet
    )


@app.command()
def prune(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="The model file to write.")],
    sparsity: Annotated[
        float | None, typer.Option(help="Fraction of weights to remove; none for dns with a c_rate.")
    ] = None,
    weights: Weights = None,
    data: Annotated[str, typer.Option(help="Data set: a name or a path.")] = "mnist-5k",
    options: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE, as method=dns, epochs=5.")] = None,
    loss: Loss = "standard",
    eps: Eps = "0.1",
    seed: Seed = 0,
    data_dir: DataDir = None,
    download: Download = False,
    threads: Threads = None,
    quiet: Quiet = False,
) -> int:
    """Prune a trained network, fine-tune it, and write it to one file."""
    budget, settings = parse_eps(eps), tuple(options or ())
    _check_out(out, ".safetensors")
    from ._models import run_prune

    return run_prune(model, out, sparsity, weights, data, settings, loss, budget, seed, data_dir, download, quiet=quiet)


@app.command()
def attack(
    model: ModelArgument,
    weights: Weights = None,
    data: Annotated[str, typer.Option(help="Data set: a name or a path.")] = "mnist-5k",
    attacks: Annotated[
        str, typer.Option(help="Names, separated by commas; see `sparring list attacks`.")
    ] = "fgsm,pgd,fast",
    options: Annotated[
        list[str] | None, typer.Option("--set", help="Option of the attacks that have it, as steps=100; repeatable.")
    ] = None,
    norm: Annotated[str, typer.Option(help="linf, l2 or l1.")] = "linf",
    eps: Budgets = "0.1",
    images: Images = 1000,
    checks: Annotated[
        int, typer.Option(help="Images of the second opinions: longer runs, unlimited budgets, ... [0: none].", min=0)
    ] = 128,
    batch_size: Annotated[
        int | None, typer.Option(help="Images at a time [default: what memory allows].", min=1, max=100_000)
    ] = None,
    seed: Seed = 0,
    data_dir: DataDir = None,
    download: Download = False,
    threads: Threads = None,
    json: Json = False,
) -> int:
    """Attack any classifier on any data and print how it stands."""
    threat = parse_norm(norm), parse_budgets(eps)
    from ._models import run_attack

    return run_attack(
        model, weights, data, attacks, *threat, images, batch_size, seed, data_dir, download, checks,
        tuple(options or ()), as_json=json,
    )  # fmt: skip


@app.command()
def certify(
    model: ModelArgument,
    weights: Weights = None,
    data: Annotated[str, typer.Option(help="Data set: a name or a path.")] = "mnist-5k",
    norm: Annotated[str, typer.Option(help="linf or l2.")] = "linf",
    method: Annotated[str, typer.Option(help=f"{', '.join(BOUNDS)}.")] = "crown",
    eps: Budgets = "0.01,0.03",
    images: Images = 100,
    data_dir: DataDir = None,
    download: Download = False,
    threads: Threads = None,
    json: Json = False,
) -> int:
    """Prove how far images lie from the decision boundary, beside how near the best attack comes."""
    threat = parse_norm(norm), parse_budgets(eps)
    from ._theory import run_certify

    return run_certify(model, weights, data, *threat, method, images, data_dir, download, as_json=json)


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="A study's folder or a model file.")],
    second: Annotated[str, typer.Argument(help="Another of the same kind: the candidate.")],
    max_drop: Annotated[
        list[str] | None, typer.Option(metavar="METRIC AMOUNT", help="How much of a metric may be lost; repeatable.")
    ] = None,
    methods: Annotated[
        tuple[str, str] | None, typer.Option(help="For studies: the two methods [default: those of the headlines].")
    ] = None,
    sparsities: Annotated[tuple[float, float] | None, typer.Option(help="For studies: the two sparsities.")] = None,
    data: Annotated[str, typer.Option(help="For models: a data set's name or path.")] = "mnist-5k",
    weights: Annotated[
        list[Path] | None, typer.Option(help="For models named as code or by name: their weights, once for each.")
    ] = None,
    eps: Annotated[str, typer.Option(help="For models: the budget of l_inf attacks.")] = "0.1",
    images: Annotated[int, typer.Option(help="For models: how many test images.", min=1)] = 500,
    data_dir: DataDir = None,
    download: Download = False,
    json: Json = False,
) -> int:
    """Compare two studies or models, paired by image; exit code 1 if a larger drop than allowed is not excluded."""
    budget = parse_eps(eps)
    from ..report import Side
    from ._compare import run_compare

    one, other = zip((first, second), methods or (None, None), sparsities or (None, None), strict=True)
    sides = (Side(Path(one[0]), *one[1:]), Side(Path(other[0]), *other[1:]))
    return run_compare(
        sides, tuple(weights or ()), tuple(max_drop or ()), data, budget, images, data_dir, download, as_json=json
    )


@app.command()
def export(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(help="The file to write.")],
    to: Annotated[
        str | None,
        typer.Option(help="packed (one checked file for the sparse runtime) or onnx [default: by the file's ending]."),
    ] = None,
    values: Annotated[str, typer.Option(help="fp32, fp16 or int8.")] = "fp32",
    weights: Weights = None,
    data: Annotated[str, typer.Option(help="Data set: a name or a path.")] = "mnist-5k",
    eps: Annotated[str, typer.Option(help="Budget of the attack that is tried on the artefact.")] = "0.1",
    images: Images = 500,
    data_dir: DataDir = None,
    download: Download = False,
) -> int:
    """Write a model as one small file, and say what that costs in accuracy and robustness."""
    budget, kinds = parse_eps(eps), {"packed": ".sparring", "onnx": ".onnx"}
    kind = to or ("onnx" if out.suffix == ".onnx" else "packed")
    if kind not in kinds:
        raise UserError(f"--to takes packed or onnx, not '{to}'")
    _check_out(out, kinds[kind])
    from ._deploy import run_export

    return run_export(model, out, kind, values, weights, data, budget, images, data_dir, download)


@app.command()
def bench(
    model: ModelArgument,
    weights: Weights = None,
    data: Annotated[str, typer.Option(help="Data set: a name or a path.")] = "mnist-5k",
    batches: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,64,256",
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.", min=1)] = 30,
    small: Annotated[str | None, typer.Option(help="A small dense network of equal accuracy, to compare.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the times to this .svg or .png.")] = None,
    data_dir: DataDir = None,
    download: Download = False,
    json: Json = False,
) -> int:
    """Time a model on one core: packed, torch, and ONNX Runtime and OpenVINO where installed."""
    if plot is not None:
        _check_out(plot, ".svg", ".png")
    from ._deploy import run_bench

    return run_bench(model, weights, data, batches, rounds, small, plot, data_dir, download, as_json=json)


@app.command()
def pick(
    out: Annotated[Path, typer.Argument(help="A study's output folder.")],
    to: Annotated[Path | None, typer.Option(help="The artefact to write [default: inside the folder].")] = None,
    max_latency: Annotated[float | None, typer.Option(help="Milliseconds for one image.")] = None,
    max_accuracy_drop: Annotated[float, typer.Option(help="Points, on validation images.")] = 0.5,
    values: Annotated[str, typer.Option(help="fp32, fp16 or int8.")] = "fp32",
    model: Annotated[
        str | None, typer.Option(help="The package.module:factory of a study of your own code; it is run.")
    ] = None,
    json: Json = False,
) -> int:
    """Pick a study's best network within limits: chosen on validation images, reported on test images, exported."""
    if to is not None:
        _check_out(to, ".sparring")
    from ._deploy import run_pick

    return run_pick(out, to, max_latency, max_accuracy_drop, values, model, as_json=json)


@app.command(name="list")
def list_(
    what: Annotated[str, typer.Argument(help="attacks, models, data, presets, pruners, ... or nothing for all.")] = "",
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


def _check_out(path: Path, *endings: str) -> None:
    """Raise UserError, before any work, for a file that could not be written or, by its ending, not be read later."""
    if path.suffix not in endings:
        raise UserError(f"{path} must end in {' or '.join(endings)}")
    check_writable(path)
