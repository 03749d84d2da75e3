"""Low-rank deltas (LoRA, Hu et al. 2021, arXiv 2106.09685): an expert as a base that others share, and two thin matrices a projection.

    lora = lora_from_recipe(recipe.experts.lora, base.config)
    decoder = Decoder(base.config)
    add_lora(decoder, lora)                                     # only A and B are trained
    source = adapted_source(base, lora, tensor, base_folder)    # source.weight(name) is base + (alpha / rank) B A

The matrices are named as modules of the projection that they belong to: `layers.0.attention.q.lora_A.weight` [rank, in] and
`layers.0.attention.q.lora_B.weight` [out, rank].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megaxelm.errors import ModelError
from megaxelm.files import hash_value
from megaxelm.model.config import DecoderConfig
from megaxelm.model.decoder import Decoder, parameter_shapes
from megaxelm.model.families import get_family, hf_name
from megaxelm.model.layers import Linear
from megaxelm.model.source import Adapter, Lora, WeightSource

if TYPE_CHECKING:
    from megaxelm.recipe import LoraConfig

_FIRST_SITE = 1 << 20  # of dropout: behind every place that a decoder itself has
_KINDS = ("lora_A", "lora_B")


def projections(config: DecoderConfig) -> dict[str, str]:
    """The projections of a layer that may have a delta: our name in the layer -> the last part of the family's, which peft goes by.

    Raises:
        ModelError: a family whose projections are not one tensor each, or a mixture-of-experts model.
    """
    if config.num_experts:
        raise ModelError("low-rank deltas: of a mixture-of-experts model there are none; branch from a dense model")
    family = get_family(config.family)
    with torch.device("meta"):
        layer = Decoder(config).layers[0]
    names = [name for name, module in layer.named_modules() if isinstance(module, Linear)]
    try:
        return {name: hf_name(family, f"layers.0.{name}.weight").split(".")[-2] for name in names}
    except KeyError as error:
        raise ModelError(
            f"low-rank deltas: {error} of the {config.family} family has no name of its own there; choose another family"
        ) from None


def lora_from_recipe(settings: LoraConfig, config: DecoderConfig) -> Lora:
    """The deltas that `experts.lora` asks for in a model of this configuration.

    Raises:
        ModelError: a target that the family does not have, or a rank as large as the matrices.
    """
    known = projections(config)
    wanted = list(known.values()) if settings.targets == "all" else settings.targets
    unknown = sorted(set(wanted) - set(known.values()))
    if unknown:
        raise ModelError(
            f"experts.lora.targets: {', '.join(unknown)}: the projections of the {config.family} family are {', '.join(known.values())}; "
            "choose among them, or all"
        )
    lora = Lora(settings.rank, settings.alpha, tuple(name for name, theirs in known.items() if theirs in wanted), settings.dropout)
    least = min(min(shape) for shape in _target_shapes(config, lora).values())
    if lora.rank >= least:
        raise ModelError(f"experts.lora.rank = {lora.rank}: choose 1 to {least - 1}, below the smallest side of a projection of this model")
    return lora


def _target_shapes(config: DecoderConfig, lora: Lora) -> dict[str, tuple[int, ...]]:
    """Projections with a delta, in the order of the model: module -> (out, in)."""
    shapes = parameter_shapes(config)
    return {module: shapes[f"{module}.weight"] for module in _target_modules(config, lora)}


def _target_modules(config: DecoderConfig, lora: Lora) -> list[str]:
    return [f"layers.{layer}.{target}" for layer in range(config.num_layers) for target in lora.targets]


def lora_shapes(config: DecoderConfig, lora: Lora) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all matrices A and B of a model, in its order."""
    found: dict[str, tuple[int, ...]] = {}
    for module, (size_out, size_in) in _target_shapes(config, lora).items():
        found[f"{module}.lora_A.weight"] = (lora.rank, size_in)
        found[f"{module}.lora_B.weight"] = (size_out, lora.rank)
    return found


def lora_parameters(config: DecoderConfig, lora: Lora) -> int:
    """Numbers in all matrices A and B of a model."""
    return sum(math.prod(shape) for shape in lora_shapes(config, lora).values())


