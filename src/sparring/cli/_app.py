"""The commands: what each is given, as frozen records, and the library's function that it calls.

A command may take records: each of their fields is an option (or argument) of its own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer import Argument, Option

from ..errors import UserError
from ..facts import BOUNDS

app = typer.Typer(
    name="sparring",
    help="Measure, explain and exploit how sparsity changes a neural network's adversarial robustness.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def command(function: Callable[..., int | None]) -> Callable[..., int | None]:
    """Make a function a command: in the place of each record it has the record's fields as options."""
    own = _parameters(function)
    records: dict[str, Any] = {p.name: p.annotation for p in own if is_dataclass(p.annotation)}
    parts = {name: _parameters(record) for name, record in records.items()}

    @functools.wraps(function)
    def call(**given: Any) -> int | None:
        made = {name: record(**{p.name: given.pop(p.name) for p in parts[name]}) for name, record in records.items()}
        return function(**made, **given)

    whole = [one for parameter in own for one in parts.get(parameter.name, [parameter])]
    call.__signature__ = inspect.Signature(whole)  # type: ignore[attr-defined]
    return app.command(name=function.__name__.rstrip("_"))(call)


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return the parameters of a function or class as keywords, with what their annotations mean."""
    hints, parameters = get_type_hints(function, include_extras=True), inspect.signature(function).parameters
    return [p.replace(kind=p.KEYWORD_ONLY, annotation=hints[p.name]) for p in parameters.values()]


def _take_threads(threads: int | None) -> int | None:
    """Let torch's work be shared by so many threads from here on."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    return threads


DataDir = Annotated[Path | None, Option("--data-dir", help="Where to look for data first.")]
Download = Annotated[bool, Option("--download", help="Fetch missing data from its public mirror.")]
Resize = Annotated[
    str | None,
    Option(help="For your own images: pixels of the shorter side, as 256, or HEIGHTxWIDTH to stretch them to."),
]
Crop = Annotated[str | None, Option(help="For your own images: the centre to take, as 224 or HEIGHTxWIDTH.")]
Interpolation = Annotated[str | None, Option(help="bilinear, bicubic, nearest, lanczos, box or hamming.")]
Classes = Annotated[
    Path | None,
    Option(help="The network's classes, in its order: one a line, or JSON; the data may have some of them."),
]
Limit = Annotated[
    list[str] | None,
    Option(help="At most so many images, class by class in turn: N, or SPLIT=N (train, valid, test); repeatable."),
]
NoCache = Annotated[bool, Option("--no-cache", help="Decode all images into memory, not once into the cache folder.")]
Eps = Annotated[str, Option(help="Budget of training under attack, in [0, 1], as 0.1 or 8/255.")]
Budgets = Annotated[str, Option(help="Budgets in [0, 1], separated by commas, as 0.1,8/255.")]
Images = Annotated[int, Option(help="How many test images.", min=1)]
Json = Annotated[bool, Option("--json", help="Print the results as JSON, and all else to standard error.")]
Study = Annotated[Path, Argument(help="A study's output folder.")]
OutModel = Annotated[Path, Option("--out", "-o", help="The model file to write.")]
Quiet = Annotated[bool, Option("--quiet", help="Print plain lines, no live view.")]
Seed = Annotated[int, Option(help="Seed of initialisation and order.", min=0, max=2**32 - 1)]
Threads = Annotated[
    int | None,
    Option(min=1, max=1024, help="Threads that share the work [default: one per core].", callback=_take_threads),
]
Values = Annotated[str, Option(help="fp32, fp16 or int8.")]
Weights = Annotated[Path | None, Option(help="A safetensors file with the model's weights.")]
Moments = Annotated[str | None, Option(help="For a factory: its normalisation, by channel, as 0.5,0.5,0.5.")]
Model = Annotated[
    str,
    Argument(
        help="A file (.safetensors, .sparring), or a name, timm:NAME, torchvision:NAME, hf:FOLDER, "
        "package.module:factory, each with @FILE.safetensors for its weights."
    ),
]


@dataclass(frozen=True)
class DataSource:
    """A data set, the folder to look in first, whether to fetch what is missing, and how images are prepared.

    The last six are for files of the user's own; a library's network has defaults for how images are prepared.
    """

    data: Annotated[str, Option(help="Data set: a name or a path.")] = "mnist-5k"
    data_dir: DataDir = None
    download: Download = False
    resize: Resize = None
    crop: Crop = None
    interpolation: Interpolation = None
    classes: Classes = None
    limit: Limit = None
    no_cache: NoCache = False


