"""Mistral: Llama without biases, with a sliding window in every layer or none."""

from __future__ import annotations

from typing import Any

from megaxelm.model.config import DecoderConfig
from megaxelm.model.families.common import LLAMA_IGNORED, LLAMA_MODULES, llama_like, llama_like_to_hf, must_be, parse

MODEL_TYPE = "mistral"
ARCHITECTURE = "MistralForCausalLM"
MODULES = LLAMA_MODULES
IGNORED = LLAMA_IGNORED


def config_from_hf(raw: dict[str, Any]) -> DecoderConfig:
    """Read config.json's content. Raises ModelError for what the decoder does not have."""
    from transformers import MistralConfig

    hf = parse(MistralConfig, raw)
    return llama_like(hf, sliding_window=hf.sliding_window)


def config_to_hf(config: DecoderConfig) -> Any:
    """transformers' MistralConfig. Raises ModelError for what Mistral does not have."""
    from transformers import MistralConfig

    for field in ("qkv_bias", "out_bias", "mlp_bias", "qk_norm"):
        must_be(MODEL_TYPE, field, getattr(config, field), False)
    return llama_like_to_hf(MistralConfig, config, head_dim=config.head_dim, sliding_window=config.sliding_window)
