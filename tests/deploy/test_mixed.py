"""Networks of which parts have no sparse kernel: attention, gates, norms of each image, recurrence."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparring import deploy, graph
from sparring.deploy._artefact import MAGIC
from sparring.deploy._compile import compile_model
from sparring.deploy._mixed import Mixed, Timed
from sparring.deploy._program import Dense, Sparse
from sparring.deploy._reference import run_reference
from sparring.deploy._runtime import Packed
from sparring.deploy._spans import spans_of
from sparring.deploy.kernels._engine import no_answer
from sparring.deploy.rounding._reference import run_rounded
from sparring.errors import Unsupported, UserError
from tests.zoo import ZOO

SHAPE = (1, 8, 8)


class Mixer(nn.Module):
    """MLPs over places, then over channels, as MLP-Mixer has them."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm1, self.norm2 = nn.Conv2d(1, 8, 2, 2), nn.LayerNorm(8), nn.LayerNorm(8)
        self.tokens = nn.Sequential(nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 16))
        self.channels = nn.Sequential(nn.Linear(8, 12), nn.GELU(approximate="tanh"), nn.Linear(12, 8))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2)
        h = h + self.tokens(self.norm1(h).transpose(1, 2)).transpose(1, 2)
        h = h + self.channels(self.norm2(h))
        return self.head(h.mean(1))


class Gated(nn.Module):
    """MobileNetV3's block: hard activations and a gate for each channel; a transposed convolution behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(1, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.reduce, self.expand = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.up, self.head = nn.ConvTranspose2d(8, 4, 2, 2), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = F.hardswish(self.depthwise(F.hardswish(self.stem(x))))
        gate = F.hardsigmoid(self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(h, 1)))))
        return self.head(F.leaky_relu(self.up(h * gate), 0.1).flatten(1))


class Rows(nn.Module):
    """Rows through layers that take steps before images: attention and a recurrent layer, read by its state."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16)
        self.rnn, self.head = nn.GRU(8, 6, 2, bidirectional=True), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        states = self.rnn(self.encoder(x[:, 0].transpose(0, 1)))[1]
        return self.head(torch.cat([states[-1], states[-2]], 1))


class Summed(nn.Module):
    """Attention written with einsum, and groups shuffled as ShuffleNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.heads, self.head = nn.Conv2d(1, 8, 3, 2, 1), nn.Linear(16, 32), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = F.channel_shuffle(self.conv(x), 2)
        q, k = self.heads(h.flatten(2)).chunk(2, -1)
        weights = torch.einsum("bid,bjd->bij", q, k).div(4).softmax(-1)
        return self.head(torch.einsum("bij,bjd->bid", weights, h.flatten(2)).flatten(1))


class Masked(nn.Module):
    """Values chosen by comparisons, which are truth values, and windows through a convolution of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.own, self.head = nn.Conv2d(1, 8, 3, 2, 1), nn.Conv2d(8, 4, 2), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        h[(h < 0) & (h > -0.2)] = 0.1
        h = torch.where(h > 0.5, h.tanh(), h) * (h != 0.1)
        parts = h.unflatten(3, (2, 2)).permute(0, 3, 1, 2, 4).flatten(0, 1)
        return self.head(self.own(parts).amax(2).view(len(x), 2, -1).amax(1).repeat(1, 4))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    **{
        name: ZOO[name]
        for name in ("squeeze-excite", "attention", "recurrent", "convnext", "swin", "dense-concatenation")
    },
    "mixer": Mixer,
    "gated": Gated,
    "rows": Rows,
    "summed": Summed,
    "masked": Masked,
}


@pytest.fixture(autouse=True, scope="module")
def lowered_once() -> Iterator[None]:
    """Lower each network once: packing and exporting it, in floats and in integers, begin with the same graph."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "lower", functools.cache(graph.lower))
        yield


@functools.cache
def sparse(name: str, density: float = 0.3) -> nn.Module:
    torch.manual_seed(0)
    model, generator = NETWORKS[name]().eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(torch.rand(parameter.shape, generator=generator) < density)
    return model


def images(count: int) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(count))


@torch.no_grad()
def assert_close(found: Tensor, model: nn.Module, x: Tensor) -> None:
    """Hold logits against the model in double precision: 5e-6 of the largest, or twice torch's own error."""
    expected = copy.deepcopy(model).double()(x.double())
    own = (model(x) - expected).abs().max()
    assert (found - expected).abs().max() <= max(5e-6 * float(expected.abs().max()), 2 * float(own))


