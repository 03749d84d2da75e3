"""Shape of a decoder: one frozen dataclass for all families."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megaxelm.errors import ModelError
from megaxelm.files import write_json
from megaxelm.recipe import ModelConfig

VOCABULARY_MULTIPLE = 128
_CHOICES = {
    "norm": ("rmsnorm", "layernorm"),
    "activation": ("silu_gated", "gelu", "gelu_tanh"),
    "positions": ("rotary", "sinusoidal"),
}


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that decides what a decoder computes. `families/<family>.py` makes it from and to a Hugging Face configuration.

    Raises:
        ModelError: a value out of range, or values that contradict each other.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    norm: str = "rmsnorm"
    norm_eps: float = 1e-6
    activation: str = "silu_gated"
    positions: str = "rotary"
    rope_theta: float = 10000.0
    # None, or {"rope_type": "linear" | "llama3", ...} as Hugging Face writes it
    rope_scaling: dict[str, Any] | None = None
    # added to every position before the sinusoidal table is looked up
    position_offset: int = 0
    # row of the sinusoidal table that is zero (XGLM: the id of the padding token, which shows when it is not below the offset)
    position_zero_row: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    # RMSNorm of each query and key head before the rotation
    qk_norm: bool = False
    tie_embeddings: bool = True
    embed_scale: float = 1.0
    # a token sees itself and the sliding_window - 1 tokens before it
    sliding_window: int | None = None
    # feed-forward experts of each layer, of which each token is read by the `experts_per_token` that the layer's router weighs most; 0: no
    # experts, one feed-forward part for all tokens
    num_experts: int = 0
    experts_per_token: int = 0
    residual_dropout: float = 0.0
    attention_dropout: float = 0.0
    # fields of the Hugging Face configuration that are carried through unchanged (token ids, ...)
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size", "max_positions")
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ModelError(f"model configuration: {name} = {value!r} must be a whole number of at least 1")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ModelError(f"model configuration: {name} = {getattr(self, name)!r}; the decoder has {', '.join(choices)}")
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"model configuration: num_heads = {self.num_heads} is not a multiple of num_kv_heads = {self.num_kv_heads}: change one"
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise ModelError(f"model configuration: head_dim = {self.head_dim} must be even for rotary positions")
        for name in ("residual_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ModelError(f"model configuration: {name} = {getattr(self, name)!r}: choose 0 to below 1")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ModelError(f"model configuration: sliding_window = {self.sliding_window}: choose at least 1, or null for none")
        if self.num_experts < 0 or not (self.num_experts > 0) <= self.experts_per_token <= self.num_experts:
            raise ModelError(
                f"model configuration: experts_per_token = {self.experts_per_token} of num_experts = {self.num_experts}: choose 1 to the "
                "number of experts, or 0 for both"
            )
        if self.num_experts and (self.activation != "silu_gated" or self.mlp_bias):
            raise ModelError("model configuration: experts of a layer are gated SiLU without biases; the decoder has no others")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of embedding and head: the next multiple of 128."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def write_config(config: DecoderConfig, path: Path) -> None:
    """Keep a configuration as JSON, beside the checkpoints of its training."""
    write_json(path, asdict(config))


def read_config(path: Path) -> DecoderConfig:
    """What `write_config` wrote.

    Raises:
        ModelError: no such file, or not such a configuration.
    """
    try:
        return DecoderConfig(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path}: not readable as the configuration of a model ({error}); copy the folder of the expert again") from None


def config_from_recipe(model: ModelConfig, vocab_size: int, bos: int | None, eos: int | None, pad: int | None) -> DecoderConfig:
    """The decoder of a recipe's `model` section for a tokenizer with `vocab_size` pieces and these special ids.

    Raises:
        ModelError: sizes that the family cannot have.
    """
    if model.hidden_size % model.num_heads:
        raise ModelError(f"model.hidden_size = {model.hidden_size} is not a multiple of model.num_heads = {model.num_heads}: change one")
    xglm = model.family == "xglm"
    if xglm and model.num_kv_heads not in (None, model.num_heads):
        raise ModelError(f"model.num_kv_heads = {model.num_kv_heads}: the xglm family has no grouped-query attention; leave it out")
    if xglm and (model.hidden_size % 2 or model.hidden_size < 4):
        raise ModelError(f"model.hidden_size = {model.hidden_size}: the xglm family needs an even number of at least 4")
    return DecoderConfig(
        family=model.family,
        vocab_size=vocab_size,
        hidden_size=model.hidden_size,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads or model.num_heads,
        head_dim=model.hidden_size // model.num_heads,
        intermediate_size=model.intermediate_size,
        max_positions=model.max_positions,
        norm="layernorm" if xglm else "rmsnorm",
        norm_eps=1e-5 if xglm else 1e-6,
        activation="gelu" if xglm else "silu_gated",
        positions="sinusoidal" if xglm else "rotary",
        position_offset=2 if xglm else 0,
        position_zero_row=pad if xglm else None,
        qkv_bias=model.family in ("xglm", "qwen2"),
        out_bias=xglm,
        mlp_bias=xglm,
        qk_norm=model.family == "qwen3",
        tie_embeddings=model.tie_embeddings,
        embed_scale=math.sqrt(model.hidden_size) if xglm else 1.0,
        residual_dropout=model.dropout,
        attention_dropout=model.attention_dropout,
        extra={"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad},
    )


def num_parameters(config: DecoderConfig) -> int:
    """Parameters of the model as exported: no padding rows, tied embeddings once."""
    return _parameters(config, config.num_experts)


def active_parameters(config: DecoderConfig) -> int:
    """Of `num_parameters` those that take part in the prediction of one token: of a layer's experts only the chosen ones."""
    return _parameters(config, config.experts_per_token)


def _parameters(config: DecoderConfig, experts: int) -> int:
    """Parameters with so many experts in each layer, where the layers have experts."""
    hidden, heads, kv_heads = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    norm = hidden * (2 if config.norm == "layernorm" else 1)
    attention = hidden * (heads + 2 * kv_heads) + heads * hidden
    attention += (heads + 2 * kv_heads if config.qkv_bias else 0) + (hidden if config.out_bias else 0)
    attention += 2 * config.head_dim if config.qk_norm else 0
    ups = 2 if config.activation == "silu_gated" else 1
    mlp = (ups + 1) * hidden * config.intermediate_size + ((ups * config.intermediate_size + hidden) if config.mlp_bias else 0)
    if config.num_experts:
        mlp = experts * mlp + config.num_experts * hidden
    tables = config.vocab_size * hidden * (1 if config.tie_embeddings else 2)
    return config.num_layers * (attention + mlp + 2 * norm) + norm + tables
