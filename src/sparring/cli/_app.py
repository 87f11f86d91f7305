"""Define the commands: their options, as frozen records, and the library functions that they call.

A command may take records. Each field of a record becomes an option or an argument.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer
from typer import Argument, Option
from typer.core import TyperArgument, TyperCommand
from typer.models import ArgumentInfo

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


class _Command(TyperCommand):
    """A command whose help writes arguments as people type them: MODEL, neither {model} nor <str>."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters; arguments show no type, whatever typer's version."""
        found: list[Any] = list(super().get_params(ctx))
        for one in found:
            if isinstance(one, TyperArgument):
                shown: Any = one
                shown.display_type_rich = lambda ctx: None
                shown.get_usage_pieces = functools.partial(_usage, one)
        return found


def _usage(argument: TyperArgument, ctx: Any) -> list[str]:
    return [f"{argument.metavar}" if argument.required else f"[{argument.metavar}]"]


def command(function: Callable[..., int | None]) -> Callable[..., int | None]:
    """Make a function a command: the fields of its records become options."""
    own = _parameters(function)
    records: dict[str, Any] = {p.name: p.annotation for p in own if is_dataclass(p.annotation)}
    parts = {name: _parameters(record) for name, record in records.items()}

    @functools.wraps(function)
    def call(**given: Any) -> int | None:
        made = {name: record(**{p.name: given.pop(p.name) for p in parts[name]}) for name, record in records.items()}
        return function(**made, **given)

    whole = [one for parameter in own for one in parts.get(parameter.name, [parameter])]
    for one in whole:
        _name_value(one)
    call.__signature__ = inspect.Signature(whole)  # type: ignore[attr-defined]
    return app.command(name=function.__name__.rstrip("_"), cls=_Command)(call)


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return the parameters of a function or class as keywords, with their annotations resolved."""
    hints, parameters = get_type_hints(function, include_extras=True), inspect.signature(function).parameters
    return [p.replace(kind=p.KEYWORD_ONLY, annotation=hints[p.name]) for p in parameters.values()]


def _name_value(parameter: inspect.Parameter) -> None:
    """Say in a parameter's help what to type, in place of the name of a Python type."""
    (about,), kind = parameter.annotation.__metadata__, parameter.annotation.__origin__
    kinds = {str: "TEXT", Path: "PATH", int: "NUMBER", float: "NUMBER"}
    typed = parameter.name.upper() if isinstance(about, ArgumentInfo) else kinds.get((get_args(kind) or [kind])[0])
    about.metavar = about.metavar or typed


