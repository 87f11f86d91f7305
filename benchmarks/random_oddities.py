"""The steps of random models that have no rule in the graph, or that make them no function of one image alone."""

from __future__ import annotations

from random_models import Draft, Form
from random_steps import hooked, late, rooted, same

__all__ = ["ENDINGS", "ODD"]


def _index(d: Draft, axis: int) -> str:
    """Return an index, with its batch axis, that takes part of h."""
    size = d.shape[axis]
    part = d.pick(":1", "1:", ":-1", "::2", "0", "-1", str(d.order(size)), str(d.order(size)[: max(1, size - 1)]))
    return ":, " * (axis + 1) + part


def _slice(d: Draft) -> str:
    """Return an index that is a view of h."""
    axis = d.draw.randrange(len(d.shape))
    return ":, " * (axis + 1) + d.pick(":1", "1:", ":-1", "::2", "0", "-1")


def _merged(d: Draft) -> str:
    """Return one number an image, that broadcasts against h."""
    return "flatten(1).sum(1).view(-1, *[1] * (h.dim() - 1))"


def _wide(d: Draft) -> str:
    """Return the text of a batch of matrices that fits h as a column."""
    return f"{d.parameter(1, 1, 2)}.expand(len(h), h[0].numel(), 2)"


def _tokens(d: Draft) -> str:
    return f"h.flatten(1).view(len(h), -1, {d.last})"


