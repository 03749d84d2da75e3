"""A model as a source of its tensors: one at a time, whatever it lies in. What it is filled from, exported from and compared by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megaxelm.model.config import DecoderConfig
from megaxelm.model.decoder import Decoder, initial_weights


@dataclass(frozen=True)
class WeightSource:
    """A model whose tensors come one at a time.

    `weight(name)` is the full tensor by our name, on the CPU, in the type it is kept in; embedding and head with their padding rows. A
    tied head has no tensor of its own.
    """

    config: DecoderConfig
    weight: Callable[[str], Tensor]
    adapter: Adapter | None = None
    """The parts of a model that is a base and low-rank deltas; `weight` gives them merged."""

    def part(self, name: str) -> Tensor:
        """As `weight`, but with the parts of such a model apart: the base's tensors, and A and B by their names."""
        if self.adapter is None:
            return self.weight(name)
        return self.adapter.tensor(name) if ".lora_" in name else self.adapter.base.weight(name)


@dataclass(frozen=True)
class Lora:
    """Shape of low-rank deltas. `targets`: our names of the projections in a layer, such as `attention.q`, in the order of the model."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float = 0.0
    """Of the delta's input, in training."""

    @property
    def scale(self) -> float:
        """What the product of B and A is multiplied with (Hu et al. 2021, section 4.1)."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class Adapter:
    """The parts of a model that is a base and low-rank deltas. Made by `megaxelm.model.lora.adapted_source`.

    `tensor(name)` is A [rank, in] or B [out, rank] by our name, `layers.0.attention.q.lora_A.weight`, on the CPU; `folder` is the
    checkpoint folder of the base.
    """

    lora: Lora
    base: WeightSource
    tensor: Callable[[str], Tensor]
    folder: Path


def decoder_source(decoder: Decoder) -> WeightSource:
    """The weights of a decoder in memory."""
    parameters = dict(decoder.named_parameters())
    return WeightSource(decoder.config, lambda name: parameters[name].detach().cpu())


def drawn_source(config: DecoderConfig, seed: int) -> WeightSource:
    """Fresh weights, those of `Decoder.initialise(seed)`. They must be asked for once each, in the order of the model."""
    draws = initial_weights(config, seed)

    def weight(name: str) -> Tensor:
        drawn, tensor = next(draws)
        assert drawn == name, (drawn, name)
        return tensor

    return WeightSource(config, weight)


@torch.no_grad()
def streamed_logits(source: WeightSource, texts_tokens: Sequence[Sequence[int]]) -> Tensor:
    """Logits [tokens of all texts, vocab_size] in fp32 on the CPU, with the weights of one layer in memory at a time."""
    lengths = [len(text) for text in texts_tokens]
    tokens = torch.tensor([token for text in texts_tokens for token in text], dtype=torch.int64)
    positions = torch.cat([torch.arange(length) for length in lengths])
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    with torch.device("meta"):
        decoder = Decoder(replace(source.config, residual_dropout=0.0, attention_dropout=0.0))
    decoder.eval()
    parts: dict[str, nn.Module] = {"embed": decoder.embed, "norm": decoder.norm, "head": decoder.head}
    parts |= {f"layers.{number}": layer for number, layer in enumerate(decoder.layers)}
    for prefix, part in parts.items():
        _bring_weights(part, "embed" if prefix == "head" and source.config.tie_embeddings else prefix, source)
    return decoder.logits(decoder(tokens, positions, cu_seqlens))


def _bring_weights(part: nn.Module, prefix: str, source: WeightSource) -> None:
    """Have the weights of `part` come when it runs and go when it has run."""

    def bring(module: nn.Module, inputs: Any) -> None:
        weights = {name: source.weight(f"{prefix}.{name}").float() for name, _ in module.named_parameters()}
        module.load_state_dict(weights, assign=True)

    def drop(module: nn.Module, inputs: Any, output: Any) -> None:
        module.to_empty(device="meta")

    part.register_forward_pre_hook(bring)
    part.register_forward_hook(drop)