def add_lora(decoder: Decoder, lora: Lora) -> None:
    """Give `decoder` deltas, all zero, and freeze the rest. Under `deepspeed.zero.Init` they are divided as the decoder is."""
    decoder.requires_grad_(False)
    decoder.delta_dropout = lora.dropout
    for number, module in enumerate(_target_modules(decoder.config, lora)):
        projection = decoder.get_submodule(module)
        assert isinstance(projection, Linear), module
        weight = projection.weight
        size_out, size_in = getattr(weight, "ds_shape", weight.shape)  # one that is divided is empty itself
        parts = (Linear(size_in, lora.rank, bias=False), Linear(lora.rank, size_out, bias=False))
        lora_a, lora_b = (part if hasattr(weight, "ds_id") else part.to(weight.device, weight.dtype) for part in parts)
        projection.add_low_rank(lora_a, lora_b, lora.scale, lora.dropout, _FIRST_SITE + number)


def drawn_lora(config: DecoderConfig, lora: Lora, seed: int) -> Callable[[str], Tensor]:
    """Deltas at their start, by name: A uniform within 1 / sqrt(in), which is what peft draws, and B zero.

    Each A has a generator of its own, so they may be asked for in any order.
    """
    shapes = lora_shapes(config, lora)

    def tensor(name: str) -> Tensor:
        if name.endswith(".lora_B.weight"):
            return torch.zeros(shapes[name])
        generator = torch.Generator().manual_seed(int(hash_value([seed, name])[:15], 16))
        bound = 1 / math.sqrt(shapes[name][1])
        return torch.empty(shapes[name]).uniform_(-bound, bound, generator=generator)

    return tensor


def adapted_source(base: WeightSource, lora: Lora, tensor: Callable[[str], Tensor], folder: Path) -> WeightSource:
    """A model of `base` with deltas: its tensors are merged as they are asked for, in fp32.

    Args:
        tensor: A or B by name, on the CPU.
        folder: the checkpoint folder of `base`.
    """
    targets = set(_target_shapes(base.config, lora))
    adapter = Adapter(lora, base, tensor, folder)

    def weight(name: str) -> Tensor:
        full, module = base.weight(name), name.removesuffix(".weight")
        return full if module not in targets or module == name else full.float() + delta(adapter, module)

    return WeightSource(base.config, weight, adapter)


def delta(adapter: Adapter, module: str) -> Tensor:
    """(alpha / rank) B A of one projection, [out, in] in fp32."""
    lora_a, lora_b = (adapter.tensor(f"{module}.{kind}.weight").float() for kind in _KINDS)
    return adapter.lora.scale * (lora_b @ lora_a)


def start_lora(parent: WeightSource, parent_folder: Path, lora: Lora, seed: int) -> WeightSource:
    """What an expert that is trained as deltas starts from: its parent with deltas that are zero, or the deltas of a parent that has some.

    Raises:
        ModelError: the parent has deltas of another shape.
    """
    if parent.adapter is None:
        return adapted_source(parent, lora, drawn_lora(parent.config, lora, seed), parent_folder)
    given = parent.adapter.lora
    for field in ("rank", "alpha", "targets"):
        wanted, there = getattr(lora, field), getattr(given, field)
        if wanted != there:
            raise ModelError(
                f"experts.lora.{field} = {_words(wanted)}: the parent in {parent_folder} has {_words(there)}, and an expert that branches "
                "from low-rank deltas goes on with them; use the parent's value"
            )
    return adapted_source(parent.adapter.base, lora, parent.adapter.tensor, parent.adapter.folder)


def _words(value: object) -> str:
    return ", ".join(value) if isinstance(value, tuple) else f"{value}"


def refuse_other_tensors(where: str, found: Mapping[str, Sequence[int]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise a ModelError unless `found` has the tensors of `expected` and no others, in these shapes."""
    for name in sorted(found.keys() | expected.keys()):
        here, wanted = found.get(name), expected.get(name)
        if here is None or tuple(here) != wanted:
            there = "is missing" if here is None else f"has shape {tuple(here)}"
            asked = "is not expected" if wanted is None else f"shape {wanted} is expected"
            raise ModelError(f"{where}: {name} {there}, {asked}; the deltas are not of this model, or the file is incomplete")