def _take_threads(threads: int | None) -> int | None:
    """Set the number of torch's threads."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    return threads


DataDir = Annotated[Path | None, Option("--data-dir", help="Search this folder for data first.")]
Download = Annotated[bool, Option("--download", help="Download missing files from their public source.")]
Resize = Annotated[
    str | None,
    Option(help="Resize your own images: length of the shorter side (such as 256), or HEIGHTxWIDTH to stretch."),
]
Crop = Annotated[
    str | None, Option(help="Crop your own images at the centre to this size, such as 224 or HEIGHTxWIDTH.")
]
Interpolation = Annotated[
    str | None, Option(help="Interpolate by: bilinear, bicubic, nearest, lanczos, box or hamming.")
]
Classes = Annotated[
    Path | None,
    Option(help="File with the network's classes in output order, one per line or JSON; the data may have fewer."),
]
Limit = Annotated[
    list[str] | None,
    Option(
        metavar="N|SPLIT=N",
        help="Use at most N images per split, balanced over classes, such as 500 or train=2000; repeatable.",
    ),
]
NoCache = Annotated[
    bool, Option("--no-cache", help="Decode images whenever they are used, not once into the cache folder.")
]
Device = Annotated[str, Option(help="Device: cpu, cuda:0, mps, or auto (a CUDA GPU if there is one).")]
Dtype = Annotated[str | None, Option(help="Number type: float32, float64, float16, bfloat16 [default: as stored].")]
Eps = Annotated[str, Option(help="Budget of adversarial training, in [0, 1], such as 0.1 or 8/255.")]
Budgets = Annotated[str, Option(help="Budgets in [0, 1], separated by commas, such as 0.1,8/255.")]
Images = Annotated[int, Option(help="Number of test images.", min=1)]
Json = Annotated[bool, Option("--json", help="Print the results as JSON, and everything else to standard error.")]
Study = Annotated[Path, Argument(help="Output folder of a study.")]
OutModel = Annotated[Path, Option("--out", "-o", help="Model file to write.")]
Quiet = Annotated[bool, Option("--quiet", help="Print plain lines instead of a live display.")]
Seed = Annotated[int, Option(help="Random seed.", min=0, max=2**32 - 1)]
Threads = Annotated[
    int | None,
    Option(min=1, max=1024, help="Number of threads [default: one per core].", callback=_take_threads),
]
Values = Annotated[str, Option(help="Number format of the weights: fp32, fp16 or int8.")]
Weights = Annotated[Path | None, Option(help="Safetensors file with the model's weights.")]
Mean = Annotated[str | None, Option(help="Mean per channel, passed to a factory, such as 0.5,0.5,0.5.")]
Std = Annotated[str | None, Option(help="Standard deviation per channel, passed to a factory, such as 0.5,0.5,0.5.")]
Model = Annotated[
    str,
    Argument(
        help="Model file (.safetensors, .sparring, .onnx), model name, timm:NAME, torchvision:NAME, hf:FOLDER or "
        "package.module:factory; append @FILE.safetensors to load weights."
    ),
]


@dataclass(frozen=True)
class DataSource:
    """Options that select a data set and say how its images are prepared.

    The last seven apply to a user's own files; networks from timm, torchvision and Hugging Face have their own
    defaults.
    """

    data: Annotated[str, Option(help="Name of a data set, or a path.")] = "mnist-5k"
    data_dir: DataDir = None
    download: Download = False
    resize: Resize = None
    crop: Crop = None
    interpolation: Interpolation = None
    classes: Classes = None
    limit: Limit = None
    no_cache: NoCache = False
    verbose: Annotated[bool, Option("--verbose", help="Name every ignored file and row of the data.")] = False


@dataclass(frozen=True)
class ModelSource:
    """Options that select a model: a file, an artefact, a name with weights, a library's network, or a user's factory.

    `model` may end in "@FILE", which is the same as `weights`.
    """

    model: Model
    weights: Weights = None
    mean: Mean = None
    std: Std = None

    def named(self) -> tuple[str, Path | None]:
        """Return the model's name, without its file, and the file of weights; raise UserError for two files."""
        cut = str.rpartition if self.model.startswith("hf:") else str.partition  # names of folders may contain an @
        name, mark, file = cut(self.model, "@")
        weights = file.endswith((".safetensors", ".pt", ".pth", ".ckpt", ".bin"))
        if not (mark and name and weights) or Path(self.model).is_file():
            return self.model, self.weights
        if self.weights is not None:
            raise UserError(f"'{self.model}' names its weights; drop --weights {self.weights}")
        return name, Path(file)


@dataclass(frozen=True)
class Where:
    """Where a model runs, and in which floating-point type."""

    device: Device = "auto"
    dtype: Dtype = None


def _show_version(asked: bool) -> None:
    """Print the version and exit, if requested."""
    if asked:
        from .. import __version__

        print(f"sparring {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
    traceback: Annotated[bool, Option("--traceback", help="Print the full traceback of an error.")] = False,
) -> None:
    """Measure, explain and exploit how sparsity changes a neural network's adversarial robustness."""


@dataclass(frozen=True)
class StudySource:
    """Options that select a plan, changes to it, its data, the output folder and the device."""

    plan: Annotated[str, Argument(help="Name of a preset (see `sparring list presets`) or a TOML file.")] = "quick"
    out: Annotated[Path | None, Option("--out", "-o", help="Output folder [default: out/PLAN].")] = None
    overrides: Annotated[
        list[str] | None,
        Option("--set", metavar="KEY=VALUE", help="Change a key of the plan, such as seeds=5 (TOML); repeatable."),
    ] = None
    model: Annotated[str | None, Option(help="Model name, or your own package.module:factory.")] = None
    weights: Weights = None
    data_dir: DataDir = None
    download: Download = False
    resize: Resize = None
    crop: Crop = None
    interpolation: Interpolation = None
    classes: Classes = None
    limit: Limit = None
    no_cache: NoCache = False
    device: Device = "auto"
    dtype: Dtype = None