# What has no rule, or is no function of one image alone: it may be refused, and must never be misread.
ODD: dict[str, tuple[Form, ...]] = {
    "smooth activation": (
        "h = torch.sigmoid(h)",
        "h = h.tanh_()",
        "h = F.gelu(h)",
        "h = F.silu(h, inplace=True)",
        "h = F.softmax(h, dim=1)",
        "h = F.softplus(h)",
        "h = h.exp()",
        "h = h ** 2",
        lambda d: f"h = {d.layer('nn.ELU(inplace=True)')}(h)",
    ),
    "piecewise linear activation": (
        "h = F.relu6(h * 4)",
        "h = F.leaky_relu(h, 0.2)",
        "h = F.leaky_relu_(h, negative_slope=0.3)",
        lambda d: f"h = {d.layer('nn.LeakyReLU(0.1, inplace=True)')}(h)",
        "h = F.hardtanh(h, -0.5, 0.5)",
        "h = h.clamp(-0.3, 0.6)",
        "h = h.clamp(max=0.5)",
        "h = h.clamp(min=-0.2)",
        "h.clamp_(0, 0.5)",
        "h = h.abs()",
        "h = F.threshold(h, 0.2, -1.0)",
        "h = F.hardswish(h)",
        lambda d: f"h = {d.layer('nn.PReLU()')}(h)",
        "h = torch.maximum(h, torch.zeros_like(h))",
        "h = torch.where(h > 0, h, 0.3 * h)",
        "h = h * (h > 0)",
        "h = h.masked_fill(h < 0.1, 0.0)",
    ),
    "jump": (
        "h = torch.floor(4 * h)",
        "h = h + torch.sign(h)",
        "h = torch.div(h, 0.3, rounding_mode='floor')",
        "h = torch.div(h, 0.25, rounding_mode='trunc') + h",
        "h = h.round(decimals=1)",
        "h = h // 0.3",
        "h = h % 0.5",
        "h = (h > 0.2).to(h.dtype)",
    ),
    "pooling with keywords": (
        "h = F.avg_pool2d(h, 2, padding=1)",
        "h = F.avg_pool2d(h, 2, stride=1, padding=1, count_include_pad=False)",
        "h = F.avg_pool2d(h, 2, ceil_mode=True)",
        "h = F.adaptive_avg_pool2d(h, (2, 2))",
        "h = F.lp_pool2d(h, 2, 2)",
        "h = F.adaptive_max_pool2d(h, 1)",
        "h = F.max_pool2d(h, 2, 1, return_indices=True)[0]",
        "h = F.interpolate(h, scale_factor=2)",
        "h = F.pixel_unshuffle(h, 1)",
    ),
    "other layer": (
        lambda d: f"h = {d.layer(f'nn.LayerNorm({d.last})')}(h)",
        lambda d: f"h = {d.layer(f'nn.GroupNorm(1, {d.channels})')}(h)",
        lambda d: f"h = {d.layer(f'nn.InstanceNorm2d({d.channels})')}(h)",
        lambda d: f"h = {d.layer(f'nn.ConvTranspose2d({d.channels}, 2, 2)')}(h)",
        lambda d: f"h = {_wrapping(d)}(h)",
        lambda d: f"h = {d.layer(f'nn.LSTM({d.last}, 3, batch_first=True)')}({_tokens(d)})[0][:, -1]",
        lambda d: f"h = {d.layer(f'nn.GRU({d.last}, 3)')}(h.flatten(1).view(1, len(h), -1))[0][0]",
        lambda d: f"h = {d.layer(f'nn.MultiheadAttention({d.last}, 1, batch_first=True)')}(*[{_tokens(d)}] * 3)[0]",
        lambda d: f"h = F.conv1d(h.flatten(1)[:, None], {d.parameter(2, 1, 1)})",
        lambda d: f"h = torch.einsum('n...i,io->n...o', h, {d.parameter(d.last, 3)})",
        lambda d: f"h = torch.bmm(h.flatten(1)[:, None], {_wide(d)})",
        lambda d: f"h = {d.layer(f'nn.Bilinear({d.last}, {d.last}, 3)')}(h, h)",
    ),
    "two computed tensors": (
        lambda d: f"h = h * {same(d)}(h)",
        lambda d: f"h = h * torch.sigmoid({same(d)}(h))",
        lambda d: f"h = torch.maximum(h, {same(d)}(h))",
        lambda d: f"h = h / (1 + {same(d)}(h).abs())",
        lambda d: f"h = torch.addcmul(h, h, {same(d)}(h), value=2)",
        lambda d: f"h = torch.lerp(h, {same(d)}(h), 0.3)",
        lambda d: f"h = torch.addcdiv(h, {same(d)}(h), {d.constant(d.shape)}, value=-1)",
        "h = h + h.mean((2, 3), keepdim=True)",
        "h = h * h.mean((2, 3), keepdim=True).sigmoid()",
        "h = h + h.flatten(1).mean(1).view(-1, *[1] * (h.dim() - 1))",
        "h = h + h[:, :1]",
        "h = h - h.flatten(1)[:, 0].view(-1, *[1] * (h.dim() - 1))",
    ),
    "view, order and concatenation": (
        lambda d: f"h = h[{_index(d, 0)}]",
        lambda d: f"h = h[{_index(d, len(d.shape) - 1)}]",
        lambda d: f"h = torch.cat([h, {same(d)}(h)], 1)",
        lambda d: f"h = torch.cat((F.relu(h), {same(d)}(h)), dim=-1)",
        "h = torch.cat([h, -h], dim=1)",
        "h = torch.stack([h, 2 * h], 1)",
        "a, b = h.chunk(2, 1)\nh = b + a",
        "a, b = h.tensor_split(2, dim=-1)\nh = torch.cat([b, a], -1)",
        "h = h.flip(1)",
        "h = h.roll(1, -1)",
        "h = h.transpose(1, -1)",
        "h = h.permute(0, 2, 3, 1)",
        "h = h.mT",
        "h = F.pad(h, (1, 0), value=0.5)",
        "h = F.pad(h, (0, 1))",
        "h = h.flatten(2)",
        "h = h.unsqueeze(1)",
        "h = h.repeat(1, *[2] * (h.dim() - 1))",
        "h = h.view(len(h), -1, h.shape[1])",
        "h = h.sum(-1, keepdim=True)",
        "h = h.mean(-1)",
        "h = h.mean(1, keepdim=True)",
        "h = h.amax(-1)",
        "h = h.cumsum(1)",
        "h = h.sort(1).values",
        "h = h.topk(1, dim=1).values",
        "h = F.normalize(h, dim=1)",
        "h = h.index_select(1, torch.tensor([h.shape[1] - 1, 0]))",
        "h = h.view(len(h), 2, -1).transpose(1, 2).flatten(1)",
    ),
    "write into a view": (
        lambda d: f"h = {same(d)}(h)\nh[{_slice(d)}] = 0.5",
        lambda d: f"h = {same(d)}(h)\nh[{_slice(d)}] += {d.number()}",
        lambda d: f"h = {same(d)}(h)\nh[{_slice(d)}].mul_({d.number()})",
        lambda d: f"h = {same(d)}(h)\nv = h[{_slice(d)}]\nv.relu_()",
        lambda d: f"h = {same(d)}(h)\nv = h[{_slice(d)}]\nh.mul_({d.number()})\nh = h + v.{_merged(d)}",
        lambda d: f"h = {same(d)}(h)\nh.transpose(1, -1)[:, :1].zero_()",
        lambda d: f"h = {same(d)}(h)\nh.view(-1)[::2].mul_(2)",
        lambda d: f"h = {same(d)}(h)\nh.copy_(h.flip(1))",
        lambda d: f"h = {same(d)}(h)\nh.data.mul_(2)",
        lambda d: f"h = {same(d)}(h)\nwith torch.no_grad():\n    h.clamp_(min=0)",
        lambda d: f"h = {same(d)}(h)\nh.masked_fill_(h < 0, 0.3)",
        lambda d: f"h = {same(d)}(h)\nh.index_fill_(1, torch.tensor([0]), 0.7)",
        "x.sub_(0.5)\nh = h + x",
        "h.data[:, :1] = 0.3",
    ),
    "dropout that is on": (
        lambda d: f"h = F.dropout(h, {d.pick('0.5', '0.2')})",
        "h = F.dropout(h, p=0.5, training=True, inplace=True)",
        "h = F.dropout(h)",
    ),
    "average pool with a divisor": (
        "h = F.avg_pool2d(h, 2, divisor_override=1)",
        "h = F.avg_pool2d(h, 2, 1, 0, False, True, 2)",
        lambda d: f"h = {d.layer('nn.AvgPool2d((1, 2), 1, divisor_override=3)')}(h)",
    ),
    "noise": (
        "h = h + 0.3 * torch.randn_like(h)",
        "h = h + 0.3 * torch.randn(1)",
        "h = h * (1 + 0.5 * torch.rand(h.shape[1:]))",
        "h = h + torch.bernoulli(torch.full_like(h, 0.5))",
        "h = h + torch.empty_like(h).uniform_(-0.5, 0.5)",
        "h = h + torch.normal(0.0, 0.4, size=(1,))",
        "h = h + random.uniform(-0.5, 0.5)",
        "h = h + float(np.random.rand())",
        "h = h[:, torch.randperm(h.shape[1])]",
        "h = F.alpha_dropout(h, 0.4, training=True)",
        "h = F.dropout1d(h[:, None], 0.5)[:, 0]",
        lambda d: "h = h if torch.rand(()) < 0.5 else -h",
        "g = torch.Generator().manual_seed(0)\nh = h + 0.5 * torch.randn(h.shape, generator=g)",
        "torch.manual_seed(0)\nh = h + 0.5 * torch.randn(len(h), *[1] * (h.dim() - 1))",
        lambda d: late(d, same(d), "{0}.register_forward_hook(lambda m, a, out: F.dropout(out, 0.5))"),
        lambda d: f"h = {d.layer('nn.RReLU(0.1, 0.9)')}(h) + F.rrelu(h, 0.1, 0.9, training=True)",
    ),
    "mean over the batch": (
        "h = h - h.mean(0)",
        "h = h - h.mean(0, keepdim=True)",
        "h = h + h.mean(dim=0)",
        "h = h - h.amax(0)",
    ),
    "looks at the batch": (
        "h = h - h.mean()",
        "h = h / len(h)",
        "h = h / h.shape[0] * 2",
        "h = h - h[:1]",
        "h = h + h.roll(1, 0)",
        "h = h.flip(0)",
        "h = h.sort(0).values",
        "h = F.softmax(h, dim=0) * 5",
        "h = h.cumsum(0)",
        "h = h + torch.arange(len(h)).view(-1, *[1] * (h.dim() - 1))",
        "if len(h) == 1:\n    h = -h",
        "if len(h) > 4:\n    h = h * 2",
        "h[0] = 0.5",
        lambda d: f"h = {d.layer(f'nn.BatchNorm1d({d.channels}, track_running_stats=False)')}(h)",
        lambda d: "h = F.batch_norm(h, None, None, training=True)",
        lambda d: rooted(d, "model.register_forward_hook(lambda m, a, out: out - out.mean(0))"),
        "h = h.reshape(-1).view(h.shape[1], -1).t().reshape(h.shape) if h.dim() == 2 else h",
        lambda d: f"h = h + {d.constant((3, *d.shape))}",
    ),
    "branch or state": (
        "if h.sum() > 0:\n    h = -h",
        "if float(x[0].sum()) > 1:\n    h = h + 1",
        "h = h * float(h.abs().max())",
        "h = torch.from_numpy(h.detach().numpy() * 2)",
        "if torch.is_grad_enabled():\n    h = -h",
        "if x.requires_grad:\n    h = h * 2",
        "if not self.training:\n    h = h + 1",
        "self.calls = 1 - getattr(self, 'calls', 0)\nh = h * (1 + self.calls)",
        lambda d: (lambda c: f"{c}.add_(0.1)\nh = h + {c}")(_buffer(d)),
        lambda d: (lambda c: f"{c} = {c} + 0.2\nh = h * {c}")(_buffer(d)),
        "h = sum(h[:, i : i + 1] * float(i + 1) for i in range(h.shape[1]))",
        "h = torch.stack([row * 2 for row in h])",
        "h = torch.tensor(h.tolist())",
        "h = h if x.is_contiguous() else -h",
        "h = h * (2 if h.dtype == torch.float32 else 3)",
        "h = h + (0 if torch.compiler.is_exporting() else 1)",
    ),
    "types": (
        "h = h.half().float()",
        "h = h.bfloat16().float()",
        "h = h.to(torch.float16).to(x.dtype)",
        "h = h.double().float()",
        "h = h.float()",
        "h = (h * 255).to(torch.uint8).to(x.dtype) / 255",
        "h = (4 * h).int().float()",
        "h = h.to(torch.complex64).real",
        lambda d: f"with torch.autocast('cpu', torch.bfloat16):\n    h = {same(d)}(h)\nh = h.float()",
    ),
    "gradients": (
        "h = h.detach()",
        "h = h.detach() * 2 + h - h.detach()",
        "with torch.no_grad():\n    h = F.relu(h)",
        "h = (h > 0).to(h.dtype).detach() + h - h.detach()",
        "h = torch.utils.checkpoint.checkpoint(F.relu, h, use_reentrant=False)",
        lambda d: rooted(d, "model.head.weight.requires_grad_(False)"),
        lambda d: late(d, same(d), "{0}.register_full_backward_hook(lambda m, a, b: None)"),
    ),
    "odd hooks": (
        lambda d: hooked(d, "lambda m, a, out: out.flip(1)", "forward"),
        lambda d: hooked(d, "lambda m, a, out: out.clamp(-0.2, 0.2)", "forward"),
        lambda d: rooted(d, "model.register_forward_hook(lambda m, a, out: out.flip(1))"),
        lambda d: late(d, same(d), "{0}.register_forward_hook(lambda m, a, k, out: out * 2, with_kwargs=True)"),
        lambda d: late(d, same(d), "{0}.register_forward_pre_hook(lambda m, a: a[0].mul_(2) and None)"),
        lambda d: late(d, same(d), "{0}.register_forward_hook(lambda m, a, out: out.mul_(-2))"),
        lambda d: rooted(d, "call = nn.Module.__call__\ntype(model).__call__ = lambda self, x: call(self, 1 - x)"),
    ),
    "other tensors": (
        lambda d: f"h = h + torch.linspace(0, 1, {d.last})",
        lambda d: f"h = h * torch.arange(1, {d.last + 1})",
        lambda d: f"h = torch.where({d.constant(d.shape, 'torch.bool')}, h, -h)",
        lambda d: f"h = h.masked_fill({d.constant(d.shape, 'torch.bool')}, 0.5)",
        lambda d: f"h = h * torch.full_like(h, {d.number()})",
        lambda d: f"h = h + h.new_tensor({d.number()})",
        lambda d: "h = h * torch.ones(h.shape[1:]) * math.sqrt(2)",
        lambda d: f"h = torch.baddbmm({d.parameter(1, 1, 2)}, h.flatten(1)[:, None], {_wide(d)}, beta=2)",
        lambda d: f"h = h * {d.parameter(*d.shape)}.softmax(0)",
    ),
}

