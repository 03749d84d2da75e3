"""The Hugging Face families the decoder can be: each module maps configuration and tensor names both ways.

A family module has `MODEL_TYPE`, `config_from_hf(raw)`, `config_to_hf(config)`, `MODULES` (our module name -> theirs, `{i}` is the
layer) and `IGNORED` (patterns of tensors in old checkpoints that are no weights).
"""

from __future__ import annotations

from typing import Any, Protocol, cast

from megaxelm.errors import ModelError
from megaxelm.model.config import DecoderConfig
from megaxelm.model.families import llama, mistral, qwen2, qwen3, xglm


class Family(Protocol):
    """What a family module offers."""

    MODEL_TYPE: str
    ARCHITECTURE: str
    MODULES: dict[str, str]
    IGNORED: tuple[str, ...]

    def config_from_hf(self, raw: dict[str, Any]) -> DecoderConfig: ...

    def config_to_hf(self, config: DecoderConfig) -> Any: ...


FAMILIES: dict[str, Family] = {module.MODEL_TYPE: cast(Family, module) for module in (llama, mistral, qwen2, qwen3, xglm)}


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
    if parts[0] == "layers":
        template = family.MODULES[".".join(["layers", "{i}", *parts[2:]])]
        return f"{template.format(i=parts[1])}.{kind}"
    return f"{family.MODULES[module]}.{kind}"
