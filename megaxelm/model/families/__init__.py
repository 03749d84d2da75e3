"""The Hugging Face families the decoder can be: each module maps configuration and tensor names both ways.

A family module has `MODEL_TYPE`, `config_from_hf(raw)`, `config_to_hf(config)`, `MODULES` (our module name -> theirs, `{i}` is the
layer, `{e}` an expert of the layer) and `IGNORED` (patterns of tensors in old checkpoints that are no weights).
"""

from __future__ import annotations

from typing import Any, Protocol, cast

from megaxelm.errors import ModelError
from megaxelm.model.config import DecoderConfig
from megaxelm.model.families import llama, mistral, mixtral, qwen2, qwen3, qwen3_moe, xglm


class Family(Protocol):
    """What a family module offers."""

    MODEL_TYPE: str
    ARCHITECTURE: str
    MODULES: dict[str, str]
    IGNORED: tuple[str, ...]

    def config_from_hf(self, raw: dict[str, Any]) -> DecoderConfig: ...

    def config_to_hf(self, config: DecoderConfig) -> Any: ...


_MODULES = (llama, mistral, mixtral, qwen2, qwen3, qwen3_moe, xglm)
FAMILIES: dict[str, Family] = {module.MODEL_TYPE: cast(Family, module) for module in _MODULES}


def get_family(name: object) -> Family:
    """The family of a `model_type`.

    Raises:
        ModelError: a family the decoder does not have.
    """
    if not isinstance(name, str) or name not in FAMILIES:
        raise ModelError(f"model_type = {name!r}: the decoder has {', '.join(sorted(FAMILIES))}; choose a checkpoint of one of these")
    return FAMILIES[name]


def hf_name(family: Family, name: str) -> str:
    """Their name of our tensor, e.g. `layers.0.attention.q.weight` -> `model.layers.0.self_attn.q_proj.weight`."""
    module, kind = name.rsplit(".", 1)
    parts = module.split(".")
    numbers = {}
    for place, key in ((1, "i"), (4, "e")):  # layers.{i}.mlp.experts.{e}.up
        if parts[0] == "layers" and len(parts) > place and parts[place].isdigit():
            numbers[key] = parts[place]
            parts[place] = f"{{{key}}}"
    return f"{family.MODULES['.'.join(parts)].format(**numbers)}.{kind}"
