"""The steps of random models that the graph holds, though most have no rule in the bounds."""

from __future__ import annotations

from random_models import Draft, Form
from random_steps import hooked, late, rooted, same

__all__ = ["LOWERED"]


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


def _wrapping(d: Draft) -> str:
    return d.layer(f'nn.Conv2d({d.channels}, 2, 2, padding=1, padding_mode="circular")')


LOWERED: dict[str, tuple[Form, ...]] = {
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
    "average pool with a divisor": (
        "h = F.avg_pool2d(h, 2, divisor_override=1)",
        "h = F.avg_pool2d(h, 2, 1, 0, False, True, 2)",
        lambda d: f"h = {d.layer('nn.AvgPool2d((1, 2), 1, divisor_override=3)')}(h)",
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
    "constants made in forward()": (
        lambda d: f"h = h + torch.linspace(0, 1, {d.last})",
        lambda d: f"h = h * torch.arange(1, {d.last + 1})",
        lambda d: f"h = torch.where({d.constant(d.shape, 'torch.bool')}, h, -h)",
        lambda d: f"h = h.masked_fill({d.constant(d.shape, 'torch.bool')}, 0.5)",
        lambda d: f"h = h * torch.full_like(h, {d.number()})",
        lambda d: f"h = h + h.new_tensor({d.number()})",
        lambda d: "h = h * torch.ones(h.shape[1:]) * math.sqrt(2)",
        lambda d: f"h = h * {d.parameter(*d.shape)}.softmax(0)",
    ),
    "cut gradients": (
        "h = h.detach()",
        "h = h.detach() * 2 + h - h.detach()",
        "with torch.no_grad():\n    h = F.relu(h)",
        "h = (h > 0).to(h.dtype).detach() + h - h.detach()",
        "h = torch.utils.checkpoint.checkpoint(F.relu, h, use_reentrant=False)",
        lambda d: late(d, same(d), "{0}.weight.requires_grad_(False)"),
        lambda d: late(d, same(d), "{0}.register_full_backward_hook(lambda m, a, b: None)"),
    ),
    "pooling with keywords": (
        "h = F.avg_pool2d(h, 2, padding=1)",
        "h = F.avg_pool2d(h, 2, stride=1, padding=1, count_include_pad=False)",
        "h = F.avg_pool2d(h, 2, ceil_mode=True)",
        "h = F.adaptive_avg_pool2d(h, (2, 2))",
        "h = F.adaptive_max_pool2d(h, 1)",
        "h = F.max_pool2d(h, 2, 1, return_indices=True)[0]",
        "h = F.interpolate(h, scale_factor=2)",
        "h = F.pixel_unshuffle(h, 1)",
    ),
    "normalisation, recurrence, transposed and one-dimensional convolution": (
        lambda d: f"h = {d.layer(f'nn.LayerNorm({d.last})')}(h)",
        lambda d: f"h = {d.layer(f'nn.GroupNorm(1, {d.channels})')}(h)",
        lambda d: f"h = {d.layer(f'nn.InstanceNorm2d({d.channels})')}(h)",
        lambda d: f"h = {d.layer(f'nn.ConvTranspose2d({d.channels}, 2, 2)')}(h)",
        lambda d: f"h = {_wrapping(d)}(h)",
        lambda d: f"h = {d.layer(f'nn.LSTM({d.last}, 3, batch_first=True)')}({_tokens(d)})[0][:, -1]",
        lambda d: f"h = F.conv1d(h.flatten(1)[:, None], {d.parameter(2, 1, 1)})",
        lambda d: f"h = torch.bmm(h.flatten(1)[:, None], {_wide(d)})",
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
        lambda d: f"h = {same(d)}(h)\nh.copy_(h.flip(1))",
        lambda d: f"h = {same(d)}(h)\nwith torch.no_grad():\n    h.clamp_(min=0)",
        lambda d: f"h = {same(d)}(h)\nh.masked_fill_(h < 0, 0.3)",
        "x.sub_(0.5)\nh = h + x",
    ),
    "hooks of other kinds": (
        lambda d: hooked(d, "lambda m, a, out: out.flip(1)", "forward"),
        lambda d: hooked(d, "lambda m, a, out: out.clamp(-0.2, 0.2)", "forward"),
        lambda d: rooted(d, "model.register_forward_hook(lambda m, a, out: out.flip(1))"),
        lambda d: late(d, same(d), "{0}.register_forward_hook(lambda m, a, k, out: out * 2, with_kwargs=True)"),
        lambda d: late(d, same(d), "{0}.register_forward_pre_hook(lambda m, a: (a[0].mul_(2), None)[1])"),
        lambda d: late(d, same(d), "{0}.register_forward_hook(lambda m, a, out: out.mul_(-2))"),
        lambda d: rooted(d, "call = nn.Module.__call__\ntype(model).__call__ = lambda self, x: call(self, 1 - x)"),
    ),
}