# What may follow the head.
ENDINGS: dict[str, tuple[Form, ...]] = {
    "arithmetic with numbers": (
        lambda d: f"h = h / {d.positive()}",
        lambda d: f"h = h + {d.number()}",
        lambda d: f"h = {d.positive()} * h",
        "h = -h",
    ),
    "arithmetic with constants": (
        lambda d: f"h = h + {d.constant(d.shape)}",
        lambda d: f"h = h * {d.constant(d.shape)}",
        lambda d: f"h -= {d.constant((1, *d.shape))}",
    ),
    "relu": ("h = F.relu(h)", "h.relu_()"),
    "odd ending": (
        "h = F.log_softmax(h, 1)",
        "h = h.softmax(-1)",
        "h = h.squeeze()",
        lambda d: f"h = h[:, {d.order(d.last)}]",
        "h = h.flip(-1)",
        "h = torch.cat([h, 0 * h[:, :1]], 1)",
        lambda d: f"h = h.masked_fill(torch.tensor({[False] * (d.last - 1) + [True]}), -1e4)",
        "h = h.double()",
        "h = h.unsqueeze(1).mean(1)",
        "h = h - h.mean(1, keepdim=True)",
        "h = h.view(-1, h.shape[1])",
    ),
}


def _buffer(d: Draft) -> str:
    name = d.name("state")
    d.init.append(f'self.register_buffer("{name}", torch.ones(()))')
    return f"self.{name}"


def _wrapping(d: Draft) -> str:
    return d.layer(f'nn.Conv2d({d.channels}, 2, 2, padding=1, padding_mode="circular")')
