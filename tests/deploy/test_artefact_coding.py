from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparring.deploy import _artefact as coding
from sparring.errors import UserError


@given(st.sets(st.integers(0, 3000)), st.integers(1, 1000))
def test_every_coding_of_positions_is_undone(found, room):
    positions = np.array(sorted(found), np.int64)
    size = (int(positions[-1]) if len(positions) else 0) + room
    gaps = np.diff(positions, prepend=-1) - 1
    codings = {"bitmask": coding._bitmask(positions, size), "deltas": coding._deltas(gaps)}
    codings |= {f"rice-{bits}": coding._rice(gaps, bits) for bits in (0, 1, 5, 12)}
    name, data = coding.encode_positions(positions, size)
    assert len(data) <= min(len(data) for data in codings.values())
    for key, content in (codings | {name: data}).items():
        decoded = coding.decode_positions(key, np.frombuffer(content, np.uint8), len(positions), size)
        assert (decoded == positions).all()


@pytest.mark.parametrize("density", [0.1, 0.05, 0.02])
def test_positions_cost_at_most_five_hundredths_more_than_their_entropy(density):
    size = 400_000
    positions = np.flatnonzero(np.random.default_rng(0).random(size) < density)
    _, data = coding.encode_positions(positions, size)
    entropy = -size * (density * np.log2(density) + (1 - density) * np.log2(1 - density)) / 8
    assert len(data) < 1.05 * entropy


@given(st.binary(max_size=60), st.sampled_from(["all", "bitmask", "deltas", "rice-0", "rice-3", "rice-30", "rice-31"]))
def test_any_bytes_decode_to_sound_positions_or_to_an_error(data, name):
    count, size = 5, 100
    try:
        positions = coding.decode_positions(name, np.frombuffer(data, np.uint8), count, size)
    except UserError:
        return
    assert len(positions) == count and (np.diff(positions) > 0).all() and positions[0] >= 0 and positions[-1] < size


@pytest.mark.parametrize("values", coding.VALUES)
def test_rounded_values_survive_being_stored(values):
    generator = np.random.default_rng(3)
    weight = generator.standard_normal((6, 10)).astype(np.float32) * (generator.random((6, 10)) < 0.4)
    weight[2] = 0
    rounded = coding.round_values(weight.astype(np.float32), values)
    rows, columns = np.nonzero(rounded)
    data = coding.encode_values(rounded, rows, rounded[rows, columns], values)
    decoded = coding.decode_values(np.frombuffer(data, np.uint8), rows, 6, values)
    np.testing.assert_allclose(decoded, rounded[rows, columns], rtol=3e-7 if values == "int8" else 0)
    limit = {"fp32": 0, "fp16": 1e-3, "int8": 1 / 253}[values]
    assert np.abs(rounded - weight).max() <= limit * np.abs(weight).max()


def test_weights_beyond_fp16_and_nonfinite_weights_are_refused():
    with pytest.raises(UserError, match="65504"):
        coding.round_values(np.float32([[1e6]]), "fp16")
    with pytest.raises(UserError, match="NaN"):
        coding.round_values(np.float32([[np.nan]]), "fp32")
