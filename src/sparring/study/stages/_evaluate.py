"""Stages that evaluate networks: sizes and accuracies, attacks, transfer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ... import attacks, deploy
from ...data import as_float
from ...draws import Draws
from ...errors import Unsupported, UserError
from ...metrics import accuracy, distances, macs, pixel_distances, robust_accuracy, size
from ...sparsity import Declared, activity
from ...threat import L0
from ...train import predict
from ..runner._executors import Task, TaskOutcome
from ._inputs import Attack, Lend, Measure, Shard, Transfer
from ._networks import Context, chosen_images, chosen_places, judged, network_of

ACTIVITY_IMAGES = 1000
# Tolerances between a packed network and the network itself, before attacks may use it.
LOGIT_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-2


def measure(context: Context, task: Task[Measure]) -> TaskOutcome:
    """Count a network's weights and measure its accuracies and natural activation sparsity."""
    data = context.dataset
    model = judged(context, task)
    logits, logits_valid = (predict(model, part.x, progress=context.tell) for part in (data.test, data.valid))
    if not bool(torch.isfinite(logits).all()):
        raise UserError("the network's logits are NaN or infinite; its training diverged")
    model = model.cpu()  # the rest only counts, and needs no GPU
    counted = size(model, as_float(data.test.x[:2]))
    shape, flags = tuple(data.test.x.shape[1:]), []
    dense: int | None
    sparse: int | None
    try:
        dense, sparse = macs(model, shape)
    except Unsupported as reason:
        dense, sparse = None, None
        flags.append({"name": "no-macs", "detail": str(reason)})
    active = activity(model, data.test.x[:ACTIVITY_IMAGES])
    # The two shares differ only if some matrix cannot be pruned, or is made dense.
    same = (counted.weights, counted.nonzero_weights) == (counted.matrices, counted.nonzero_matrices)
    total = {} if same else {"sparsity_matrices": counted.sparsity_matrices}
    weights = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    first = next(iter(weights.values())).detach()
    return TaskOutcome(
        {
            "accuracy": accuracy(logits, data.test.y),
            "accuracy_valid": accuracy(logits_valid, data.valid.y),
            "sparsity": counted.sparsity,
            "sparsity_total": counted.sparsity_total,
            **total,
            "parameters": counted.parameters,
            "nonzero": counted.nonzero,
            "bytes_dense": counted.bytes_dense,
            "bytes_sparse": min(counted.bytes_dense, counted.bytes_sparse),
            "macs_dense": dense,
            "macs": sparse,
            "activation_sparsity": active.sparsity,
        },
        {
            "density": {name: float(p.count_nonzero()) / p.numel() for name, p in weights.items()},
            "activation_sparsity": {layer.name: layer.sparsity for layer in active.layers},
            "dead_units": {layer.name: len(layer.dead) for layer in active.layers},
        },
        flags=flags,
        tensors={
            "correct": logits.argmax(1) == data.test.y,
            "correct_valid": logits_valid.argmax(1) == data.valid.y,
            "label": data.test.y,
            "images": torch.arange(len(data.test.y)).int(),
            "first_weight": first.clone(),
            "first_mask": first != 0,
        },
    )


def attack(context: Context, task: Task[Attack]) -> TaskOutcome:
    """Attack one shard of images; a second parent has examples on the dense control to transfer (`lend`)."""
    inputs = task.inputs
    model = judged(context, task)
    x, y = _images(context, inputs)
    loans = [found for loan in task.parents[1:] for _, found in sorted(context.tensors(loan).items())]
    lent = [found.to(context.device) for found in loans]
    through, flags = _packed(model, x[:8]) if inputs.kernels == "packed" else (None, [])
    result = _run(model, x, y, inputs, {"dense control": lent}, context.tell, through)
    metrics: dict[str, float | None] = {
        "forwards": result.forwards,
        "backwards": result.backwards,
        "success": float(result.success.double().mean()),
    }
    if inputs.attack.eps is None:
        found = distances(result.distance, result.clean_correct)
        metrics |= {
            "mean_distance": found.mean,
            "mean_distance_correct": found.mean_correct,
            "median_distance_correct": found.median_correct,
            "failed": found.failed,
        }
    else:
        metrics["robust_accuracy"] = robust_accuracy(result.clean_correct, result.success)
    tensors = {
        "distance": result.distance,
        "success": result.success,
        "clean_correct": result.clean_correct,
        "label": y,
        "images": _places(context, inputs),
    }
    if inputs.attack.threat == (L0, None) and x.shape[1] > 1:
        tensors["pixels"] = pixel_distances(result.x_adv, x, result.distance)
        metrics["mean_pixels"] = distances(tensors["pixels"], result.clean_correct).mean
    if inputs.gallery:
        tensors["clean"] = x[: inputs.gallery]
        tensors["perturbed"] = result.x_adv[: inputs.gallery].clone()
    flags += [{"name": flag.name, "detail": flag.detail} for flag in result.flags]
    return TaskOutcome(metrics, flags=flags, tensors=tensors)


