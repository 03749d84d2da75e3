"""A model as a source of its tensors: one at a time, whatever it lies in. What it is filled from, exported from and compared by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