@dataclass(frozen=True)
class ModelSource:
    """A model file, an artefact, a name with a file of weights, a library's network, or a user's factory.

    `model` may end in "@FILE", which says the same as `weights`.
    """

    model: Model
    weights: Weights = None
    mean: Moments = None
    std: Moments = None

    def named(self) -> tuple[str, Path | None]:
        """Return the model's name, without its file, and the file of weights; raise UserError for two files."""
        cut = str.rpartition if self.model.startswith("hf:") else str.partition  # folders may have an @ in their names
        name, mark, file = cut(self.model, "@")
        weights = file.endswith((".safetensors", ".pt", ".pth", ".ckpt", ".bin"))
        if not (mark and name and weights) or Path(self.model).is_file():
            return self.model, self.weights
        if self.weights is not None:
            raise UserError(f"'{self.model}' names its weights; drop --weights {self.weights}")
        return name, Path(file)


def _show_version(asked: bool) -> None:
    """Print the version and end, where it is asked for."""
    if asked:
        from .. import __version__

        print(f"sparring {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
    traceback: Annotated[bool, Option("--traceback", help="Show where in the code an error came from.")] = False,
) -> None:
    """Measure, explain and exploit how sparsity changes a neural network's adversarial robustness."""


@dataclass(frozen=True)
class StudySource:
    """A plan with what was changed in it, its data, where its results go, and on what it runs."""

    plan: Annotated[str, Argument(help="A preset's name or a TOML file; see `sparring list presets`.")] = "quick"
    out: Annotated[Path | None, Option("--out", "-o", help="Output folder [default: out/PLAN].")] = None
    overrides: Annotated[list[str] | None, Option("--set", help="KEY=VALUE in TOML; repeatable.")] = None
    model: Annotated[str | None, Option(help="A model's name or your own package.module:factory.")] = None
    weights: Weights = None
    data_dir: DataDir = None
    download: Download = False
    resize: Resize = None
    crop: Crop = None
    interpolation: Interpolation = None
    classes: Classes = None
    limit: Limit = None
    no_cache: NoCache = False
    device: Annotated[str, Option(help="cpu, a GPU such as cuda:0, or auto: a GPU if there is one.")] = "auto"


@dataclass(frozen=True)
class StudyOptions:
    """How a study runs, which changes none of its records."""

    workers: Annotated[int | None, Option(help="Tasks at a time [default: one per core].", min=0, max=1024)] = None
    register: Annotated[
        bool, Option("--register", help="Write the plan's hash before the first record; the report says so.")
    ] = False
    retry: Annotated[bool, Option("--retry", help="Try failed cells again.")] = False
    ray: Annotated[str | None, Option(help="Run on the Ray cluster at ADDRESS, or auto.")] = None
    mlflow: Annotated[str | None, Option(help="Log progress to this MLflow URI.")] = None
    tensorboard: Annotated[Path | None, Option(help="Log progress for TensorBoard to this folder.")] = None
    quiet: Quiet = False


@command
def study(
    source: StudySource,
    how: StudyOptions,
    json: Json = False,
) -> int:
    """Run a study: train, prune, attack, and write the report. Run it again and it goes on where it stopped."""
    from ._study import run_study

    return run_study(source, how, as_json=json)


@command
def status(study: Study, json: Json = False) -> None:
    """Say how far a study is, also while another process runs it."""
    from ._study import show_status

    show_status(study, as_json=json)


@command
def merge(
    sources: Annotated[list[Path], Argument(help="Output folders of studies with the same foundations.")],
    out: Annotated[Path | None, Option("--out", "-o", help="Where to [default: into the first].")] = None,
    json: Json = False,
) -> int:
    """Unite studies that were run apart; every hash is checked, since another's folder may be damaged or forged."""
    from ._study import run_merge

    return run_merge(sources, out, as_json=json)


@command
def report(study: Study, json: Json = False) -> None:
    """Rebuild report.html, results.csv and figures from a study's folder, without models or data."""
    from ._study import rebuild

    rebuild(study, as_json=json)


