"""transformers' view of an ensemble's `config.json`. Imports no torch."""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PreTrainedConfig


class XelmConfig(PreTrainedConfig):
    """The fields of `config.json`: `experts`, `router`, `top_m`, `combine`, `format`.

    The model fills in the sizes of its experts: `vocab_size`, `hidden_size`, `num_hidden_layers`, `max_position_embeddings`.
    """

    model_type = "xelm"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        register_model()


def register_model() -> None:
    """Let `AutoModelForCausalLM` find `XelmForCausalLM`."""
    from transformers import AutoModelForCausalLM

    from megaxelm.ensemble.huggingface import XelmForCausalLM

    AutoModelForCausalLM.register(XelmConfig, XelmForCausalLM, exist_ok=True)