@pytest.mark.parametrize("name", NETWORKS)
def test_packed_exported_and_loaded_it_gives_the_models_logits_and_gradients(tmp_path: Path, name: str) -> None:
    model = sparse(name)
    packed = deploy.pack(model, shape=SHAPE)
    loaded = deploy.load(deploy.export(model, tmp_path / "net.sparring", shape=SHAPE))
    assert packed.native and packed.has_gradient == packed.program.whole
    for count in (1, 5, 70):
        x = images(count)
        for run in (packed, loaded, deploy.Equivalent(loaded.program)):
            assert_close(run(x).detach(), model, x)
        assert_close(torch.from_numpy(run_reference(loaded.program, x.numpy())), model, x)
        assert torch.equal(packed(x), packed(x))
    x = images(5).requires_grad_()
    found, expected = (torch.autograd.grad(net(x).sum(), x)[0] for net in (deploy.PackedModule(packed), model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("density", [1.0, 0.3, 0.0])
def test_however_it_is_cut_a_program_gives_the_same(density: float) -> None:
    for name in ("swin", "gated"):
        model = sparse(name, 0.25)
        program = compile_model(model, SHAPE)
        assert_close(torch.from_numpy(Mixed(program, density).run(images(9).numpy())), model, images(9))


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_layers_compute_in_integers_and_the_rest_in_floats(tmp_path: Path, name: str) -> None:
    """A last bit of the floats may decide a rounding, so that logits are only nearly those of plain integers."""
    model, path = sparse(name), tmp_path / "net.sparring"
    packed = deploy.pack(model, shape=SHAPE, values="int8", calibrate=images(64))
    loaded = deploy.load(deploy.export(model, path, shape=SHAPE, values="int8", calibrate=images(64)))
    assert packed.native and packed.program.rounding == loaded.program.rounding
    for count in (1, 5, 70):
        x = images(count)
        expected, largest = run_rounded(packed.program, x.numpy()), float(model(x).abs().max())
        for run in (packed, loaded):
            assert np.abs(run(x).numpy() - expected).max() < 0.02 * largest
        assert np.abs(model(x).numpy() - expected).max() < 0.1 * largest


def test_one_image_takes_the_short_way_after_a_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Timed, "_fastest", lambda self, x: self._ways[0]())
    first = nn.Linear(64, 32)
    model = nn.Sequential(nn.Flatten(), first, nn.ReLU(), nn.Linear(32, 10)).eval()
    with torch.no_grad():
        first.weight.mul_(torch.rand(32, 64) < 0.1)
    packed = deploy.load(deploy.export(model, tmp_path / "net.sparring", shape=SHAPE))
    x = images(1).numpy()
    logits = packed(x)
    assert isinstance(packed._runner, Timed) and packed._answer is not no_answer
    assert (packed(x) == logits).all()


class Tokens(nn.Module):
    """Linear layers over the last axis, in two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(21, 53), nn.Linear(37, 70), nn.Linear(70, 21)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.third(F.relu(self.second(self.first(x)[..., 16:])))).mean(1)


def tokens(count: int) -> tuple[nn.Module, Mixed, Tensor]:
    """Return a sparse network for `count` tokens, what runs it, and three images."""
    torch.manual_seed(0)
    model = Tokens().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(torch.rand(weight.shape) < 0.3)
    return model, Mixed(compile_model(model, (count, 21)), 1.0), torch.rand(3, count, 21)


@torch.no_grad()
@pytest.mark.parametrize("count", [2, 5, 16, 21, 22, 23, 24, 43, 65, 66, 69, 197])
def test_any_number_of_rows_gives_the_models_logits(count: int) -> None:
    """Rows that are left over make the last tile longer."""
    model, mixed, x = tokens(count)
    assert_close(torch.from_numpy(mixed.run(x.numpy())), model, x)
    assert_close(torch.from_numpy(mixed.run(x[:1].numpy())), model, x[:1])


@torch.no_grad()
@pytest.mark.parametrize("count", [2, 23, 69])
def test_rows_in_integers_give_the_bits_of_plain_integers(count: int) -> None:
    model, _, x = tokens(count)
    packed = deploy.pack(model, shape=(count, 21), values="int8", calibrate=x)
    assert (packed(x.numpy()) == run_rounded(packed.program, x.numpy())).all()


def test_parts_share_memory_but_not_between_threads() -> None:
    mixed, interval = tokens(197)[1], sys.getswitchinterval()
    batches = [torch.rand(16, 197, 21).numpy() for _ in range(8)]
    alone = [mixed.run(batch) for batch in batches]
    assert len(mixed._room) == 1
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(6) as pool:
            together = list(pool.map(mixed.run, batches * 30))
    finally:
        sys.setswitchinterval(interval)
    assert all((a == b).all() for a, b in zip(alone * 30, together, strict=True))


def test_sparse_kernels_get_all_layers_up_to_the_density() -> None:
    program = compile_model(sparse("mixer", 0.25), SHAPE)
    layers = [at for at, step in enumerate(program.steps) if isinstance(step.op, Sparse)]
    covered = {at for span in spans_of(program, 1.0) for at in range(span.start, span.stop)}
    assert len(layers) == 6 and set(layers) <= covered
    assert not any(isinstance(program.steps[at].op, Dense) for at in covered)
    assert not spans_of(program, 0.0)


def test_a_file_without_dense_operations_is_of_the_first_format(tmp_path: Path) -> None:
    formats = []
    for model in (nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), sparse("mixer")):
        data = deploy.export(model, tmp_path / "net.sparring", shape=SHAPE).read_bytes()
        formats.append(header_of(data)["format"])
    assert formats == [1, 2]


def header_of(data: bytes) -> dict[str, object]:
    found: dict[str, object] = json.loads(data[24 : 24 + int.from_bytes(data[16:24], "little")])
    return found


def with_header(data: bytes, header: object) -> bytes:
    """Return an artefact with another header and a right checksum."""
    length, text = int.from_bytes(data[16:24], "little"), json.dumps(header).encode()
    blobs = data[24 + length + -(24 + length) % 64 : -32]
    body = MAGIC + len(text).to_bytes(8, "little") + text + bytes(-(24 + len(text)) % 64) + blobs
    return body + hashlib.sha256(body).digest()


HOSTILE: dict[str, dict[str, object]] = {
    "no such operation": {"name": "system.default"},
    "one that a graph never holds": {"name": "set_.source_Tensor"},
    "one that writes": {"name": "add_.Tensor"},
    "one that draws": {"name": "scaled_dot_product_attention.default", "options": {"dropout_p": 0.5}},
    "an attribute": {"name": "__class__.__init__"},
    "an unknown keyword": {"options": {"nothing": 1}},
    "names of none": {"names": [1]},
    "too many names": {"names": ["self", "other"]},
    "an empty option": {"options": {"dim": {}}},
    "a tensor without end": {"options": {"dim": {"floats": [1 << 14, 1 << 14]}}},
    "an axis that is not there": {"name": "permute.default", "names": ["self"], "options": {"dims": [0, 9, 1, 2]}},
    "a value without end": {"name": "expand.default", "names": ["self"], "options": {"size": [-1, 1 << 40]}},
    "images made fewer": {"name": "narrow.default", "names": ["self"], "options": {"dim": 0, "start": 0, "length": 1}},
    "images summed": {"name": "sum.dim_IntList", "names": ["self"], "options": {"dim": [0], "keepdim": True}},
    "beyond its input": {
        "name": "index_select.default",
        "names": ["self"],
        "options": {"dim": 1, "index": {"integers": [1], "numbers": [0, 8]}},
    },
    "truth values": {"name": "any.dim", "names": ["self"], "options": {"dim": 1, "keepdim": True}},
    "nested without end": {"options": {"dim": [[[[[{"floats": 3}]]]]]}},
}


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gated") / "net.sparring"
    return deploy.export(sparse("gated"), path, shape=SHAPE).read_bytes()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_dense_operation_is_refused(tmp_path: Path, name: str, gated: bytes) -> None:
    data = gated
    header = header_of(data)
    steps = header["steps"]
    assert isinstance(steps, list)
    at = next(i for i, step in enumerate(steps) if step["op"] == "dense")
    steps[at] |= HOSTILE[name]
    (tmp_path / "hostile.sparring").write_bytes(with_header(data, header))
    with pytest.raises(UserError, match=r"hostile\.sparring"):
        deploy.load(tmp_path / "hostile.sparring")


def test_products_that_would_fill_memory_are_refused() -> None:
    huge = Dense("matmul.default", ("self", "other"))
    from sparring.deploy._program import Misfit, infer_shape

    with pytest.raises(Misfit, match="memory"):
        infer_shape(huge, [(1 << 13, 1, 1, 1 << 13), (1, 1 << 13, 1 << 13, 1)])
    assert infer_shape(huge, [(2, 3, 4), (2, 4, 5)]) == (2, 3, 5)


def test_what_has_no_packed_form_is_refused_with_a_way_out() -> None:
    class Single(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x.flatten(1).amax(1), x.flatten(1).amin(1)], 1)

    with pytest.raises(Unsupported, match=r"no packed form.*ONNX"):
        compile_model(Single(), SHAPE)


def test_without_kernels_numpy_and_torch_run_it() -> None:
    model = sparse("attention")
    packed = Packed(compile_model(model, SHAPE), native=False)
    assert not packed.native
    assert_close(torch.from_numpy(packed(np.ascontiguousarray(images(3).numpy()))), model, images(3))


def test_bench_times_it_in_the_engines_that_can(tmp_path: Path) -> None:
    rows = deploy.bench(sparse("squeeze-excite"), shape=SHAPE, batches=(2,), rounds=1, engines=("packed", "torch")).rows
    assert {"packed", "torch"} <= {row.engine for row in rows}
    assert all(row.logit_error < 1e-5 for row in rows if row.engine in ("packed", "torch"))