@dataclass(frozen=True)
class TrainOptions:
    """Which network to train, and by which recipe."""

    model: Model
    out: OutModel
    recipe: Annotated[
        list[str] | None, Option("--set", help="Recipe KEY=VALUE, as epochs=5 [default: the model's own].")
    ] = None
    width: Annotated[float | None, Option(help="Multiple of the named model's layer widths.")] = None
    depth: Annotated[int | None, Option(help="Depth of resnet-32: 6n + 2 layers.")] = None
    ramp: Annotated[
        float | None, Option(help="Share of the training over which eps grows to its value; for a large eps.")
    ] = None


@dataclass(frozen=True)
class FitOptions:
    """How a network is trained, besides its recipe."""

    loss: Annotated[str, Option(help="standard, pgd-at or trades.")] = "standard"
    eps: Eps = "0.1"
    label_smoothing: Annotated[float | None, Option(help="Share of each label that goes to all classes alike.")] = None
    seed: Seed = 0
    threads: Threads = None
    quiet: Quiet = False


@command
def train(how: TrainOptions, data: DataSource, fit: FitOptions, json: Json = False) -> None:
    """Train a network and write it to one file."""
    from ._train import run_train

    run_train(how, data, fit, as_json=json)


@command
def convert(
    checkpoint: Annotated[Path, Argument(help="A file of torch.save's: .pt, .pth, .ckpt or .bin.")],
    out: Annotated[Path, Argument(help="The .safetensors file to write.")],
    key: Annotated[str | None, Option(help="Which of several sets of weights, as model_ema, or of prefixes.")] = None,
    as_is: Annotated[
        bool, Option("--as-is", help="Keep names, masks and norms, for a network that has them itself.")
    ] = False,
    json: Json = False,
) -> None:
    """Read the weights of a checkpoint, without running what is in it, and write them to a safetensors file."""
    from ._train import run_convert

    run_convert(checkpoint, out, key, as_is=as_is, as_json=json)


@dataclass(frozen=True)
class PruneOptions:
    """How far a network is pruned, and how."""

    out: OutModel
    sparsity: Annotated[float | None, Option(help="Fraction of weights to remove; none for dns with a c_rate.")] = None
    options: Annotated[list[str] | None, Option("--set", help="KEY=VALUE, as method=dns, epochs=5.")] = None


@command
def prune(model: ModelSource, how: PruneOptions, data: DataSource, fit: FitOptions, json: Json = False) -> None:
    """Prune a trained network, fine-tune it, and write it to one file."""
    from ._train import run_prune

    run_prune(model, how, data, fit, as_json=json)


@dataclass(frozen=True)
class AttackOptions:
    """Which attacks run, within which budgets, on how many images."""

    attacks: Annotated[str, Option(help="Names, separated by commas; see `sparring list attacks`.")] = "fgsm,pgd,fast"
    options: Annotated[
        list[str] | None, Option("--set", help="Option of the attacks that have it, as steps=100; repeatable.")
    ] = None
    norm: Annotated[str, Option(help="linf, l2 or l1.")] = "linf"
    eps: Budgets = "0.1"
    images: Images = 1000
    checks: Annotated[
        int, Option(help="Images of the second opinions: longer runs, unlimited budgets, ... [0: none].", min=0)
    ] = 128
    batch_size: Annotated[
        int | None, Option(help="Images at a time [default: what memory allows].", min=1, max=100_000)
    ] = None
    seed: Annotated[int, Option(help="Seed of random starts.", min=0, max=2**32 - 1)] = 0
    threads: Threads = None


@command
def attack(model: ModelSource, data: DataSource, how: AttackOptions, json: Json = False) -> None:
    """Attack any classifier on any data and print how it stands."""
    from ._attack import run_attack

    run_attack(model, data, how, as_json=json)


@dataclass(frozen=True)
class CertifyOptions:
    """What is to be proved, and how."""

    norm: Annotated[str, Option(help="linf or l2.")] = "linf"
    method: Annotated[str | None, Option(help=f"{', '.join(BOUNDS)}; unless given, chosen by --seconds.")] = None
    seconds: Annotated[float, Option(help="How long it may take, by an estimate that is printed first.")] = 300.0
    eps: Budgets = "0.01,0.03"
    images: Images = 100
    threads: Threads = None


