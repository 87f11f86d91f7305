"""The steps of random models that have a rule in the graph and in the bounds, each in the ways that people write it."""

from __future__ import annotations

import math

from random_models import Draft, Form

__all__ = ["BOUNDED", "hooked", "late", "rooted", "same"]


def _convolution(d: Draft) -> str:
    kernel = d.pick("1", "2", "3", "(1, 2)", "(2, 1)")
    rest = d.pick(
        "", ", padding=1", ", stride=2, padding=1", ", padding=(0, 1)", ", dilation=2, padding=2", ", bias=False"
    )
    same = (
        d.pick("", "", ', padding="same"', ', padding="valid"')
        if "stride" not in rest and "padding" not in rest
        else ""
    )
    return d.layer(f"nn.Conv2d({d.channels}, {d.width(4)}, {kernel}{rest}{same})")


def _grouped(d: Draft) -> str:
    return d.layer(f"nn.Conv2d({d.channels}, {2 * d.channels}, 2, padding=1, groups={d.channels})")


def _functional_convolution(d: Draft) -> str:
    wide = d.width(4)
    weight, bias = d.parameter(wide, d.channels, 2, 2), d.parameter(wide)
    return d.pick(
        f"h = F.conv2d(h, {weight}, {bias}, padding=1)",
        f"h = F.conv2d(input=h, weight={weight}, bias={bias}, stride=(1, 2), padding=(1, 1))",
        f"h = F.conv2d(h, {weight}, padding=2, dilation=2)",
        f"h = F.conv2d(h, {weight}, {bias}, 2, 1)",
        f"h = torch.conv2d(h, {weight}, {bias}, padding=1)",
        f"h = F.conv2d(h, {weight} - {weight}.mean((1, 2, 3), keepdim=True), {bias}, padding=1)",
    )


def _norm(d: Draft) -> str:
    size, kind = d.channels, "nn.BatchNorm1d" if len(d.shape) == 1 else "nn.BatchNorm2d"
    options = d.pick("", "", ", affine=False", ", eps=0.3")
    name = d.layer(f"{kind}({size}{options})")
    d.init.append(f"{name}.running_mean.uniform_(-1, 1)")
    d.init.append(f"{name}.running_var.uniform_(0.3, 2)")
    if "affine" not in options:
        d.init.append(f"nn.init.uniform_({name}.weight, -1, 2)")
        d.init.append(f"nn.init.uniform_({name}.bias, -1, 1)")
    return name


def _functional_norm(d: Draft) -> str:
    def vector(low: float, high: float) -> str:
        name = d.name("s")
        d.init.append(f'self.register_buffer("{name}", torch.empty({d.channels}).uniform_({low}, {high}))')
        return f"self.{name}"

    mean, var, weight, bias = vector(-1, 1), vector(0.3, 2), vector(-1, 2), vector(-1, 1)
    return d.pick(
        f"h = F.batch_norm(h, {mean}, {var})",
        f"h = F.batch_norm(h, {mean}, {var}, weight={weight}, bias={bias}, eps=0.2)",
        f"h = F.batch_norm(h, {mean}, {var}, bias={bias}, weight={weight}, training=False)",
        f"h = F.batch_norm(h, {mean}, {var}, {weight}, {bias}, self.training)",
    )


RELU: tuple[Form, ...] = (
    "h = F.relu(h)",
    "h = h.relu()",
    "h = torch.relu(h)",
    "h = F.relu(h, inplace=True)",
    "h = h.relu_()",
    "h.relu_()",
    "torch.relu_(h)",
    "h = h.clamp(min=0)",
    "h = torch.clamp(h, min=0.0)",
    "h.clamp_(min=0)",
    "h = h.clamp_min(0)",
    lambda d: f"h = {d.layer('nn.ReLU()')}(h)",
    lambda d: f"h = {d.layer('nn.ReLU(inplace=True)')}(h)",
    lambda d: f"{d.layer('nn.ReLU(inplace=True)')}(h)",
)


def relu(d: Draft) -> str:
    form = d.draw.choice(RELU)
    return form if isinstance(form, str) else form(d)


def same(d: Draft) -> str:
    """Return the text of a layer that keeps the shape of h."""
    if len(d.shape) == 3 and d.draw.random() < 0.7:
        return d.layer(f"nn.Conv2d({d.channels}, {d.channels}, 3, padding=1)")
    return d.layer(f"nn.Linear({d.last}, {d.last})")