@dataclass(frozen=True)
class StudyOptions:
    """Options of a study's execution; none of them changes a record."""

    workers: Annotated[
        int | None, Option(help="Number of parallel tasks [default: one per core].", min=0, max=1024)
    ] = None
    register: Annotated[
        bool, Option("--register", help="Register the plan's hash before the first record is written.")
    ] = False
    retry: Annotated[bool, Option("--retry", help="Retry failed tasks.")] = False
    ray: Annotated[str | None, Option(help="Run on the Ray cluster at this address, or auto.")] = None
    mlflow: Annotated[str | None, Option(help="Log progress to this MLflow URI.")] = None
    tensorboard: Annotated[Path | None, Option(help="Log progress to this folder for TensorBoard.")] = None
    quiet: Quiet = False


@command
def study(
    source: StudySource,
    how: StudyOptions,
    json: Json = False,
) -> int:
    """Run a study: train, prune, attack, and write the report. Rerun the same command to resume."""
    from ._study import run_study

    return run_study(source, how, as_json=json)


@command
def status(study: Study, json: Json = False) -> None:
    """Show the progress of a study; safe while it is running."""
    from ._study import show_status

    show_status(study, as_json=json)


@command
def merge(
    sources: Annotated[
        list[Path],
        Argument(metavar="STUDY...", help="Output folders of studies with the same data, model and recipe."),
    ],
    out: Annotated[Path | None, Option("--out", "-o", help="Output folder [default: the first folder].")] = None,
    json: Json = False,
) -> int:
    """Merge studies that ran separately, after verifying every hash."""
    from ._study import run_merge

    return run_merge(sources, out, as_json=json)


@command
def report(study: Study, json: Json = False) -> None:
    """Rebuild a study's report, CSV and figures from its records."""
    from ._study import rebuild

    rebuild(study, as_json=json)


@dataclass(frozen=True)
class TrainOptions:
    """Options that select a network and its training recipe."""

    model: Model
    out: OutModel
    recipe: Annotated[
        list[str] | None,
        Option("--set", metavar="KEY=VALUE", help="Change the recipe, such as epochs=5; repeatable."),
    ] = None
    width: Annotated[float | None, Option(help="Multiply the model's layer widths by this factor.")] = None
    depth: Annotated[int | None, Option(help="Depth of resnet-32: 6n + 2 layers.")] = None
    ramp: Annotated[
        float | None, Option(help="Fraction of the training over which eps grows to its value; helps with a large eps.")
    ] = None


@dataclass(frozen=True)
class FitOptions:
    """Options of training beside the recipe."""

    loss: Annotated[str, Option(help="Training loss: standard, pgd-at, trades, ibp or crown-ibp.")] = "standard"
    eps: Eps = "0.1"
    label_smoothing: Annotated[
        float | None, Option(help="Fraction of each label that is spread evenly over all classes.")
    ] = None
    kappa: Annotated[
        float | None, Option(help="Weight of the clean loss at the end of ibp and crown-ibp [default: 0.5].")
    ] = None
    stability: Annotated[float | None, Option(help="Weight of the ReLU-stability loss, for ibp and crown-ibp.")] = None
    seed: Seed = 0
    device: Device = "auto"
    dtype: Dtype = None
    threads: Threads = None
    quiet: Quiet = False


@command
def train(how: TrainOptions, data: DataSource, fit: FitOptions, json: Json = False) -> None:
    """Train a network and write it to a model file."""
    from ._train import run_train

    run_train(how, data, fit, as_json=json)


@command
def convert(
    checkpoint: Annotated[Path, Argument(help="File written by torch.save: .pt, .pth, .ckpt or .bin.")],
    out: Annotated[Path, Argument(help="Safetensors file to write.")],
    key: Annotated[
        str | None, Option(help="Select one of several sets of weights by its key, such as model_ema, or by a prefix.")
    ] = None,
    as_is: Annotated[
        bool, Option("--as-is", help="Keep parameter names, masks and norms as they are in the checkpoint.")
    ] = False,
    json: Json = False,
) -> None:
    """Convert a checkpoint to safetensors without running its code."""
    from ._train import run_convert

    run_convert(checkpoint, out, key, as_is=as_is, as_json=json)


