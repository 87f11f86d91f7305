"""The graph is the model, whatever it is written with; or it is refused with operation, layer and line."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from sparring.declared import Declared
from sparring.errors import Unsupported, UserError
from sparring.graph import Call, Conv2d, Graph, Linear, SparseActivation, lower

SHAPE = (2, 4, 4)
Body = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """A convolution, anything at all, and a linear layer on whatever comes out."""

    gate: Tensor
    count: Tensor

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.register_buffer("gate", torch.tensor([0.0, 1.0, 0.5, 2.0]).view(4, 1, 1))
        self.register_buffer("count", torch.zeros(()))
        self.attention, self.rnn = nn.MultiheadAttention(4, 2), nn.GRU(16, 3, 2)
        self.row = nn.Parameter(torch.linspace(-1, 1, 4))
        with torch.no_grad():
            self.head = nn.Linear(self.features(torch.rand(3, *SHAPE)).shape[1], 3)

    def features(self, x: Tensor) -> Tensor:
        return self.body(self, self.conv(x)).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def attend(self, h: Tensor) -> Tensor:
        """Attend among the entries of the first axis."""
        found: Tensor = self.attention(h, h, h)[0]
        return found


def build(body: Body) -> Net:
    torch.manual_seed(0)
    return Net(body).eval()


def agree(graph: Callable[[Tensor], Tensor], model: nn.Module, count: int = 7) -> None:
    """Compare on other images than those on which `lower` compared, one alone and many together."""
    x = torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(5))
    for part in (x, x[:1]):
        with torch.no_grad():
            torch.testing.assert_close(graph(part).float(), model(part), rtol=1e-4, atol=1e-4)


def in_place_before_shortcut(net: Net, h: Tensor) -> Tensor:
    out = 2 * net.relu(h)
    out += h
    return out


def second_name(net: Net, h: Tensor) -> Tensor:
    y = h
    y += 1.0
    return h.relu() + y


def view_written(net: Net, h: Tensor) -> Tensor:
    h[:, 0] = 0.5
    h[:, 1:3].mul_(-2)
    h.flatten(2)[:, 3, ::2] += 1
    return h.relu()


def without_gradients(net: Net, h: Tensor) -> Tensor:
    with torch.no_grad():
        gate = torch.sigmoid(net.row).view(4, 1, 1)
    return h * gate + h.detach()


def part_zeroed(net: Net, h: Tensor) -> Tensor:
    h[:, ::2].zero_()
    return h.relu()


def planes_written(net: Net, h: Tensor) -> Tensor:
    other = torch.zeros_like(h)
    other[:, :, 1] = h[:, :, 2]
    h[:, 0].zero_()
    h[:, 1] = h[:, 3] * 2
    return h + other


def seen_through_a_view(net: Net, h: Tensor) -> Tensor:
    before, same = h.flatten(1), F.dropout(h, 0.5, training=False)
    h.relu_()
    return before + same.flatten(1)


def places_written(net: Net, h: Tensor) -> Tensor:
    h[:, [0, 2]] = 2 * h[:, [1, 3]]
    h[:, :, :, [1, 3]] = 0.25
    h[h > 0.5] = -1.0
    return h


COMPUTED: dict[str, Body] = {
    "places written to": places_written,
    "an operation that torch says with others": lambda net, h: (
        F.cosine_similarity(h, h[:, :1] + net.row, 3)[..., None] * torch.addr(net.row, net.row, net.row) + h.mT
    ),
    "planes written to": planes_written,
    "a write seen through a view": seen_through_a_view,
    "filters for each image": lambda net, h: F.conv2d(
        h.reshape(1, -1, 4, 4), h.amax(3).view(-1, 2, 2, 2), stride=2, padding=1, groups=2 * len(h)
    ).view(len(h), 2, 3, 3),
    "layers on windows": lambda net, h: (
        F.interpolate(
            F.max_pool2d(
                F.conv2d(h.unfold(3, 2, 2).permute(3, 0, 1, 2, 4).flatten(0, 1), torch.ones(4, 2, 2, 1), groups=2), 2, 1
            ).relu(),
            (3, 2),
        )
        .view(2, len(h), -1)
        .transpose(0, 1)
    ),
    "two batches as one": lambda net, h: torch.sub(*net.conv(torch.cat([h[:, :2], h[:, 2:].flip(3)])).chunk(2)),
    "the second batch of two": lambda net, h: (
        torch.cat([h.relu(), h.transpose(2, 3)]).tanh()[len(h) :]
        + torch.cat([h, 2 * h, -h]).view(3, -1, 4, 4, 4).amax(0)
    ),
    "other sizes": lambda net, h: (
        F.interpolate(h, 7, mode="bilinear", antialias=True)
        + F.interpolate(F.pad(h, (1, 1, 0, 1), mode="circular"), 7, mode="nearest-exact")
        + F.interpolate(F.pad(h.flatten(2), (2, 1), mode="reflect"), 49, mode="linear").view(len(h), 4, 7, 7)
    ),
    "patches": lambda net, h: (
        F.fold(F.unfold(h, 2).tanh(), 4, 2) + h.unfold(2, 2, 1).unfold(3, 3, 1).amax((2, 3, 4, 5))[..., None, None]
    ),
    "a spatial transformer": lambda net, h: F.grid_sample(
        h, F.affine_grid(h[:, :2, 1, :3] / 9 + torch.eye(2, 3), list(h.shape), align_corners=False), align_corners=False
    ),
    "a fixed grid": lambda net, h: F.grid_sample(
        h, F.affine_grid(torch.eye(2, 3)[None] / 2, [1, 4, 3, 5], False).expand(len(h), -1, -1, -1), align_corners=True
    ),
    "pairs of channels": lambda net, h: (h.mean(3)[:, :, None] * h.mean(3)[:, None])[:, *torch.triu_indices(4, 4)],
    "a table of places": lambda net, h: h.flatten(2)[:, :, torch.arange(4)[:, None] - torch.arange(3)] + 1,
    "a slice set to zero": part_zeroed,
    "a random slope that is off": lambda net, h: F.rrelu(h, training=net.training) + h,
    "in-place ReLU before a shortcut": in_place_before_shortcut,
    "functional in-place ReLU": lambda net, h: F.relu(h, inplace=True) + h,
    "method in-place ReLU": lambda net, h: h.relu_() + h,
    "augmented assignment to a second name": second_name,
    "views written to": view_written,
    "one number per image": lambda net, h: h.flatten(1) - h.flatten(1)[:, 0].view(-1, 1),
    "one tensor used twice": lambda net, h: h.relu() + F.avg_pool2d(h, 3, 1, 1),
    "one module used twice": lambda net, h: net.relu(net.relu(h - 0.5) * 2 - 1),
    "dropout that is off": lambda net, h: F.dropout(h, 0.5, net.training),
    "no_grad inside": without_gradients,
    "Python constants": lambda net, h: (1 - (h - 0.5) / 0.5) / 10 + 2,
    "a constant per channel": lambda net, h: h * net.gate + net.gate,
    "a constant per column": lambda net, h: h + net.row,
    "a constant per row": lambda net, h: h * net.row.view(4, 1),
    "a constant per pixel": lambda net, h: net.row.view(4, 1) - h * torch.outer(net.row, net.row),
    "a constant that widens": lambda net, h: h[:, :1] + net.gate,
    "alpha": lambda net, h: torch.add(h, h.relu(), alpha=2) - torch.sub(h, 1, alpha=3),
    "rsub": lambda net, h: torch.rsub(h, 1, alpha=2),
    "divisor_override": lambda net, h: F.avg_pool2d(h, 2, divisor_override=3),
    "count_include_pad": lambda net, h: F.avg_pool2d(h, 3, 1, 1, count_include_pad=False),
    "padded average": lambda net, h: F.avg_pool2d(h, 3, 2, 1, ceil_mode=True),
    "max pooling's keywords": lambda net, h: F.max_pool2d(h, 2, stride=1, padding=1, dilation=2, ceil_mode=True),
    "pooling with indices": lambda net, h: F.max_pool2d(h, 2, return_indices=True)[0],
    "maxima over even parts": lambda net, h: F.adaptive_max_pool2d(h, 2),
    "uneven adaptive pooling": lambda net, h: F.adaptive_avg_pool2d(h, 3),
    "mean over positions": lambda net, h: h.mean((2, 3)),
    "mean over channels": lambda net, h: h.mean(1, keepdim=True),
    "keywords of linear algebra": lambda net, h: torch.addmm(net.row, h.mean(3).flatten(1), torch.ones(16, 4), beta=2),
    "matrix product with a constant": lambda net, h: h @ torch.outer(net.row, net.row),
    "linear over columns": lambda net, h: F.linear(h, torch.outer(net.row, net.row), net.row),
    "flatten from the middle": lambda net, h: F.linear(h.flatten(2), torch.ones(2, 16)),
    "len of the batch": lambda net, h: h.view(len(h), -1),
    "size of the batch": lambda net, h: h.reshape(h.size(0), 2, -1).transpose(1, 2),
    "a token for each image": lambda net, h: torch.cat([net.row.expand(len(h), 1, -1), h.flatten(1, 2)], 1),
    "parts and together": lambda net, h: torch.cat([p.relu() for p in h.chunk(2, 1)] + [h[:, [3, 0]]], 1),
    "stack and unbind": lambda net, h: torch.stack(h.unbind(1)[::-1], 2),
    "squeeze and excite": lambda net, h: h * torch.sigmoid(h.mean((2, 3), keepdim=True)),
    "attention": lambda net, h: F.scaled_dot_product_attention(h, h + 1, h.relu()),
    "softmax in single precision": lambda net, h: F.softmax(h, 1, dtype=torch.float32).to(h.dtype),
    "softmax by hand": lambda net, h: h.exp() / h.exp().sum(1, keepdim=True),
    "normalised rows": lambda net, h: F.layer_norm(h, (4,), net.row) + F.group_norm(h, 2),
    "where and masks": lambda net, h: torch.where(h > 0, h, 0.1 * h) * (h < 1),
    "clamps": lambda net, h: F.relu6(3 * h) + h.clamp(min=0) + F.leaky_relu(h, 0.2) + F.hardtanh(h),
    "smooth": lambda net, h: F.silu(h) + F.gelu(h, approximate="tanh") + h.tanh() + F.softplus(h, beta=2),
    "interpolated": lambda net, h: F.interpolate(h, scale_factor=2, mode="bilinear", align_corners=True),
    "padded by reflection": lambda net, h: F.pad(h, (1, 1, 1, 1), mode="reflect"),
    "convolution with same": lambda net, h: F.conv2d(h, torch.ones(4, 1, 3, 3), padding="same", groups=4),
    "transposed convolution": lambda net, h: F.conv_transpose2d(h, torch.ones(4, 2, 2, 2), stride=2),
    "functional batch norm": lambda net, h: F.batch_norm(h, net.row, net.row.square() + 1, net.row, net.row),
    "weights computed": lambda net, h: F.conv2d(h, net.conv.weight.flip(0).repeat(1, 2, 1, 1).softmax(0)),
    "memory written before it is read": lambda net, h: torch.empty_like(h).copy_(h) + torch.zeros_like(h),
    "images in the middle": lambda net, h: h.flatten(2).permute(2, 0, 1).softmax(2).mul(2).transpose(0, 1) + 1,
    "heads before images": lambda net, h: torch.stack(
        h.flatten(2).view(len(h), 2, 2, -1).permute(1, 0, 2, 3).unbind(0), 1
    ),
    "windows as images": lambda net, h: (h.reshape(-1, 2, 16) @ h.reshape(-1, 16, 2)).view(len(h), -1),
    "rows of all images": lambda net, h: (
        F.linear(h.permute(2, 0, 1, 3).reshape(-1, 4), torch.ones(3, 4)).view(4, -1, 12).transpose(0, 1)
    ),
    "Einstein's sums": lambda net, h: torch.einsum("bchw,bdhv,ck->bhkdwv", h, h.relu(), torch.outer(net.row, net.row)),
    "tensordot": lambda net, h: torch.tensordot(h, torch.outer(net.row, net.row), dims=([2], [0])),
    "multihead attention over places": lambda net, h: net.attend(h.flatten(2).permute(2, 0, 1)).transpose(0, 1),
    "batch norm of places": lambda net, h: F.batch_norm(
        h.flatten(2).transpose(1, 2).flatten(0, 1), net.row, net.row.square() + 1, net.row, net.row
    ).view(len(h), 16, 4),
    "a recurrent state": lambda net, h: net.rnn(h.flatten(2).transpose(0, 1))[1][-1],
    "assertions and sizes": lambda net, h: (torch._assert(h.ndim == 4, "images"), h / h.shape[1])[1],
}


@pytest.mark.parametrize("name", list(COMPUTED))
def test_what_torch_computes_is_read(name: str) -> None:
    model = build(COMPUTED[name])
    graph = lower(model, SHAPE, dtype=torch.float64)
    agree(lambda x: graph(x.double()), model)


def test_writes_that_nothing_else_sees_need_no_second_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    def block(net: Net, h: Tensor) -> Tensor:
        out = net.relu(h * 2)
        out += h
        return F.dropout(F.leaky_relu_(out).mul_(net.gate).clamp_(max=3), 0.5, net.training)

    model = build(block)
    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", lambda *_: pytest.fail("captured again"))
    agree(lower(model, SHAPE), model)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_same_padding_of_an_even_kernel_is_read() -> None:
    model = build(lambda net, h: F.conv2d(h, torch.ones(4, 1, 2, 4), padding="same", groups=4))
    agree(lower(model, SHAPE), model)


REFUSED: dict[str, tuple[Body, str]] = {
    "functional dropout left on": (lambda net, h: F.dropout(h), "dropout.* is random"),
    "noise": (lambda net, h: h + 0.1 * torch.randn(1), "'randn'.* is random"),
    "noise in the tensor's shape": (lambda net, h: h + 0.1 * torch.rand_like(h), "'rand_like'.* is random"),
    "noise by numpy": (lambda net, h: h * float(torch.empty(1).uniform_()), "(second pass|Python number|is random)"),
    "the mean of the batch": (lambda net, h: h - h.mean(0), "'mean'.* batch axis"),
    "the norm of all": (lambda net, h: h / h.norm(), "batch axis"),
    "batch statistics": (lambda net, h: F.batch_norm(h, None, None, training=True), "normalises by the batch"),
    "softmax over images": (lambda net, h: h.flatten(1).softmax(0), "'softmax'.* batch axis"),
    "softmax over images that were moved": (lambda net, h: h.transpose(0, 1).softmax(1)[0], "batch axis"),
    "images chosen": (lambda net, h: h.transpose(0, 1)[:, :1].transpose(0, 1) + h, "batch axis|no rule"),
    "attention among images": (lambda net, h: net.attend(h.flatten(2).transpose(1, 2)), "images"),
    "places read as images": (
        lambda net, h: h.reshape(4, -1, 4, 4).transpose(0, 1),
        "images in the batch|mixes .*images",
    ),
    "products of images": (lambda net, h: torch.einsum("bchw,dchw->bd", h, h).sum(1, keepdim=True), "images"),
    "parts of two batches": (lambda net, h: torch.cat([h, 2 * h])[1 : len(h) + 1], "images"),
    "images rolled": (lambda net, h: h.roll(1, 0), "'roll'.* batch axis"),
    "the number of images": (lambda net, h: h * h.shape[0], "images"),
    "its length": (lambda net, h: h / len(h), "depend on other images"),
    "a number for each place": (lambda net, h: h + torch.arange(len(h)).view(-1, 1, 1, 1), "'arange'.* of images"),
    "a table of places": (lambda net, h: h + net.conv.weight.flatten()[: len(h), None, None, None], "number of images"),
    "a branch on more images than are asked": (lambda net, h: h * 2 if len(h) > 1000 else h, "number of images"),
    "a buffer that counts": (lambda net, h: h * (net.count.add_(1) > 40), "buffer 'count' changes in every call"),
    "a division by nought": (lambda net, h: (h / 0).nan_to_num(1.0), "'div'.* no rule"),
    "values that broadcast over images": (lambda net, h: (h.mean((2, 3)) + h[:, :1, 0]).mean(1), "axis"),
    "rounding": (lambda net, h: torch.div(h, 0.1, rounding_mode="floor"), "'div'.*rounding_mode=floor"),
    "steps": (lambda net, h: torch.round(4 * h), "'round'.* it jumps"),
    "whole numbers": (lambda net, h: (4 * h).int() / 4, "it jumps"),
    "softmax in half precision": (lambda net, h: F.softmax(h, 1, dtype=torch.bfloat16).float(), "rounds, and so jumps"),
    "half precision within": (lambda net, h: h.half().float(), "it rounds, and so jumps"),
    "memory never written": (lambda net, h: h + 0 * torch.empty_like(h), "differ|NaN"),
    "a branch on values": (lambda net, h: h if h.sum() > 0 else -h, "branches on a value"),
    "out through numpy": (lambda net, h: h * torch.from_numpy(h.detach().numpy()), "cannot be lowered"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_is_no_function_of_one_image_is_refused_by_name(name: str) -> None:
    body, message = REFUSED[name]
    with pytest.raises(Unsupported, match=message):
        lower(build(body), SHAPE)


def test_a_refusal_names_layer_line_and_way_out() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x)  # left on

    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 3), Noisy())
    with pytest.raises(Unsupported, match=r"layer '2', test_kinds\.py:\d+: return F\.dropout\(x\).*self\.training"):
        lower(model, SHAPE)


def test_a_refusal_names_the_innermost_line_of_helpers_and_hooks() -> None:
    model = plain()
    model[1].register_forward_hook(lambda module, given, output: torch.round(output))  # the hook's line
    with pytest.raises(Unsupported, match=r"layer '1', test_kinds\.py:\d+: .*# the hook's line"):
        lower(model, SHAPE)
    with pytest.raises(Unsupported, match=r'test_kinds\.py:\d+: "rounding": \(lambda net, h'):
        lower(build(REFUSED["rounding"][0]), SHAPE)


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(32, 6), nn.ReLU(), nn.Linear(6, 3)).eval()


def hooked(place: str) -> nn.Module:
    model = plain()
    if place == "root before":
        model.register_forward_pre_hook(lambda module, given: ((given[0] - 0.5) / 0.1,))
    elif place == "root after":
        model.register_forward_hook(lambda module, given, output: output[:, [1, 2, 0]])
    elif place == "gate":
        model[2].register_forward_hook(lambda module, given, output: output * torch.tensor([0.0, 1, 1, 0, 1, 2]))
    elif place == "clip":
        model[1].register_forward_hook(lambda module, given, output: output.clamp(-0.2, 0.2))
    elif place == "forward of a layer":
        model[1].forward = types.MethodType(lambda layer, x: F.linear(x, layer.weight * 4, layer.bias), model[1])
    elif place == "forward of the model":
        inner = model.forward
        model.forward = lambda x: inner(1 - x)  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize(
    "place", ["root before", "root after", "gate", "clip", "forward of a layer", "forward of the model"]
)
def test_hooks_and_replaced_forwards_count(place: str) -> None:
    model = hooked(place)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    agree(lower(model, SHAPE), model)
    assert not torch.allclose(model(x := torch.rand(4, *SHAPE)), plain()(x), atol=1e-3)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


def test_global_hooks_count() -> None:
    model = plain()
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, given, output: 2 * output if isinstance(module, nn.ReLU) else None
    )
    try:
        agree(lower(model, SHAPE), model)
    finally:
        handle.remove()
    with pytest.raises(AssertionError):
        agree(lower(model, SHAPE), hooked("gate"))


class Standardised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)


def test_subclasses_and_parametrisations_are_what_they_compute() -> None:
    torch.manual_seed(0)
    parametrised = nn.utils.parametrizations.weight_norm(nn.Linear(6, 3))
    pruned = nn.Linear(6, 6)
    prune.random_unstructured(pruned, "weight", 0.5)
    model = nn.Sequential(nn.Flatten(), Standardised(32, 6), nn.ReLU(), pruned, nn.ReLU(), parametrised).eval()
    graph = lower(model, SHAPE)
    agree(graph, model)
    # No parameter "weight" stands behind a weight that is computed.
    assert [node.op.name for node in graph.nodes if isinstance(node.op, Linear)] == ["", "", ""]


def test_parameters_keep_their_names_and_are_shared() -> None:
    model = build(lambda net, h: h.relu())
    found = {node.op.name: node.op for node in lower(model, SHAPE).nodes if isinstance(node.op, Linear | Conv2d)}
    assert set(found) == {"conv", "head"}
    assert all(op.weight is model.get_submodule(name).weight for name, op in found.items())
    assert all(not op.weight.requires_grad for op in _weights(lower(model, SHAPE, dtype=torch.float64)))


def _weights(graph: Graph) -> list[Linear | Conv2d]:
    return [node.op for node in graph.nodes if isinstance(node.op, Linear | Conv2d)]


class Counting(nn.Module):
    """Batch norm frozen inside a training model, a counting buffer, and a stochastic, declared activation."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(2)
        self.norm.eval()
        self.head = nn.Linear(32, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.norm(x).flatten(1))


