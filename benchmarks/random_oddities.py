"""The steps of random models that have no rule in the graph, or that make them no function of one image alone."""

from __future__ import annotations

from random_models import Draft, Form
from random_steps import late, rooted, same

__all__ = ["ENDINGS", "ODD"]


def _wide(d: Draft) -> str:
    """Return the text of a batch of matrices that fits h as a column."""
    return f"{d.parameter(1, 1, 2)}.expand(len(h), h[0].numel(), 2)"


def _tokens(d: Draft) -> str:
    """Return the text of a query, keys and values."""
    return f"[h.flatten(1)[:, :, None].expand(-1, -1, {d.last})] * 3"


# What has no rule, or is no function of one image alone: it may be refused, and must never be misread.
ODD: dict[str, tuple[Form, ...]] = {
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
    "dropout that is on": (
        lambda d: f"h = F.dropout(h, {d.pick('0.5', '0.2')})",
        "h = F.dropout(h, p=0.5, training=True, inplace=True)",
        "h = F.dropout(h)",
    ),
    "noise": (
        "h = h + 0.3 * torch.randn_like(h)",
        "h = h + 0.3 * torch.randn(1)",
        "h = h * (1 + 0.5 * torch.rand(h.shape[1:]))",
        "h = h + torch.bernoulli(torch.full_like(h, 0.5))",
        "h = h + torch.empty_like(h).uniform_(-0.5, 0.5)",
        "h = h + torch.normal(0.0, 0.4, size=(1,))",
        "h = torch.empty(h.shape) * 0 + h",
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
    "without a rule": (
        lambda d: f"h = torch.baddbmm({d.parameter(1, 1, 2)}, h.flatten(1)[:, None], {_wide(d)}, beta=2)",
        lambda d: f"h = {d.layer(f'nn.MultiheadAttention({d.last}, 1, batch_first=True)')}(*{_tokens(d)})[0]",
        "h = F.lp_pool2d(h, 2, 2)",
        lambda d: f"h = {d.layer(f'nn.GRU({d.last}, 3)')}(h.flatten(1).view(1, len(h), -1))[0][0]",
        lambda d: f"h = torch.einsum('n...i,io->n...o', h, {d.parameter(d.last, 3)})",
        lambda d: f"h = {d.layer(f'nn.Bilinear({d.last}, {d.last}, 3)')}(h, h)",
        lambda d: f"h = {same(d)}(h)\nh.transpose(1, -1)[:, :1].zero_()",
        lambda d: f"h = {same(d)}(h)\nh.view(-1)[::2].mul_(2)",
        lambda d: f"h = {same(d)}(h)\nh.data.mul_(2)",
        lambda d: f"h = {same(d)}(h)\nh.index_fill_(1, torch.tensor([0]), 0.7)",
        "h.data[:, :1] = 0.3",
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
