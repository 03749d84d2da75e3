"""Small models with low-rank deltas: a base on disk, adapters beside it, and the decoder that holds both apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaxelm.model.adapter_files import save_adapter
from megaxelm.model.config import DecoderConfig, config_from_recipe
from megaxelm.model.decoder import Decoder
from megaxelm.model.hub import open_pretrained, save_pretrained
from megaxelm.model.lora import adapted_source, add_lora, lora_from_recipe, lora_shapes
from megaxelm.model.source import Lora, WeightSource
from megaxelm.recipe import LoraConfig, ModelConfig

VOCAB = 203
SMALL: dict[str, Any] = {"hidden_size": 48, "num_layers": 2, "num_heads": 4, "intermediate_size": 80, "max_positions": 128}
CONFIGS = {
    "xglm": config_from_recipe(ModelConfig(family="xglm", **SMALL), VOCAB, 0, 2, 1),
    "llama": config_from_recipe(ModelConfig(family="llama", num_kv_heads=2, tie_embeddings=False, **SMALL), VOCAB, 0, 1, 2),
    "qwen3": config_from_recipe(ModelConfig(family="qwen3", num_kv_heads=2, **SMALL), VOCAB, 0, 1, 2),
}


def base_decoder(config: DecoderConfig, seed: int = 0) -> Decoder:
    """Random weights, biases and norms too."""
    decoder = Decoder(config)
    decoder.initialise(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return decoder.eval()


def write_base(folder: Path, family: str = "llama", seed: int = 0) -> Path:
    save_pretrained(base_decoder(CONFIGS[family], seed), folder)
    return folder


def lora_of(config: DecoderConfig, **settings: Any) -> Lora:
    return lora_from_recipe(LoraConfig(**{"rank": 3, "alpha": 12.0} | settings), config)


def random_deltas(config: DecoderConfig, lora: Lora, seed: int) -> dict[str, Tensor]:
    """A and B, both far from zero."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in lora_shapes(config, lora).items()}


def adapted(base: Path, seed: int = 0, **settings: Any) -> WeightSource:
    """The model in `base` with random deltas."""
    source = open_pretrained(base)
    lora = lora_of(source.config, **settings)
    return adapted_source(source, lora, random_deltas(source.config, lora, seed).__getitem__, base)


def write_adapter(folder: Path, base: Path, seed: int = 0, **settings: Any) -> Path:
    save_adapter(adapted(base, seed, **settings), folder, torch.float32)
    return folder


def unmerged(source: WeightSource, dtype: torch.dtype = torch.float32, **dropout: float) -> Decoder:
    """A decoder that holds base and deltas apart, as training does."""
    assert source.adapter is not None
    decoder = Decoder(replace(source.config, **dropout))
    add_lora(decoder, source.adapter.lora)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.copy_(source.part(name))
    return decoder.to(dtype).eval()


def merged(source: WeightSource) -> Decoder:
    decoder = Decoder(source.config)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.copy_(source.weight(name))
    return decoder.eval()


def logits(decoder: Decoder, length: int = 20, **options: Any) -> Tensor:
    tokens = torch.arange(3, 3 + length)
    hidden = decoder(tokens, torch.arange(length), torch.tensor([0, 8, length]), **options)
    assert isinstance(hidden, Tensor)
    return decoder.logits(hidden)
