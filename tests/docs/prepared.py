"""What the pages' commands find: data shaped like MNIST, networks, images, a plan."""

from __future__ import annotations

import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from sparring.deploy import to_onnx
from sparring.models import Blueprint, save_model
from sparring.sparsity import apply_, magnitude, select
from sparring.train import Recipe, fit

PLAN = """
data = "digits"
model = "linear"
seeds = 1
sparsities = [0.2]
deploy = true

[recipe]
epochs = 3
lr = 0.01

[[attacks]]
name = "fgsm"
eps = [0.1]
images = 50
"""


def images(count: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return images (count, 28, 28) of ten classes, each a coarse pattern in noise, and their labels."""
    patterns = np.kron(np.random.default_rng(0).integers(0, 2, (10, 7, 7)), np.ones((4, 4), np.int64)) * 150
    source = np.random.default_rng(seed)
    y = np.arange(count) % 10
    return (patterns[y] + source.integers(0, 105, (count, 28, 28), np.uint8)).astype(np.uint8), y.astype(np.uint8)


def _write_idx(path: Path, array: NDArray[np.uint8]) -> None:
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes())


def prepare_data(folder: Path) -> None:
    """Write files in MNIST's layout and of its size."""
    (folder / "mnist").mkdir(parents=True)
    for part, count, seed in (("train", 60_000, 1), ("t10k", 10_000, 2)):
        x, y = images(count, seed)
        _write_idx(folder / "mnist" / f"{part}-images-idx3-ubyte", x)
        _write_idx(folder / "mnist" / f"{part}-labels-idx1-ubyte", y)


def prepare_files(folder: Path) -> None:
    """Write what the commands take that no command of the page makes, or only after a long training."""
    (folder / "my-plan.toml").write_text(PLAN)
    x, y = images(1500, 3)
    np.savez(folder / "images.npz", x=x[:, None], y=y.astype(np.int64))
    _write_zip(folder / "my-images.zip", x[:600], y[:600])
    network("lenet-5", 0.1, folder, ("lenet", "sparse", "small-dense"))
    network("lenet-300-100", 1.0, folder, ("dense", "l300"))
    network("lenet-5", 1.0, folder, ("l5",))
    own = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))  # README's mine:net
    fit(own, torch.from_numpy(x[:, None]), torch.from_numpy(y.astype(np.int64)), Recipe(epochs=1, lr=0.01))
    save_file(own.state_dict(), folder / "mine.safetensors")
    to_onnx(own.eval(), folder / "network.onnx", shape=(1, 28, 28))
    (folder / "property.vnnlib").write_text(property_text(784, 10))


def property_text(inputs: int, outputs: int) -> str:
    """Return a property in VNN-LIB: some output overtakes the first in a small box."""
    names = [f"X_{i}" for i in range(inputs)] + [f"Y_{k}" for k in range(outputs)]
    lines = [f"(declare-const {name} Real)" for name in names]
    lines += [f"(assert (<= {name} 0.51))\n(assert (>= {name} 0.49))" for name in names[:inputs]]
    unsafe = " ".join(f"(and (>= Y_{k} Y_0))" for k in range(1, outputs))
    return "\n".join([*lines, f"(assert (or {unsafe}))\n"])


def network(name: str, width: float, folder: Path, names: tuple[str, ...]) -> None:
    """Train a network for a moment and write it, "sparse" with a tenth of its weights."""
    x, y = images(2000, 4)
    about = Blueprint(name, (1, 28, 28), 10, (0.4,), (0.3,), width=width, data="mnist")
    model = about.build()
    fit(model, torch.from_numpy(x[:, None]), torch.from_numpy(y.astype(np.int64)), Recipe(epochs=1, lr=0.01))
    for file in names:
        masks = select(magnitude(model), 0.9) if file == "sparse" else None
        if masks:
            apply_(model, masks)
        save_model(folder / f"{file}.safetensors", model, about, masks)


def _write_zip(path: Path, x: NDArray[np.uint8], y: NDArray[np.uint8]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for at, (image, label) in enumerate(zip(x, y, strict=True)):
            content = BytesIO()
            Image.fromarray(image).save(content, "png")
            archive.writestr(f"{'test' if at // 10 % 2 else 'train'}/{label}/{at}.png", content.getvalue())