BOUNDED: dict[str, tuple[Form, ...]] = {
    "linear": (
        lambda d: f"h = {d.linear()}(h)",
        lambda d: f"h = {d.linear()}(input=h)",
        lambda d: f"h = F.linear(h, {d.parameter(d.width(), d.last)})",
        lambda d: f"h = F.linear(input=h, bias={d.parameter(4)}, weight={d.parameter(4, d.last)})",
        lambda d: f"h = h @ {d.parameter(d.last, d.width())}",
        lambda d: f"h = torch.matmul(h, {d.parameter(d.width(), d.last)}.t())",
        lambda d: f"h = torch.addmm({d.parameter(3)}, h, {d.parameter(d.last, 3)})",
        lambda d: f"h = torch.addmm({d.parameter(3)}, h, {d.parameter(d.last, 3)}, beta=0.5, alpha=-2)",
        lambda d: f"h = F.linear(h, {d.parameter(3, d.last)}.abs(), {d.parameter(3)} * 2)",
    ),
    "conv2d": (
        lambda d: f"h = {_convolution(d)}(h)",
        lambda d: f"h = {_convolution(d)}(h)",
        lambda d: f"h = {_grouped(d)}(h)",
        _functional_convolution,
    ),
    "batch_norm (running statistics)": (lambda d: f"h = {_norm(d)}(h)", _functional_norm),
    "relu": RELU,
    "max_pool2d": (
        lambda d: f"h = {d.layer('nn.MaxPool2d(2)')}(h)",
        lambda d: f"h = {d.layer('nn.MaxPool2d(2, stride=1, padding=1)')}(h)",
        "h = F.max_pool2d(h, 2, stride=1)",
        "h = F.max_pool2d(h, kernel_size=2, padding=1)",
        "h = F.max_pool2d(h, 2, ceil_mode=True)",
        "h = F.max_pool2d(h, (1, 2), (1, 1), (0, 1))",
        "h = F.max_pool2d(h, 2, 1, 1, 2)",
    ),
    "avg_pool2d": (
        lambda d: f"h = {d.layer('nn.AvgPool2d(2)')}(h)",
        lambda d: f"h = {d.layer('nn.AvgPool2d((1, 2), stride=1)')}(h)",
        "h = F.avg_pool2d(h, 2, stride=1)",
        "h = F.avg_pool2d(h, (2, 1))",
        "h = F.avg_pool2d(input=h, kernel_size=(1, 2))",
    ),
    "adaptive_avg_pool2d (even windows)": (
        lambda d: f"h = {d.layer('nn.AdaptiveAvgPool2d(1)')}(h)",
        "h = F.adaptive_avg_pool2d(h, (1, 1))",
    ),
    "mean over the image axes": (
        "h = h.mean((2, 3))",
        "h = h.mean(dim=(-1, -2))",
        "h = torch.mean(h, dim=[2, 3], keepdim=True)",
    ),
    "flatten": (
        "h = h.flatten(1)",
        "h = torch.flatten(h, start_dim=1)",
        "h = torch.flatten(h, 1, -1)",
        "h = h.view(len(h), -1)",
        "h = h.view(h.size(0), -1)",
        "h = h.reshape(x.shape[0], -1)",
        lambda d: f"h = {d.layer('nn.Flatten()')}(h)",
        lambda d: f"h = h.reshape(-1, {math.prod(d.shape)})",
    ),
    "arithmetic with numbers": (
        lambda d: f"h = h + {d.number()}",
        lambda d: f"h = (h - 0.5) / {d.number()}",
        lambda d: f"h = {d.number()} - h",
        lambda d: f"h = {d.number()} * h",
        lambda d: f"h = h / {d.pick('2', '10', '-3')}",
        "h = 2 * h - 1",
        "h = -h",
        lambda d: f"h = torch.add(h, {d.number()}, alpha={d.pick('2', '-1', '0.5')})",
        lambda d: f"h = torch.sub(h, {d.number()}, alpha={d.pick('2', '-1', '0.5')})",
        lambda d: f"h = torch.rsub(h, {d.number()}, alpha=2)",
        lambda d: f"h = torch.mul(other={d.number()}, input=h)",
        lambda d: f"h = torch.div(h, {d.number()}, rounding_mode=None)",
        "h = torch.neg(h)",
        lambda d: f"h = torch.divide(torch.multiply(h, {d.number()}), {d.number()})",
        lambda d: f"h = torch.subtract(h, {d.number()}, alpha=2)",
        lambda d: f"h = h.sub({d.number()}).mul({d.number()})",
    ),
    "arithmetic with constants": (
        lambda d: f"h = h + {d.broadcast()}",
        lambda d: f"h = h - {d.broadcast()}",
        lambda d: f"h = {d.broadcast()} - h",
        lambda d: f"h = h * {d.broadcast()}",
        lambda d: f"h = h / {d.broadcast()}",
        lambda d: f"h = torch.add(h, {d.broadcast()}, alpha=-2)",
        lambda d: f"h = torch.sub(h, {d.broadcast()}, alpha=3)",
        lambda d: f"h = torch.add({d.broadcast()}, h, alpha=0.5)",
        lambda d: f"h = (h - {d.broadcast()}) / {d.broadcast()}",
        lambda d: f"h = h * {d.constant(d.shape, 'torch.bool')}",
    ),
    "arithmetic in place": (
        lambda d: f"h = h * 1\nh += {d.number()}",
        lambda d: f"h = h + 0\nh *= {d.broadcast()}",
        lambda d: f"h = h.clone()\nh.add_({d.number()}, alpha=3)",
        lambda d: f"h = h.clone()\nh.sub_(0.5).div_({d.number()})",
        lambda d: f"h = h.clone()\nh.neg_()\nh.sub_({d.broadcast()}, alpha=2)",
        lambda d: f"h.mul_({d.number()})",
        lambda d: f"h -= {d.number()}",
        lambda d: f"h.div_({d.number()})",
    ),
    "sum of two tensors": (
        lambda d: f"h = h + {same(d)}(h)",
        lambda d: f"g = h\nh = {same(d)}(F.relu(h))\nh = h + g",
        lambda d: f"g = {same(d)}(h)\nh = {same(d)}(h)\nh += g",
        lambda d: f"h = torch.add({same(d)}(h), h)",
        lambda d: f"g = {same(d)}(h)\nh = g + h + g",
        "h = h + h",
    ),
    "weighted sum of two tensors": (
        lambda d: f"h = h - {same(d)}(h)",
        lambda d: f"h = torch.add(h, {same(d)}(h), alpha={d.number()})",
        lambda d: f"h = torch.sub({same(d)}(h), h, alpha=2)",
        lambda d: f"g = {same(d)}(h)\ng.sub_(h, alpha=0.5)\nh = g",
        lambda d: f"g = {same(d)}(h)\nh = 0.3 * g + h / 2",
        lambda d: f"g = {same(d)}(h)\nh = g.add_(h, alpha={d.number()})",
    ),
    "in place before a shortcut": (
        lambda d: f"h = {same(d)}(h)\ng = h\n{relu(d)}\nh = {same(d)}(h)\nh += g",
        lambda d: f"g = h = {same(d)}(h)\nh = {d.layer('nn.ReLU(inplace=True)')}(h)\nh = {same(d)}(h) + g",
        lambda d: f"g = h = {same(d)}(h)\ng += {d.number()}\nh = h.relu() + g",
        lambda d: f"g = {same(d)}(h)\nh = {same(d)}(g)\ng.mul_({d.number()})\nh = h + g",
        lambda d: f"h = {same(d)}(h)\ng = F.relu(h)\nh.mul_(-1)\nh = h + g",
        lambda d: f"h = {same(d)}(h)\ng = h.clone()\nh.relu_()\nh = {same(d)}(h) + g",
        lambda d: f"h = {same(d)}(h)\ng = h.detach()\nh = h.clone().mul_(2) + g",
        lambda d: f"h = {same(d)}(h)\ng = h.flatten(1)\ng.relu_()\nh = h + 1",
        lambda d: f"g = h = {same(d)}(h)\nF.relu_(h)\nh = {same(d)}(h) + g.view_as(h)",
    ),
    "does nothing": (
        lambda d: f"h = {d.layer('nn.Identity()')}(h)",
        "h = h.contiguous()",
        "h = h.clone()",
        "h = torch.empty_like(h).copy_(h)",
        "h = h.to(x.dtype)",
        "h = h.type_as(x)",
        "h = h.view_as(h)",
        "h = h.squeeze(-1).unsqueeze(-1) if h.shape[-1] == 1 else h",
    ),
    "dropout that is off": (
        lambda d: f"h = {d.layer('nn.Dropout(0.5)')}(h)",
        lambda d: f"h = {d.layer('nn.Dropout(0.5, inplace=True)')}(h)",
        lambda d: f"h = {d.layer('nn.Dropout2d(0.3)')}(h)",
        "h = F.dropout(h, 0.5, self.training)",
        "h = F.dropout(h, training=False)",
        "h = F.dropout(h, p=0.3, training=self.training, inplace=True)",
        "if self.training:\n    h = h + torch.randn_like(h)",
    ),
    "branch on the shape": (
        "if h.dim() == 2:\n    h = h + 1\nelse:\n    h = h - 1",
        "if h.shape[1] > 2:\n    h = -h",
        lambda d: f"for layer in ({same(d)}, {same(d)}):\n    h = F.relu(layer(h))",
    ),
    "a layer used twice": (
        lambda d: (lambda layer: f"h = {layer}(F.relu({layer}(h)))")(same(d)),
        lambda d: (lambda act: f"h = {act}(h)\nh = {same(d)}(h)\nh = {act}(h)")(d.layer("nn.ReLU(inplace=True)")),
        lambda d: (lambda layer: f"h = {layer}(h) + {layer}(-h)")(same(d)),
        lambda d: f"h = F.linear(h, {d.linear()}.weight)",
    ),
    "a hook that does nothing": (lambda d: hooked(d, "lambda m, a, out: None", "forward"),),
    "forward hook": (
        lambda d: hooked(d, f"lambda m, a, out: out * {d.number()}", "forward"),
        lambda d: hooked(d, "lambda m, a, out: out.relu()", "forward"),
        lambda d: hooked(d, "lambda m, a, out: out.relu_()", "forward"),
        lambda d: hooked(d, f"lambda m, a, out: out + {d.number()}", "forward"),
        lambda d: hooked(d, "lambda m, a, out: out.sub_(0.5) * 2", "forward"),
    ),
    "forward pre-hook": (
        lambda d: hooked(d, "lambda m, a: ((a[0] - 0.5) / 0.25,)", "forward_pre"),
        lambda d: hooked(d, "lambda m, a: a[0].relu()", "forward_pre"),
        lambda d: rooted(d, "model.register_forward_pre_hook(lambda m, a: ((a[0] - 0.5) / 0.2,))"),
    ),
    "forward of an instance": (
        lambda d: _replaced(d, "F.linear(x, self.weight, self.bias) * 3 + 1"),
        lambda d: _replaced(d, "F.linear(x, -self.weight)"),
        lambda d: rooted(d, "inner = model.forward\nmodel.forward = lambda x: inner((x - 0.5) / 0.2)"),
    ),
    "parametrised weights": (
        lambda d: _wrapped(d, "parametrizations.weight_norm({})"),
        lambda d: _wrapped(d, "parametrizations.spectral_norm({})"),
        lambda d: _wrapped(d, 'prune.l1_unstructured({}, "weight", 0.5)'),
        lambda d: _wrapped(d, 'parametrize.register_parametrization({}, "weight", nn.Softsign())'),
    ),
}


def late(d: Draft, layer: str, text: str) -> str:
    """Have build() do something to a layer, and forward() call it."""
    d.after.append(text.format(layer.replace("self.", "model.")))
    return f"h = {layer}(h)"


def hooked(d: Draft, hook: str, kind: str) -> str:
    return late(d, same(d), f"{{}}.register_{kind}_hook({hook.replace('{', '{{')})")


def rooted(d: Draft, text: str) -> str:
    d.after.extend(text.splitlines())
    return f"h = {same(d)}(h)"


def _replaced(d: Draft, text: str) -> str:
    layer = d.layer(f"nn.Linear({d.last}, {d.width()})")
    return late(d, layer, f"{{0}}.forward = types.MethodType(lambda self, x: {text}, {{0}})")


def _wrapped(d: Draft, text: str) -> str:
    return late(d, same(d), text)
