"""XGLM: LayerNorm, GELU, biases everywhere, scaled embeddings, sinusoidal positions from 2 on.

transformers runs this family with `attn_implementation="eager"` only. Its table of positions has a zero row at the padding id.
"""

from __future__ import annotations

import math
from typing import Any

from megaxelm.model.config import DecoderConfig
from megaxelm.model.families.common import carried, must_be, parse, refuse_unless

MODEL_TYPE = "xglm"
ARCHITECTURE = "XGLMForCausalLM"
POSITION_OFFSET = 2
MODULES = {
    "embed": "model.embed_tokens",
    "layers.{i}.attention_norm": "model.layers.{i}.self_attn_layer_norm",
    "layers.{i}.attention.q": "model.layers.{i}.self_attn.q_proj",
    "layers.{i}.attention.k": "model.layers.{i}.self_attn.k_proj",
    "layers.{i}.attention.v": "model.layers.{i}.self_attn.v_proj",
    "layers.{i}.attention.out": "model.layers.{i}.self_attn.out_proj",
    "layers.{i}.mlp_norm": "model.layers.{i}.final_layer_norm",
    "layers.{i}.mlp.up": "model.layers.{i}.fc1",
    "layers.{i}.mlp.down": "model.layers.{i}.fc2",
    "norm": "model.layer_norm",
    "head": "lm_head",
}
IGNORED = (r"model\.embed_positions\.weights",)
_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def config_from_hf(raw: dict[str, Any]) -> DecoderConfig:
    """Read config.json's content. Raises ModelError for what the decoder does not have."""
    from transformers import XGLMConfig

    hf = parse(XGLMConfig, raw)
    refuse_unless("activation_function", hf.activation_function, *_ACTIVATIONS)
    refuse_unless("add_cross_attention", hf.add_cross_attention, False)
    refuse_unless("activation_dropout", hf.activation_dropout, 0)
    refuse_unless("layerdrop", hf.layerdrop, 0)
    refuse_unless("d_model % attention_heads", hf.d_model % hf.attention_heads, 0)
    refuse_unless("d_model % 2", hf.d_model % 2, 0)
    return DecoderConfig(
        family=MODEL_TYPE,
        vocab_size=hf.vocab_size,
        hidden_size=hf.d_model,
        num_layers=hf.num_layers,
        num_heads=hf.attention_heads,
        num_kv_heads=hf.attention_heads,
        head_dim=hf.d_model // hf.attention_heads,
        intermediate_size=hf.ffn_dim,
        max_positions=hf.max_position_embeddings,
        norm="layernorm",
        norm_eps=1e-5,
        activation=_ACTIVATIONS[hf.activation_function],
        positions="sinusoidal",
        position_offset=POSITION_OFFSET,
        position_zero_row=hf.pad_token_id,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tie_embeddings=hf.tie_word_embeddings,
        embed_scale=math.sqrt(hf.d_model) if hf.scale_embedding else 1.0,
        residual_dropout=float(hf.dropout),
        attention_dropout=float(hf.attention_dropout),
        extra=carried(hf),
    )


def config_to_hf(config: DecoderConfig) -> Any:
    """transformers' XGLMConfig. Raises ModelError for what XGLM does not have."""
    from transformers import XGLMConfig

    for field, needed in (("norm", "layernorm"), ("norm_eps", 1e-5), ("positions", "sinusoidal"), ("position_offset", POSITION_OFFSET)):
        must_be(MODEL_TYPE, field, getattr(config, field), needed)
    for field in ("qkv_bias", "out_bias", "mlp_bias"):
        must_be(MODEL_TYPE, field, getattr(config, field), True)
    must_be(MODEL_TYPE, "qk_norm", config.qk_norm, False)
    must_be(MODEL_TYPE, "num_experts", config.num_experts, 0)
    must_be(MODEL_TYPE, "sliding_window", config.sliding_window, None)
    must_be(MODEL_TYPE, "num_kv_heads", config.num_kv_heads, config.num_heads)
    must_be(MODEL_TYPE, "num_heads * head_dim", config.num_heads * config.head_dim, config.hidden_size)
    must_be(MODEL_TYPE, "activation", config.activation in ("gelu", "gelu_tanh"), True)
    must_be(MODEL_TYPE, "position_zero_row", config.position_zero_row, config.extra.get("pad_token_id"))
    scaled = config.embed_scale != 1.0
    must_be(MODEL_TYPE, "embed_scale", config.embed_scale, math.sqrt(config.hidden_size) if scaled else 1.0)
    return XGLMConfig(
        vocab_size=config.vocab_size,
        d_model=config.hidden_size,
        num_layers=config.num_layers,
        attention_heads=config.num_heads,
        ffn_dim=config.intermediate_size,
        max_position_embeddings=config.max_positions,
        activation_function="gelu" if config.activation == "gelu" else "gelu_new",
        scale_embedding=scaled,
        dropout=config.residual_dropout,
        attention_dropout=config.attention_dropout,
        tie_word_embeddings=config.tie_embeddings,
        **config.extra,
    )