@command
def certify(model: ModelSource, data: DataSource, how: CertifyOptions, json: Json = False) -> None:
    """Prove how far images lie from the decision boundary, beside how near the best attack comes."""
    from ._attack import run_certify

    run_certify(model, data, how, as_json=json)


@dataclass(frozen=True)
class CompareOptions:
    """What is compared, and how much worse the second may be."""

    first: Annotated[str, Argument(help="A study's folder or a model file.")]
    second: Annotated[str, Argument(help="Another of the same kind: the candidate.")]
    max_drop: Annotated[
        list[str] | None, Option(metavar="METRIC AMOUNT", help="How much of a metric may be lost; repeatable.")
    ] = None
    methods: Annotated[
        tuple[str, str] | None, Option(help="For studies: the two methods [default: those of the headlines].")
    ] = None
    sparsities: Annotated[tuple[float, float] | None, Option(help="For studies: the two sparsities.")] = None
    weights: Annotated[
        list[Path] | None, Option(help="For models named as code or by name: their weights, once for each.")
    ] = None
    eps: Annotated[str, Option(help="For models: the budget of linf attacks.")] = "0.1"
    images: Annotated[int, Option(help="For models: how many test images.", min=1)] = 500
    threads: Threads = None


@command
def compare(how: CompareOptions, data: DataSource, json: Json = False) -> int:
    """Compare two studies or models, paired by image; exit code 1 if a larger drop than allowed is not excluded."""
    from ._attack import run_compare

    return run_compare(how, data, as_json=json)


@dataclass(frozen=True)
class ExportOptions:
    """What to write, and how the artefact is tried."""

    out: Annotated[Path, Argument(help="The file to write.")]
    format: Annotated[
        str | None,
        Option(help="packed (one checked file for the sparse runtime) or onnx [default: by the file's ending]."),
    ] = None
    values: Values = "fp32"
    eps: Annotated[str, Option(help="Budget of the attack that is tried on the artefact.")] = "0.1"
    images: Images = 500
    threads: Threads = None


@command
def export(model: ModelSource, how: ExportOptions, data: DataSource, json: Json = False) -> None:
    """Write a model as one small file, and say what that costs in accuracy and robustness."""
    from ._deploy import run_export

    run_export(model, how, data, as_json=json)


@dataclass(frozen=True)
class BenchOptions:
    """What is timed, and against what."""

    batches: Annotated[str, Option(help="Batch sizes, separated by commas.")] = "1,64,256"
    rounds: Annotated[int, Option(help="Interleaved rounds.", min=1)] = 30
    small: Annotated[str | None, Option(help="A small dense network of equal accuracy, to compare.")] = None
    engines: Annotated[str | None, Option(help="Engines, separated by commas [default: all installed].")] = None
    plot: Annotated[Path | None, Option(help="Draw the times to this .svg or .png.")] = None


@command
def bench(model: ModelSource, data: DataSource, how: BenchOptions, json: Json = False) -> None:
    """Time a model in every installed engine on one core, and say which engine to ship."""
    from ._deploy import run_bench

    run_bench(model, data, how, as_json=json)


@dataclass(frozen=True)
class PickOptions:
    """Which network of a study is picked, and what is written."""

    study: Study
    out: Annotated[Path | None, Option("--out", "-o", help="The artefact to write [default: inside the folder].")] = (
        None
    )
    max_latency: Annotated[float | None, Option(help="Milliseconds for one image.")] = None
    max_accuracy_drop: Annotated[float, Option(help="Points, on validation images.")] = 0.5
    values: Values = "fp32"
    model: Annotated[str | None, Option(help="The package.module:factory of a study of your own code; it is run.")] = (
        None
    )


@command
def pick(how: PickOptions, json: Json = False) -> None:
    """Pick a study's best network within limits: chosen on validation images, reported on test images, exported."""
    from ._deploy import run_pick

    run_pick(how, as_json=json)


@command
def list_(
    what: Annotated[str, Argument(help="attacks, models, data, presets, pruners, ... or nothing for all.")] = "",
    json: Json = False,
) -> None:
    """Show what there is of everything."""
    from ._info import show_list

    show_list(what, as_json=json)


@command
def doctor(data_dir: DataDir = None, json: Json = False) -> None:
    """Say whether this machine is ready: versions, cores, and which data are found where."""
    from ._info import show_doctor

    show_doctor(data_dir, as_json=json)
