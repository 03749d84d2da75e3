"""Qwen3: Llama with RMSNorm on each query and key head and a head size of its own."""

from __future__ import annotations

from typing import Any

from megaxelm.model.config import DecoderConfig
from megaxelm.model.families.common import (
    LLAMA_IGNORED,
    LLAMA_MODULES,
    llama_like,
    llama_like_to_hf,
    must_be,
    parse,
    window_from_layer_types,
)

MODEL_TYPE = "qwen3"
ARCHITECTURE = "Qwen3ForCausalLM"
MODULES = LLAMA_MODULES
IGNORED = LLAMA_IGNORED


def config_from_hf(raw: dict[str, Any]) -> DecoderConfig:
    """Read config.json's content. Raises ModelError for what the decoder does not have."""
    from transformers import Qwen3Config

    hf = parse(Qwen3Config, raw)
    return llama_like(hf, qkv_bias=hf.attention_bias, out_bias=hf.attention_bias, qk_norm=True, sliding_window=window_from_layer_types(hf))


def config_to_hf(config: DecoderConfig) -> Any:
    """transformers' Qwen3Config. Raises ModelError for what Qwen3 does not have."""
    from transformers import Qwen3Config

    must_be(MODEL_TYPE, "qk_norm", config.qk_norm, True)
    must_be(MODEL_TYPE, "mlp_bias", config.mlp_bias, False)
    must_be(MODEL_TYPE, "out_bias", config.out_bias, config.qkv_bias)
    return llama_like_to_hf(
        Qwen3Config,
        config,
        head_dim=config.head_dim,
        attention_bias=config.qkv_bias,
        use_sliding_window=config.sliding_window is not None,
        sliding_window=config.sliding_window,
        max_window_layers=0 if config.sliding_window is not None else config.num_layers,
    )