@dataclass(frozen=True)
class PruneOptions:
    """Options of pruning."""

    out: OutModel
    sparsity: Annotated[
        float | None, Option(help="Fraction of weights to remove; omit it for method=dns with a c_rate.")
    ] = None
    options: Annotated[
        list[str] | None,
        Option(
            "--set",
            metavar="KEY=VALUE",
            help="Set an option of the method or the recipe, such as method=dns or epochs=5; repeatable.",
        ),
    ] = None


@command
def prune(model: ModelSource, how: PruneOptions, data: DataSource, fit: FitOptions, json: Json = False) -> None:
    """Prune a trained network, fine-tune it and write a model file."""
    from ._train import run_prune

    run_prune(model, how, data, fit, as_json=json)


@dataclass(frozen=True)
class AttackOptions:
    """Options of attacks: names, budgets and number of images."""

    attacks: Annotated[str, Option(help="Attacks, separated by commas; see `sparring list attacks`.")] = "fgsm,pgd,fast"
    options: Annotated[
        list[str] | None,
        Option(
            "--set",
            metavar="KEY=VALUE",
            help="Set an option for all attacks that have it, such as steps=100; repeatable.",
        ),
    ] = None
    norm: Annotated[str, Option(help="Norm: linf, l2, l1 or l0.")] = "linf"
    eps: Budgets = "0.1"
    images: Images = 1000
    checks: Annotated[int, Option(help="Number of images used by the reliability checks; 0 disables them.", min=0)] = (
        128
    )
    batch_size: Annotated[int | None, Option(help="Batch size [default: what memory allows].", min=1, max=100_000)] = (
        None
    )
    seed: Annotated[int, Option(help="Seed of random starts.", min=0, max=2**32 - 1)] = 0
    threads: Threads = None


@command
def attack(model: ModelSource, data: DataSource, how: AttackOptions, where: Where, json: Json = False) -> None:
    """Attack a classifier and print its robust accuracy."""
    from ._attack import run_attack

    run_attack(model, data, how, where, as_json=json)


@dataclass(frozen=True)
class CertifyOptions:
    """Options of certification."""

    norm: Annotated[str, Option(help="Norm: linf or l2.")] = "linf"
    method: Annotated[
        str | None, Option(help=f"Bound: {', '.join(BOUNDS)} [default: the tightest that fits in --seconds].")
    ] = None
    seconds: Annotated[float, Option(help="Time budget of opening, estimating, attacking and certifying.")] = 300.0
    eps: Budgets = "0.01,0.03"
    images: Images = 100
    threads: Threads = None


@command
def certify(model: ModelSource, data: DataSource, how: CertifyOptions, where: Where, json: Json = False) -> None:
    """Compute certified accuracy and radii, next to an attack."""
    from ._attack import run_certify

    run_certify(model, data, how, where, as_json=json)


@dataclass(frozen=True)
class VerifyOptions:
    """Options of verification."""

    eps: Annotated[str, Option(help="Radius of the ball around each test image, such as 0.03 or 8/255.")] = ""
    norm: Annotated[str, Option(help="Norm: linf or l2.")] = "linf"
    seconds: Annotated[float, Option(help="Time limit for each image or property, in seconds.")] = 60.0
    images: Images = 100
    counter_example: Annotated[
        Path | None, Option("--counter-example", help="Result file to write, in VNN-COMP's format.")
    ] = None
    threads: Threads = None


@command
def verify(
    model: ModelSource,
    how: VerifyOptions,
    data: DataSource,
    where: Where,
    property: Annotated[Path | None, Argument(help="Property in VNN-LIB 1; if you omit it, give --eps.")] = None,
    json: Json = False,
) -> int:
    """Verify labels within a budget, or a VNN-LIB property. Exit with code 1 if falsified, 3 if unknown."""
    from ._verify import run_verify

    return run_verify(model, property, how, data, where, as_json=json)


