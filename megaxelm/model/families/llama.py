"""Llama: RMSNorm, gated SiLU, rotary positions, grouped queries; biases optional."""

from __future__ import annotations

from typing import Any

from megaxelm.model.config import DecoderConfig
from megaxelm.model.families.common import LLAMA_IGNORED, LLAMA_MODULES, llama_like, llama_like_to_hf, must_be, parse

MODEL_TYPE = "llama"
ARCHITECTURE = "LlamaForCausalLM"
MODULES = LLAMA_MODULES
IGNORED = LLAMA_IGNORED


def config_from_hf(raw: dict[str, Any]) -> DecoderConfig:
    """Read config.json's content. Raises ModelError for what the decoder does not have."""
    from transformers import LlamaConfig

    hf = parse(LlamaConfig, raw)
    return llama_like(hf, qkv_bias=hf.attention_bias, out_bias=hf.attention_bias, mlp_bias=hf.mlp_bias)


def config_to_hf(config: DecoderConfig) -> Any:
    """transformers' LlamaConfig. Raises ModelError for what Llama does not have."""
    from transformers import LlamaConfig

    must_be(MODEL_TYPE, "out_bias", config.out_bias, config.qkv_bias)
    must_be(MODEL_TYPE, "qk_norm", config.qk_norm, False)
    must_be(MODEL_TYPE, "sliding_window", config.sliding_window, None)
    return llama_like_to_hf(LlamaConfig, config, head_dim=config.head_dim, attention_bias=config.qkv_bias, mlp_bias=config.mlp_bias)