def test_the_model_comes_back_as_it_was() -> None:
    model = Counting()
    model.head.bias.requires_grad_(False)
    model.head.register_forward_hook(lambda *args: None)
    modes = [module.training for module in model.modules()]
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    lower(model, SHAPE)
    assert [module.training for module in model.modules()] == modes == [True, False, True]
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False]
    assert len(model.head._forward_hooks) == 1 and "forward" not in vars(model.head)
    assert torch.equal(torch.get_rng_state(), state)


class Recent(nn.Module):
    """Subtract the mean of the last batch."""

    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        shifted = x - self.last
        self.last = x.mean()
        return shifted.flatten(1)[:, :3]


class Modal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3] * (2 if torch.is_grad_enabled() else 1)


class Squeezed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1, :1, :3].squeeze().sum(1, keepdim=True).expand(-1, 3)


class Crowded(nn.Module):
    """Give other logits once there are many images, where torch cannot see it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3] * (1 if torch.compiler.is_exporting() or len(x) < 20 else 2)


class Silent(nn.Module):
    """Subtract the number of a place in the batch, which shows in no small batch: all logits are zero there."""

    def forward(self, x: Tensor) -> Tensor:
        place = 0 if torch.compiler.is_exporting() else torch.arange(len(x))[:, None]
        return (x.flatten(1)[:, :3] + place - 20).relu()


class Rank(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Recent(), "in a second pass"),
        (Modal(), "when gradients are enabled"),
        (Crowded(), "in another batch"),
        (Silent(), "in another batch"),
        (Rank(), "logits"),
        (Squeezed(), "fails on one image alone"),
    ],
    ids=["remembers", "looks at the mode", "looks at the number", "counts places", "no logits", "squeezes"],
)
def test_what_answers_otherwise_is_refused(model: nn.Module, message: str) -> None:
    with pytest.raises((Unsupported, UserError), match=message):
        lower(model, SHAPE)
    assert not isinstance(model, Recent) or float(model.last) == 0


class Far(nn.Module):
    """Add and take away a number of the batch's: rounding alone tells, in float32 a ten thousandth of the logits."""

    def __init__(self, error: float = 0.0) -> None:
        super().__init__()
        self.first, self.error = nn.Linear(32, 3), error

    def forward(self, x: Tensor) -> Tensor:
        count = 0 if torch.compiler.is_exporting() else len(x)
        far = 8192 + 0.1 * count
        return (self.first(x.flatten(1)) + far) - (far + self.error * count)