@dataclass(frozen=True)
class CompareOptions:
    """Options of a comparison, and the largest loss that the second may show."""

    first: Annotated[str, Argument(help="Baseline: a study's folder or a model file.")]
    second: Annotated[str, Argument(help="Candidate: a folder or file of the same kind.")]
    max_drop: Annotated[
        list[str] | None, Option(metavar="METRIC AMOUNT", help="Largest allowed drop of a metric; repeatable.")
    ] = None
    methods: Annotated[
        tuple[str, str] | None,
        Option(metavar="FIRST SECOND", help="The two methods, for studies [default: the headlines' methods]."),
    ] = None
    sparsities: Annotated[
        tuple[float, float] | None,
        Option(metavar="FIRST SECOND", help="The two sparsities, for studies [default: the headlines' sparsities]."),
    ] = None
    weights: Annotated[
        list[Path] | None,
        Option(metavar="FILE", help="Weights of each model that is not a file; repeat it for the second."),
    ] = None
    eps: Annotated[str, Option(help="Budget of the linf attacks, for models.")] = "0.1"
    images: Annotated[int, Option(help="Number of test images, for models.", min=1)] = 500
    threads: Threads = None


@command
def compare(how: CompareOptions, data: DataSource, where: Where, json: Json = False) -> int:
    """Compare two studies or models, paired by image. Exit with code 1 unless every --max-drop is shown to hold."""
    from ._compare import run_compare

    return run_compare(how, data, where, as_json=json)


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export and of the attack on the exported file."""

    out: Annotated[Path, Argument(help="File to write.")]
    format: Annotated[
        str | None,
        Option(help="packed (for the sparse runtime) or onnx [default: from the file's extension]."),
    ] = None
    values: Values = "fp32"
    activations: Annotated[
        str,
        Option(help="Number format of the activations: fp32, or int8, calibrated on validation images."),
    ] = "fp32"
    eps: Annotated[str, Option(help="Budget of the attack on the exported file.")] = "0.1"
    images: Annotated[int, Option(help="Number of test images.", min=2)] = 500
    seconds: Annotated[float, Option(help="Time budget of this attack: fewer images where they take longer.")] = 600.0
    threads: Threads = None


@command
def export(model: ModelSource, how: ExportOptions, data: DataSource, where: Where, json: Json = False) -> None:
    """Export a model to one file, attack it, and report its size."""
    from ._deploy import run_export

    run_export(model, how, data, where, as_json=json)


@dataclass(frozen=True)
class BenchOptions:
    """Options of a timing."""

    batches: Annotated[str, Option(help="Batch sizes, separated by commas.")] = "1,64,256"
    rounds: Annotated[int, Option(help="Number of interleaved rounds.", min=1)] = 30
    small: Annotated[str | None, Option(help="Also time this small dense network of equal accuracy.")] = None
    engines: Annotated[str | None, Option(help="Engines, separated by commas [default: all installed].")] = None
    plot: Annotated[Path | None, Option(help="Plot the times to this .svg or .png file.")] = None
    device: Device = "cpu"  # auto would be unfair to the engines that use one core
    dtype: Dtype = None


@command
def bench(model: ModelSource, data: DataSource, how: BenchOptions, json: Json = False) -> None:
    """Time a model in every installed engine, and recommend one."""
    from ._deploy import run_bench

    run_bench(model, data, how, as_json=json)


@dataclass(frozen=True)
class PickOptions:
    """Options that limit the choice of a network, and the file to write."""

    study: Study
    out: Annotated[Path | None, Option("--out", "-o", help="File to write [default: in the study's folder].")] = None
    max_latency: Annotated[float | None, Option(help="Largest latency of one image, in milliseconds.")] = None
    max_accuracy_drop: Annotated[float, Option(help="Largest drop in validation accuracy, in points.")] = 0.5
    values: Values = "fp32"
    model: Annotated[str | None, Option(help="The package.module:factory to run, for a study of your own network.")] = (
        None
    )


@command
def pick(how: PickOptions, json: Json = False) -> None:
    """Choose a study's best network within limits, and export it. Limits apply to validation images."""
    from ._deploy import run_pick

    run_pick(how, as_json=json)


@command
def list_(
    what: Annotated[
        str, Argument(help="Category, such as attacks, models, data, presets or pruners [default: all].")
    ] = "",
    json: Json = False,
) -> None:
    """List attacks, data sets, models, presets, pruners and more."""
    from ._info import show_list

    show_list(what, as_json=json)


@command
def doctor(data_dir: DataDir = None, json: Json = False) -> None:
    """Show versions, cores, memory, extras and data sets found here."""
    from ._info import show_doctor

    show_doctor(data_dir, as_json=json)
