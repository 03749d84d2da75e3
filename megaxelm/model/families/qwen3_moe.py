"""Qwen3-MoE: Qwen3 whose feed-forward part is a mixture of experts, in every layer.

On disk each expert has matrices of its own; transformers 5 joins them when it loads and parts them when it saves.
"""

from __future__ import annotations

from typing import Any

from megaxelm.model.config import DecoderConfig
from megaxelm.model.families.common import LLAMA_IGNORED, LLAMA_MODULES, llama_like, llama_like_to_hf, must_be, parse, refuse_unless

MODEL_TYPE = "qwen3_moe"
ARCHITECTURE = "Qwen3MoeForCausalLM"
MODULES = LLAMA_MODULES | {
    "layers.{i}.mlp.router": "model.layers.{i}.mlp.gate",
    **{f"layers.{{i}}.mlp.experts.{{e}}.{part}": f"model.layers.{{i}}.mlp.experts.{{e}}.{part}_proj" for part in ("gate", "up", "down")},
}
IGNORED = LLAMA_IGNORED


def config_from_hf(raw: dict[str, Any]) -> DecoderConfig:
    """Read config.json's content. Raises ModelError for what the decoder does not have."""
    from transformers import Qwen3MoeConfig

    hf = parse(Qwen3MoeConfig, raw)
    refuse_unless("decoder_sparse_step", hf.decoder_sparse_step, 1)
    refuse_unless("mlp_only_layers", list(hf.mlp_only_layers or []), [])
    # The weights of the chosen experts sum to 1 in the decoder.
    refuse_unless("norm_topk_prob", hf.norm_topk_prob, True)
    return llama_like(
        hf,
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
        qk_norm=True,
        sliding_window=hf.sliding_window if hf.use_sliding_window else None,
        intermediate_size=hf.moe_intermediate_size,
        num_experts=hf.num_experts,
        experts_per_token=hf.num_experts_per_tok,
    )


def config_to_hf(config: DecoderConfig) -> Any:
    """transformers' Qwen3MoeConfig. Raises ModelError for what Qwen3-MoE does not have."""
    from transformers import Qwen3MoeConfig

    must_be(MODEL_TYPE, "qk_norm", config.qk_norm, True)
    must_be(MODEL_TYPE, "mlp_bias", config.mlp_bias, False)
    must_be(MODEL_TYPE, "out_bias", config.out_bias, config.qkv_bias)
    return llama_like_to_hf(
        Qwen3MoeConfig,
        config,
        head_dim=config.head_dim,
        attention_bias=config.qkv_bias,
        use_sliding_window=config.sliding_window is not None,
        sliding_window=config.sliding_window,
        moe_intermediate_size=config.intermediate_size,
        num_experts=config.num_experts,
        num_experts_per_tok=config.experts_per_token,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )
