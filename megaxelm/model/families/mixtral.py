"""Mixtral: Mistral whose feed-forward part is a mixture of experts, in every layer.

On disk each expert has matrices of its own; transformers 5 joins them when it loads and parts them when it saves.
"""

from __future__ import annotations

from typing import Any

from megaxelm.model.config import DecoderConfig
from megaxelm.model.families.common import LLAMA_IGNORED, LLAMA_MODULES, llama_like, llama_like_to_hf, must_be, parse, refuse_unless

MODEL_TYPE = "mixtral"
ARCHITECTURE = "MixtralForCausalLM"
_EXPERT = "model.layers.{i}.block_sparse_moe.experts.{e}"
MODULES = LLAMA_MODULES | {
    "layers.{i}.mlp.router": "model.layers.{i}.block_sparse_moe.gate",
    "layers.{i}.mlp.experts.{e}.gate": f"{_EXPERT}.w1",
    "layers.{i}.mlp.experts.{e}.down": f"{_EXPERT}.w2",
    "layers.{i}.mlp.experts.{e}.up": f"{_EXPERT}.w3",
}
IGNORED = LLAMA_IGNORED


def config_from_hf(raw: dict[str, Any]) -> DecoderConfig:
    """Read config.json's content. Raises ModelError for what the decoder does not have."""
    from transformers import MixtralConfig

    hf = parse(MixtralConfig, raw)
    refuse_unless("router_jitter_noise", hf.router_jitter_noise, 0)
    return llama_like(hf, sliding_window=hf.sliding_window, num_experts=hf.num_local_experts, experts_per_token=hf.num_experts_per_tok)


def config_to_hf(config: DecoderConfig) -> Any:
    """transformers' MixtralConfig. Raises ModelError for what Mixtral does not have."""
    from transformers import MixtralConfig

    for field in ("qkv_bias", "out_bias", "mlp_bias", "qk_norm"):
        must_be(MODEL_TYPE, field, getattr(config, field), False)
    return llama_like_to_hf(
        MixtralConfig,
        config,
        head_dim=config.head_dim,
        sliding_window=config.sliding_window,
        num_local_experts=config.num_experts,
        num_experts_per_tok=config.experts_per_token,
    )