def test_float64_tells_rounding_from_logits_that_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    graph = lower(Far(), SHAPE)
    assert 1e-4 < graph.rounding < 1e-2
    with pytest.raises(Unsupported, match="in another batch"):
        lower(Far(error=1e-5), SHAPE)


class Branchy(nn.Module):
    """Another network on one half of the images, decided where torch cannot see it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        scale = 1 if torch.compiler.is_exporting() else 2
        return self.second(self.first(x.flatten(1)) * scale)


def test_a_graph_that_differs_is_refused_with_the_first_layer() -> None:
    with pytest.raises(Unsupported, match=r"differ by .* of the largest, first in .*layer 'second'"):
        lower(Branchy(), SHAPE)


def test_the_images_at_hand_are_compared_too() -> None:
    class Rare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            rare = (x.flatten(1) == 0.25).all(1, keepdim=True)
            return self.head(x.flatten(1)) + (0 if torch.compiler.is_exporting() else rare)

    model = Rare()
    lower(model, SHAPE)
    with pytest.raises(Unsupported, match="differ"):
        lower(model, SHAPE, images=torch.full((3, *SHAPE), 0.25))


class Half(Declared):
    """A declared activation, stochastic if it is to be."""

    masks_gradients = True

    def __init__(self, *, stochastic: bool) -> None:
        super().__init__()
        self.stochastic, self.generator = stochastic, None

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.rand(x.shape, generator=self.generator) > 0.5 if self.stochastic else x > 0.1
        return x * kept


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_activation_modules_stay_whole_on_both_roads(stochastic: bool, wrapped: bool) -> None:
    model: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(32, 6), Half(stochastic=stochastic), nn.Linear(6, 3))
    if wrapped:
        model = build_wrapped(model)
    names = [node.op.name for node in lower(model, SHAPE).nodes if isinstance(node.op, SparseActivation)]
    assert names == ["inner.2" if wrapped else "2"]
    half = next(module for module in model.modules() if isinstance(module, Half))
    assert "forward" not in vars(half) and half.generator is None


def build_wrapped(inner: nn.Module) -> nn.Module:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inner(x)

    return Wrapped()


class Rows(nn.Module):
    def __init__(self, kind: type[nn.LSTM | nn.GRU | nn.RNN]) -> None:
        super().__init__()
        self.rows, self.head = kind(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rows(x[:, 0])[0][:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_one_operation(kind: type[nn.LSTM | nn.GRU | nn.RNN]) -> None:
    torch.manual_seed(0)
    model = Rows(kind)
    graph = lower(model, SHAPE)
    agree(graph, model)
    assert sum(isinstance(node.op, Call) and "dim" not in node.op.options for node in graph.nodes) == 1


class Attentive(nn.Module):
    """Rows of an image that look at each other, in training mode or by the fast path of eval mode."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, rows = x[:, 0], isinstance(self.layer, nn.MultiheadAttention)
        return self.head((self.layer(h, h, h)[0] if rows else self.layer(h)).mean(1))


@pytest.mark.parametrize(
    "layer", [nn.MultiheadAttention(4, 2, batch_first=True), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)]
)
def test_attention_that_moves_the_images_is_read(layer: nn.Module) -> None:
    model = Attentive(layer.eval())
    agree(lower(model, SHAPE), model)


def test_nothing_of_export_is_imported_for_a_plain_stack() -> None:
    code = (
        "import sys, torch; from torch import nn\n"
        "from sparring import attacks, bounds, deploy, graph, metrics, sparsity, study, train\n"
        "from sparring.threat import Threat\n"
        "model, x = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), torch.rand(2, 1, 2, 2)\n"
        "attacks.run(model, x, model(x).argmax(1), attacks.fgsm, Threat(float('inf'), 0.1))\n"
        "graph.lower(model, (1, 2, 2))\n"
        "sys.exit(bool({'sparring.graph._torch_export', 'torch.export._trace', 'torch._dynamo'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_models_of_other_precisions_are_lowered_in_theirs(dtype: torch.dtype) -> None:
    model = build(lambda net, h: (h - 0.5) / 0.5).to(dtype)
    for kind in (dtype, torch.float32):
        assert lower(model, SHAPE, dtype=kind)(torch.rand(2, *SHAPE, dtype=kind)).dtype == kind


def test_a_plain_stack_needs_no_export_and_gives_the_same_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    stack = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    ).eval()
    slow = lower(build_wrapped(stack), SHAPE)
    monkeypatch.setattr("torch.export.export", None)
    fast = lower(stack, SHAPE)
    assert [type(node.op) for node in fast.nodes] == [type(node.op) for node in slow.nodes][:-1]
    x = torch.rand(3, *SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(2 * fast(x), slow(x))
    with pytest.raises(Unsupported, match="not a plain stack"):
        lower(build_wrapped(stack), SHAPE, plain=True)


def test_an_activation_may_write_into_the_images() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(32, 3))
    model.register_forward_hook(lambda module, arguments, logits: logits + arguments[0].sum((1, 2, 3))[:, None])
    graph = lower(model, SHAPE, dtype=torch.float64)
    agree(lambda x: graph(x.double()), model)
