"""The experts as one mixture-of-experts model: their feed-forward parts as the experts of each layer, everything else averaged.

Branch-Train-MiX (Sukhbaatar et al. 2024, arXiv 2403.07816, section 3.2); the router is fitted (`ridge`) or trained.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megaxelm.errors import MergeError
from megaxelm.merge.average import average_source
from megaxelm.model.config import DecoderConfig
from megaxelm.model.source import WeightSource

FAMILIES = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}
"""Family of the experts -> that of the merged model."""
_NONE = {
    "xglm": "its feed-forward part is an ungated GELU with biases and its positions are sinusoidal, and transformers has no "
    "mixture-of-experts model with those",
    "qwen2": "its queries, keys and values have biases, which Mixtral has not, and Qwen2-MoE adds a shared expert that there is none for",
    "mixtral": "its experts are mixtures of experts already",
    "qwen3_moe": "its experts are mixtures of experts already",
}
_EXPERT = re.compile(r"(layers\.\d+\.mlp)\.experts\.(\d+)\.(.+)")
_ROUTER = re.compile(r"layers\.(\d+)\.mlp\.router\.weight")


def moe_config(config: DecoderConfig, num_experts: int, top_k: int) -> DecoderConfig:
    """The configuration of the merged model.

    Raises:
        MergeError: a family that has no mixture-of-experts form in transformers, or `top_k` out of range.
    """
    if config.family not in FAMILIES:
        why = _NONE.get(config.family, "transformers has no such model")
        raise MergeError(
            f"--into moe: not possible for the {config.family} family: {why}. Choose --into average or distilled, or experts of "
            f"{', '.join(FAMILIES)}"
        )
    if config.qkv_bias and config.family == "llama":
        raise MergeError("--into moe: these llama models have biases (attention_bias), which Mixtral has not; choose --into average")
    if config.mlp_bias:
        raise MergeError("--into moe: these models have biases in the feed-forward part (mlp_bias), which the merged form has not")
    if not 1 <= top_k <= num_experts:
        raise MergeError(f"--top-k {top_k}: choose 1 to {num_experts}, the number of experts")
    return replace(config, family=FAMILIES[config.family], num_experts=num_experts, experts_per_token=top_k)


def moe_source(
    sources: Sequence[WeightSource], weights: Sequence[float], routers: Mapping[int, Tensor], config: DecoderConfig
) -> WeightSource:
    """The tensors of the merged model, one at a time.

    Args:
        weights: of the experts, for everything that is not a feed-forward part.
        routers: layer -> [experts, H]; looked into when a router is asked for, so layers may be fitted one after the other.
        config: as `moe_config` gives it.
    """
    rest = average_source(sources, weights)

    def weight(name: str) -> Tensor:
        if found := _ROUTER.fullmatch(name):
            return routers[int(found[1])].to(torch.float32)
        if found := _EXPERT.fullmatch(name):
            return sources[int(found[2])].weight(f"{found[1]}.{found[3]}")
        return rest.weight(name)

    return WeightSource(config, weight)
