"""What the Llama-like families share, and the reading of Hugging Face configurations."""

from __future__ import annotations

from typing import Any

from megaxelm.errors import ModelError
from megaxelm.model.config import DecoderConfig

LLAMA_MODULES = {
    "embed": "model.embed_tokens",
    "layers.{i}.attention_norm": "model.layers.{i}.input_layernorm",
    "layers.{i}.attention.q": "model.layers.{i}.self_attn.q_proj",
    "layers.{i}.attention.k": "model.layers.{i}.self_attn.k_proj",
    "layers.{i}.attention.v": "model.layers.{i}.self_attn.v_proj",
    "layers.{i}.attention.out": "model.layers.{i}.self_attn.o_proj",
    "layers.{i}.attention.q_norm": "model.layers.{i}.self_attn.q_norm",
    "layers.{i}.attention.k_norm": "model.layers.{i}.self_attn.k_norm",
    "layers.{i}.mlp_norm": "model.layers.{i}.post_attention_layernorm",
    "layers.{i}.mlp.gate": "model.layers.{i}.mlp.gate_proj",
    "layers.{i}.mlp.up": "model.layers.{i}.mlp.up_proj",
    "layers.{i}.mlp.down": "model.layers.{i}.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
LLAMA_IGNORED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)

_CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "initializer_range", "init_std")
_ROPE_FIELDS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
_ROPE_OPTIONS = {"yarn": ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim")}


def parse(config_class: Any, raw: dict[str, Any]) -> Any:
    """`raw` through transformers' own class, which fills the family's defaults and reads old spellings.

    Raises:
        ModelError: the class refuses the values.
    """
    try:
        return config_class.from_dict(dict(raw))
    except Exception as error:  # the class raises whatever its validators raise; each means the file is wrong
        raise ModelError(f"config.json of model_type {config_class.model_type}: {error}") from None


def carried(hf: Any) -> dict[str, Any]:
    """Fields without meaning for the decoder that an export gives back."""
    return {name: getattr(hf, name) for name in _CARRIED if hasattr(hf, name)}


def refuse_unless(field: str, value: object, *allowed: object) -> None:
    """Raise a ModelError that names the field unless `value` is one of `allowed`."""
    if value not in allowed:
        choices = " or ".join(repr(choice) for choice in allowed)
        raise ModelError(f"config.json: {field} = {value!r} is not supported, only {choices}; choose another checkpoint")


def rope_from_hf(hf: Any) -> tuple[float, dict[str, Any] | None]:
    """`rope_theta` and `rope_scaling` of a configuration.

    Raises:
        ModelError: a kind of scaling the decoder does not have.
    """
    parameters = dict(hf.rope_parameters or {})
    kind = parameters.get("rope_type", "default")
    refuse_unless("rope_parameters.rope_type", kind, "default", *_ROPE_FIELDS)
    refuse_unless("rope_parameters.partial_rotary_factor", parameters.get("partial_rotary_factor", 1.0), 1.0)
    theta = parameters.get("rope_theta")
    if not isinstance(theta, int | float) or isinstance(theta, bool) or theta <= 0:
        raise ModelError(f"config.json: rope_theta = {theta!r} must be a number above 0")
    if kind == "default":
        return float(theta), None
    scaling: dict[str, Any] = {"rope_type": kind}
    for field in _ROPE_FIELDS[kind]:
        value = parameters.get(field)
        if not isinstance(value, int | float) or value <= 0:
            raise ModelError(f"config.json: rope_parameters.{field} = {value!r} must be a number above 0 for {kind} scaling")
        scaling[field] = value
    scaling |= {field: parameters[field] for field in _ROPE_OPTIONS.get(kind, ()) if parameters.get(field) is not None}
    return float(theta), scaling


def rope_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """`rope_parameters` as transformers 5 writes them."""
    return {"rope_type": "default", **(config.rope_scaling or {}), "rope_theta": config.rope_theta}


def window_from_layer_types(hf: Any) -> int | None:
    """The sliding window of a Qwen configuration.

    Raises:
        ModelError: only some of the layers have it.
    """
    kinds = set(hf.layer_types or ["full_attention"])
    if not hf.use_sliding_window or kinds == {"full_attention"}:
        refuse_unless("layer_types", sorted(kinds), ["full_attention"])
        return None
    if kinds != {"sliding_attention"}:
        raise ModelError(
            f"config.json: use_sliding_window = true with max_window_layers = {hf.max_window_layers} slides only some layers, which "
            "is not supported; choose a checkpoint where all layers slide or none"
        )
    return hf.sliding_window


def llama_like(hf: Any, **differences: Any) -> DecoderConfig:
    """A decoder configuration from the fields that Llama, Mistral and Qwen share.

    Raises:
        ModelError: a field asks for what the decoder does not have.
    """
    refuse_unless("hidden_act", hf.hidden_act, "silu", "swish")
    theta, scaling = rope_from_hf(hf)
    values: dict[str, Any] = {
        "family": hf.model_type,
        "vocab_size": hf.vocab_size,
        "hidden_size": hf.hidden_size,
        "num_layers": hf.num_hidden_layers,
        "num_heads": hf.num_attention_heads,
        "num_kv_heads": hf.num_key_value_heads or hf.num_attention_heads,
        "head_dim": getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        "intermediate_size": hf.intermediate_size,
        "max_positions": hf.max_position_embeddings,
        "norm_eps": hf.rms_norm_eps,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_embeddings": hf.tie_word_embeddings,
        "attention_dropout": float(hf.attention_dropout or 0.0),
        "extra": carried(hf),
    }
    return DecoderConfig(**{**values, **differences})


def llama_like_to_hf(config_class: Any, config: DecoderConfig, **differences: Any) -> Any:
    """transformers' configuration of a Llama-like decoder; the fields of `differences` are the family's own.

    Raises:
        ModelError: the decoder has something that the family cannot express.
    """
    family = config_class.model_type
    for field, value, needed in (
        ("norm", config.norm, "rmsnorm"),
        ("activation", config.activation, "silu_gated"),
        ("positions", config.positions, "rotary"),
        ("embed_scale", config.embed_scale, 1.0),
    ):
        must_be(family, field, value, needed)
    must_be(family, "experts in each layer", config.num_experts > 0, "num_experts_per_tok" in differences)
    return config_class(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=config.max_positions,
        rms_norm_eps=config.norm_eps,
        rope_parameters=rope_to_hf(config),
        tie_word_embeddings=config.tie_embeddings,
        attention_dropout=config.attention_dropout,
        **{**config.extra, **differences},
    )


def must_be(family: str, field: str, value: object, needed: object) -> None:
    """Raise a ModelError unless the decoder's `field` is what the family can express."""
    if value != needed:
        raise ModelError(f"export: the {family} family has {field} = {needed!r} only, this decoder has {value!r}; choose another family")
