"""The cache of generated code: private to the user, and hashed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sparring import deploy
from sparring.deploy.kernels import _native as native
from sparring.deploy.kernels._native import cache_folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = cache_folder()
    assert folder is not None and folder.stat().st_mode & 0o777 == 0o700
    return folder


def test_a_folder_that_others_may_write_to_is_not_used(cache):
    cache.chmod(0o770)
    assert cache_folder() is None
    cache.chmod(0o700)
    assert cache_folder() == cache


def test_a_link_to_somewhere_else_is_not_used(cache, tmp_path):
    cache.rmdir()
    cache.symlink_to(tmp_path)
    assert cache_folder() is None


def test_damaged_code_is_made_again(cache, sparse_model):
    model, x = sparse_model("lenet-300-100", 0.1), np.ones((1, 1, 28, 28), np.float32)
    expected = deploy.pack(model, shape=(1, 28, 28))(x)
    files = sorted(cache.glob("*.o"))
    contents = [file.read_bytes() for file in files]
    assert files
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert (deploy.pack(model, shape=(1, 28, 28))(x) == expected).all()
    assert [file.read_bytes() for file in files] == contents


def test_the_engine_alone_reaches_into_cpython() -> None:
    """What answers one image without ctypes is fenced: nobody else imports it."""
    kernels = Path(native.__file__).parent
    importing = {path.name for path in kernels.parent.rglob("*.py") if "from ._builtin import" in path.read_text()}
    assert importing == {"_engine.py"}