def lend(context: Context, task: Task[Lend]) -> TaskOutcome:
    """Attack one shard of images on a network whose examples are transferred to others: `loan0`, and so on."""
    inputs = task.inputs
    model, (x, y) = network_of(context, inputs, task.parents[0]).eval(), _images(context, inputs)
    asked = inputs.attack
    draws = _draws(inputs, x)
    found = attacks.lend(model, x, y, asked.attack, asked.threat, batch_size=inputs.batch_size, generator=draws)
    return TaskOutcome({}, tensors={f"loan{place}": examples for place, examples in enumerate(found)})


def transfer(context: Context, task: Task[Transfer]) -> TaskOutcome:
    """Attack the first parent's network and try its adversarial images on the second's."""
    inputs = task.inputs
    source, target = (network_of(context, inputs, key).eval() for key in task.parents)
    images, y = _images(context, inputs)
    result = _run(source, images, y, inputs, {}, context.tell)
    with torch.no_grad():
        right = torch.cat([target(part).argmax(1) for part in torch.split(images, inputs.batch_size)]) == y
        fooled = torch.cat([target(part).argmax(1) for part in torch.split(result.x_adv, inputs.batch_size)]) != y
    counted = right & result.success
    moved = float((fooled & counted).sum()) / max(1, int(counted.sum()))
    metrics: dict[str, float | None] = {"transferred": moved if bool(counted.any()) else None}
    metrics["robust_accuracy"] = robust_accuracy(right, fooled)
    tensors = {"success": fooled & counted, "clean_correct": counted, "label": y}
    return TaskOutcome(metrics, tensors=tensors | {"images": _places(context, inputs)})


def _packed(model: nn.Module, x: Tensor) -> tuple[nn.Module | None, list[dict[str, str]]]:
    """Return a network in its packed form, or None and a flag with the reason why attacks cannot use it."""
    try:
        packed = deploy.pack(model, shape=tuple(x.shape[1:]), images=x)
    except Unsupported as reason:
        return None, [{"name": "no-packed-form", "detail": f"attacked in torch: {reason}"}]
    if not packed.program.whole:
        return None, [{"name": "no-packed-form", "detail": "attacked in torch, which runs parts of it anyway"}]
    if not packed.native:  # NumPy would round differently from other machines' records under this key
        raise UserError("no kernels can be generated here; run the study with --set kernels=torch")
    through = deploy.PackedModule(packed)
    if _agree(model, through, x):
        return through, []
    return None, [{"name": "packed-form-differs", "detail": "attacked in torch because logits or gradients differ"}]


def _agree(model: nn.Module, through: nn.Module, x: Tensor) -> bool:
    """Compare logits and input gradients of a few images; a maximum of equal values may pass it to another."""
    logits, gradients = [], []
    for network in (model, through):
        point = x.clone().requires_grad_()
        logits.append(network(point))
        gradients.append(torch.autograd.grad(logits[-1].logsumexp(1).sum(), point)[0].flatten(1))
    error = (logits[0] - logits[1]).abs().max() / logits[0].abs().max().clamp_min(1e-30)
    apart = (gradients[0] - gradients[1]).norm(dim=1) / gradients[0].norm(dim=1).clamp_min(1e-30)
    return bool(error <= LOGIT_TOLERANCE) and bool(apart.median() <= GRADIENT_TOLERANCE)


def _images(context: Context, inputs: Shard) -> tuple[Tensor, Tensor]:
    """Return the images and labels of a task's shard, on the device of its networks."""
    x, y = chosen_images(context.dataset, inputs.split, inputs.start, inputs.stop)
    return context.place.images(as_float(x)), y.to(context.device)


def _places(context: Context, inputs: Shard) -> Tensor:
    return chosen_places(context.dataset, inputs.split, inputs.start, inputs.stop)


def _run(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    inputs: Shard,
    lent: Mapping[str, Sequence[Tensor]],
    tell: Callable[[int, int], None],
    through: nn.Module | None = None,
) -> attacks.AttackResult:
    if inputs.attack.naive:
        for module in model.modules():
            if isinstance(module, Declared):
                module.masks_gradients = False
    return attacks.run(
        model,
        x,
        y,
        inputs.attack.attack,
        inputs.attack.threat,
        surrogates={},
        lent=lent,
        through=through,
        batch_size=inputs.batch_size,
        generator=_draws(inputs, x),
        progress=lambda _, done, images: tell(int(done), images),
    )


def _draws(inputs: Shard, x: Tensor) -> Draws:
    """Return the random numbers of a shard's images, by each image's position in the fixed order of all."""
    return Draws.of(inputs.seed, range(inputs.start, inputs.start + len(x)), x.device)
