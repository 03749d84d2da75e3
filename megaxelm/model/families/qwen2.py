"""Qwen2: Llama with biases on queries, keys and values."""

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

MODEL_TYPE = "qwen2"
ARCHITECTURE = "Qwen2ForCausalLM"
MODULES = LLAMA_MODULES
IGNORED = LLAMA_IGNORED


def config_from_hf(raw: dict[str, Any]) -> DecoderConfig:
    """Read config.json's content. Raises ModelError for what the decoder does not have."""
    from transformers import Qwen2Config

    hf = parse(Qwen2Config, raw)
    return llama_like(hf, qkv_bias=True, sliding_window=window_from_layer_types(hf))


def config_to_hf(config: DecoderConfig) -> Any:
    """transformers' Qwen2Config. Raises ModelError for what Qwen2 does not have."""
    from transformers import Qwen2Config

    must_be(MODEL_TYPE, "qkv_bias", config.qkv_bias, True)
    for field in ("out_bias", "mlp_bias", "qk_norm"):
        must_be(MODEL_TYPE, field, getattr(config, field), False)
    must_be(MODEL_TYPE, "num_heads * head_dim", config.num_heads * config.head_dim, config.hidden_size)
    return llama_like_to_hf(
        Qwen2Config,
        config,
        use_sliding_window=config.sliding_window is not None,
        sliding_window=config.sliding_window,
        max_window_layers=0 if config.sliding_window is not None else config.num_layers,
    )
