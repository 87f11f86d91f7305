"""ONNX files give a network's logits in ONNX Runtime, whatever it is made of."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from sparring import deploy
from sparring.errors import Unsupported
from tests.zoo import ZOO

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
SHAPE = (1, 8, 8)
TOLERANCE = 5e-6


def images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def error(model: nn.Module, path: Path, shape: tuple[int, ...] = SHAPE) -> float:
    """Return the error of a network's file in ONNX Runtime, on three images together and on one alone."""
    found = deploy.onnx_error(deploy.to_onnx(model, path, shape=shape), model, images(3, *shape))
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["squeeze-excite", "attention", "recurrent", "swin"])
def test_the_zoo_gives_its_logits(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    assert error(ZOO[name](), tmp_path / "net.onnx") <= TOLERANCE
    assert deploy.takes_any_number(tmp_path / "net.onnx")


def test_another_networks_file_is_found_out(tmp_path: Path, sparse_model) -> None:
    shape, path = (1, 28, 28), tmp_path / "net.onnx"
    assert error(sparse_model("lenet-5", 0.2, width=0.5), path, shape) <= TOLERANCE
    other = sparse_model("lenet-5", 0.2, width=0.5, seed=1)
    assert (deploy.onnx_error(path, other, images(3, *shape)) or 0.0) > 1e-4


def test_removed_channels_make_a_smaller_file(tmp_path: Path, sparse_model) -> None:
    model = sparse_model("lenet-5", 1.0)
    whole = deploy.to_onnx(model, tmp_path / "whole.onnx", shape=(1, 28, 28)).stat().st_size
    with torch.no_grad():
        model[3].weight[:, ::2] = 0  # every second channel of the first convolution is unread
        model[6].weight[:, : 25 * 16] = 0  # half the channels of the second are
    assert deploy.to_onnx(model, tmp_path / "small.onnx", shape=(1, 28, 28)).stat().st_size < 0.6 * whole


class Own(nn.Module):
    """Weights that are computed in forward, from masks and norms, and an object that holds the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.hidden, self.head = parametrizations.weight_norm(nn.Linear(144, 40)), nn.Linear(40, 10)
        for layer in (self.conv, self.head):
            prune.random_unstructured(layer, "weight", 0.75)

    def forward(self, x: Tensor) -> SimpleNamespace:
        h = F.gelu(self.norm(self.conv(x)))
        return SimpleNamespace(logits=self.head(F.silu(self.hidden(h.flatten(1)))))


def test_masks_and_norms_are_folded_and_zeros_stay(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "net.onnx"
    assert error(Own(), path) <= TOLERANCE
    graph = onnx.load(path).graph
    weights = [onnx.numpy_helper.to_array(one) for one in graph.initializer if len(one.dims) > 1]
    assert {(w.shape, float((w == 0).mean())) for w in weights} == {
        ((4, 1, 3, 3), 0.75), ((40, 144), 0.0), ((10, 40), 0.75)
    }  # fmt: skip
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
    assert str(Path(__file__).parent).encode() not in path.read_bytes()


def test_a_masked_class_stays_masked(tmp_path: Path) -> None:
    class Masked(Own):
        def forward(self, x: Tensor) -> SimpleNamespace:
            logits = super().forward(x).logits
            return SimpleNamespace(logits=torch.cat([logits, torch.full_like(logits[:, :1], -torch.inf)], 1))

    assert error(Masked(), tmp_path / "net.onnx") <= TOLERANCE


class One(nn.Module):
    """A forward that makes a Python number of the number of images."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.head(x.reshape(int(str(len(x))), -1)))


def test_where_the_number_of_images_cannot_be_free_it_is_one(tmp_path: Path) -> None:
    assert error(One().double(), tmp_path / "net.onnx") <= TOLERANCE  # for which ONNX Runtime has no GELU
    assert not deploy.takes_any_number(tmp_path / "net.onnx")


def test_what_torch_cannot_export_is_refused_by_name(tmp_path: Path) -> None:
    class Branching(One):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.flatten(1) if float(x.sum()) > 0 else -x.flatten(1))

    with pytest.raises(Unsupported, match=r"torch\.onnx cannot export this network.*data-dependent"):
        deploy.to_onnx(Branching(), tmp_path / "net.onnx", shape=SHAPE)


class Biased(nn.Module):
    """Attention with a bias for each pair of patches, as BEiT has it, whose strides torch.onnx mistakes."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head, self.bias = nn.Linear(8, 48), nn.Linear(16, 3), nn.Parameter(torch.randn(2, 17, 17))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.squeeze(1)).reshape(-1, 17, 3, 2, 8).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias.unsqueeze(0))
        return self.head(mixed.transpose(1, 2).reshape(-1, 17, 16).mean(1))


@pytest.mark.nightly
def test_attention_with_a_bias_gives_its_logits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    assert error(Biased(), tmp_path / "net.onnx", (1, 17, 8)) <= TOLERANCE
