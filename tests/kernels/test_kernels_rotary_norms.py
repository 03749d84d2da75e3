"""Rotary positions and norms against plain formulas in fp64."""

from __future__ import annotations

import pytest
import torch

from megaxelm_kernels.norms import layer_norm, rms_norm
from megaxelm_kernels.rotary import apply_rotary, inverse_frequencies, rotary_tables


def test_rotation_is_that_of_complex_numbers() -> None:
    x = torch.randn(9, 3, 8, dtype=torch.float64)
    cos, sin = rotary_tables(torch.arange(9), inverse_frequencies(8, 10000.0))
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.complex(cos, sin).unsqueeze(1)
    torch.testing.assert_close(apply_rotary(x, cos, sin), torch.cat([turned.real, turned.imag], -1))


def test_gradient_of_the_rotation() -> None:
    x = torch.randn(5, 2, 6, dtype=torch.float64, requires_grad=True)
    cos, sin = (table.double() for table in rotary_tables(torch.arange(5), inverse_frequencies(6, 100.0)))
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, cos, sin), (x,))


def test_tables_stay_exact_at_late_positions() -> None:
    positions = torch.tensor([0, 1, 2047, 131071])
    frequencies = inverse_frequencies(64, 500000.0)
    cos, _ = rotary_tables(positions, frequencies)
    exact = (positions.double()[:, None] * frequencies.double()).cos()
    assert cos.dtype == torch.float32
    assert (cos - exact).abs().max() < 1e-2
    assert (cos[:3] - exact[:3]).abs().max() < 2e-4


def test_linear_scaling_divides_the_positions() -> None:
    plain = rotary_tables(torch.tensor([10]), inverse_frequencies(16, 10000.0))
    scaled = rotary_tables(torch.tensor([40]), inverse_frequencies(16, 10000.0, {"rope_type": "linear", "factor": 4.0}))
    torch.testing.assert_close(plain, scaled)


@pytest.mark.parametrize(("head_dim", "scaling", "text"), [(7, None, "head_dim = 7"), (8, {"rope_type": "yarn"}, "yarn")])
def test_what_is_not_supported_is_named(head_dim: int, scaling: dict[str, object] | None, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        inverse_frequencies(head_dim, 10000.0, scaling)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norms_equal_their_formulas(dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in ((11, 40), (40,), (40,)))
    y, w, b = x.double(), weight.double(), bias.double()
    bound = 4 * torch.finfo(dtype).eps
    root = y.square().mean(-1, keepdim=True).add(1e-5).rsqrt()
    torch.testing.assert_close(rms_norm(x, weight, 1e-5).double(), y * root * w, rtol=bound, atol=bound)
    centred = y - y.mean(-1, keepdim=True)
    expected = centred * centred.square().mean(-1, keepdim=True).add(1e-5).rsqrt() * w + b
    torch.testing.assert_close(layer_norm(x, weight, bias, 1e-5).double(), expected, rtol=bound, atol=2 * bound)
