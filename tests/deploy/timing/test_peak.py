"""The measured peak of a core."""

import pytest

from sparring.deploy.kernels._native import host_lanes, native_available
from sparring.deploy.timing._clock import _product_flops, one_core, processor
from sparring.deploy.timing._peak import register_flops


@pytest.mark.skipif(not native_available(), reason="no code generator")
def test_no_product_of_matrices_is_faster_than_the_registers() -> None:
    with one_core():
        registers, products = register_flops(), _product_flops()
    assert registers > 0.1e9 * host_lanes()
    if host_lanes() == 16:  # under a cap the library may use wider registers than the kernels do
        assert products < 1.1 * registers


def test_the_processor_names_its_units() -> None:
    assert "(" in processor() and any(unit in processor() for unit in ("AMX", "VNNI"))
