"""Work a token of training takes, and what share of the device's peak a speed is.

Model FLOPs of a token, forward and backward: 6 for every parameter that is multiplied with it (the output head once; the lookup of an
embedding multiplies nothing), and the causal attention to the tokens it sees (Narayanan et al. 2021, arXiv 2104.04473, section 5.1,
without recomputation; Chowdhery et al. 2022, PaLM, appendix B). What is computed twice by activation checkpointing counts once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from megaxelm.model.config import DecoderConfig

# Dense bf16 peaks in TFLOP/s from the vendors' data sheets; where a sheet gives the figure with sparsity, half of it.
# The form of the card comes before the plain name, since `H100` alone is the SXM card.
PEAK_TFLOPS = {
    "A100": 312.0,  # NVIDIA A100 Tensor Core GPU data sheet, 2021
    "H100 PCIe": 756.0,  # NVIDIA H100 Tensor Core GPU data sheet, 2023
    "H100 NVL": 835.5,  # NVIDIA H100 NVL product brief, 2024
    "H100": 989.0,  # SXM; NVIDIA H100 Tensor Core GPU data sheet, 2023
    "H200 NVL": 835.5,  # NVIDIA H200 Tensor Core GPU data sheet, 2024
    "H200": 989.0,  # SXM; NVIDIA H200 Tensor Core GPU data sheet, 2024
    "B200": 2250.0,  # NVIDIA DGX B200 data sheet, 2024: 36 PFLOP/s sparse of 8
    "MI300X": 1307.0,  # AMD Instinct MI300X data sheet, 2023
}


def peak_tflops(device_name: str, given: float | None = None) -> float | None:
    """Dense bf16 peak of a device by its name, TFLOP/s: `given` (train.peak_tflops) wins; None for a device that is not known."""
    if given is not None:
        return given
    for name, peak in PEAK_TFLOPS.items():
        pattern = r"(?<![A-Za-z0-9])" + r".*(?<![A-Za-z0-9])".join(map(re.escape, name.split())) + r"(?![A-Za-z0-9])"
        if re.search(pattern, device_name, re.IGNORECASE):
            return peak
    return None


def matmul_parameters(config: DecoderConfig) -> int:
    """Parameters that are multiplied with a token: the matrices of all layers (of a layer's experts the chosen ones), and the head once."""
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = config.hidden_size * (heads + 2 * kv_heads) + heads * config.hidden_size
    mlp = (3 if config.activation == "silu_gated" else 2) * config.hidden_size * config.intermediate_size
    if config.num_experts:
        mlp = config.experts_per_token * mlp + config.num_experts * config.hidden_size
    return config.num_layers * (attention + mlp) + config.vocab_size * config.hidden_size


def attended(lengths: Sequence[int], sliding_window: int | None = None) -> int:
    """Pairs of a token and one that it sees, itself included, over documents of these lengths."""
    return sum(_attended(length, sliding_window or length) for length in lengths)


def _attended(length: int, window: int) -> int:
    inside = min(length, window)
    return inside * (inside + 1) // 2 + (length - inside) * window


def token_flops(config: DecoderConfig, seen: float, delta_parameters: int = 0) -> float:
    """Model FLOPs of one token, forward and backward, that sees `seen` tokens on average, itself included.

    A pair costs 4 head_dim FLOPs a head forward (score and sum), and twice that backward. Of a model that is trained as low-rank deltas of
    `delta_parameters` numbers, the base has no gradient of its weights, so 4 FLOPs a parameter.
    """
    matrices = 6.0 * matmul_parameters(config)
    if delta_parameters:
        matrices = 4.0 * matmul_parameters(config) + 6.0 * delta_parameters
    return matrices + 12.0 * config.num_layers * config.num_heads * config.head_dim * seen
