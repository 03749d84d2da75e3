"""A model applied to texts layer by layer, with one layer in memory at a time: what goes into each feed-forward part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from megaxelm.model.decoder import Decoder
from megaxelm.model.layers import DecoderLayer, PackedSurroundings
from megaxelm.model.source import WeightSource
from megaxelm_kernels.attention import PackedLayout

_BATCH_TOKENS = 4096


@torch.no_grad()
def feed_forward_inputs(
    source: WeightSource, texts_tokens: Sequence[Sequence[int]], *, device: torch.device | str = "cpu"
) -> Iterator[tuple[int, Tensor]]:
    """Of each layer in turn its number and the inputs of its feed-forward part [tokens of all texts, H] fp32: after the norm.

    The feed-forward part is read from `source` when the next layer is asked for, so it may be made from these inputs.
    """
    with torch.device("meta"):
        decoder = Decoder(replace(source.config, residual_dropout=0.0, attention_dropout=0.0)).eval()
    batches = list(_batches(texts_tokens))
    tokens = [torch.tensor([token for text in batch for token in text], device=device) for batch in batches]
    positions = [torch.cat([torch.arange(len(text)) for text in batch]).to(device) for batch in batches]
    around = []
    for batch, places in zip(batches, positions, strict=True):
        bounds = torch.tensor([0, *(len(text) for text in batch)]).cumsum(0)
        layout = PackedLayout(bounds, places.device)
        around.append(PackedSurroundings(layout, decoder._rotary(places), source.config.sliding_window, "sdpa"))
    _bring(decoder.embed, "embed", source, device)
    states = [decoder._embed(ids, places) for ids, places in zip(tokens, positions, strict=True)]
    decoder.embed.to_empty(device="meta")
    for number, layer in enumerate(decoder.layers):
        assert isinstance(layer, DecoderLayer)
        for part in ("attention_norm", "attention", "mlp_norm"):
            _bring(getattr(layer, part), f"layers.{number}.{part}", source, device)
        normed = []
        for place, (state, surroundings) in enumerate(zip(states, around, strict=True)):
            branch = layer.attention(layer.attention_norm(state), surroundings)
            inputs, states[place] = layer.mlp_norm(branch, state)
            normed.append(inputs)
        yield number, torch.cat(normed)
        if number + 1 < len(decoder.layers):
            _bring(layer.mlp, f"layers.{number}.mlp", source, device)
            states = [state + layer.mlp(inputs) for state, inputs in zip(states, normed, strict=True)]
        layer.to_empty(device="meta")


def _batches(texts_tokens: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    batch: list[Sequence[int]] = []
    for text in texts_tokens:
        if batch and sum(map(len, batch)) + len(text) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch


def _bring(module: nn.Module, prefix: str, source: WeightSource, device: torch.device | str) -> None:
    weights = {name: source.weight(f"{prefix}.{name}").float().to(device) for name, _ in module.named_parameters()}
    module.load_state_dict(weights, assign=True)
