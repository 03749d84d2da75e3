"""A run whose experts are ready to be merged: a real corpus, tokenizer and index, and models that branch from one seed without any
training."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from megaxelm.corpus.tokenizer import Tokenizer
from megaxelm.ensemble.stage import build_ensemble
from megaxelm.model.config import DecoderConfig
from megaxelm.model.decoder import Decoder
from megaxelm.model.hub import save_pretrained
from megaxelm.recipe import Recipe
from megaxelm.run import RunFolder

CHANGE = 0.15
POSITIONS = 128


def small_config(vocab_size: int, family: str = "llama") -> DecoderConfig:
    """A model of two layers for a tokenizer of this size."""
    return DecoderConfig(
        family=family,
        vocab_size=vocab_size,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        intermediate_size=48,
        max_positions=POSITIONS,
        qk_norm=family == "qwen3",
        extra={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3},
    )


def seed_model(config: DecoderConfig) -> Decoder:
    """Random weights whose predictions are far from uniform."""
    decoder = Decoder(config)
    decoder.initialise(0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return decoder.eval()


def branched(seed: Decoder, number: int, change: float = CHANGE) -> Decoder:
    """The seed with every tensor changed a little, as training would."""
    decoder = Decoder(seed.config)
    decoder.load_state_dict(seed.state_dict())
    draw = torch.Generator().manual_seed(100 + number)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=change * float(parameter.std().nan_to_num(0.1)) + 0.01)
        decoder.embed.weight[seed.config.vocab_size :] = 0
    return decoder.eval()


def finish_run(run: Path, recipe: Recipe, family: str = "llama") -> Path:
    """Models and the ensemble of a run that is made up to the index."""
    tokenizer = Tokenizer.load(run / "tokenizer")
    seed = seed_model(small_config(tokenizer.vocab_size, family))
    clusters = json.loads((run / "clusters" / "report.json").read_text())["names"]
    experts = {}
    for number, name in enumerate(["seed", "dense", *clusters]):
        model = seed if name == "seed" else branched(seed, number)
        save_pretrained(model, run / "experts" / name / "export", tokenizer_folder=run / "tokenizer")
        experts[name] = {"parent": None if name == "seed" else "seed"}
    (run / "lineage.json").write_text(json.dumps({"experts": experts}))
    (run / "ensemble").mkdir()
    build_ensemble(recipe, run, run / "ensemble")
    RunFolder(run).write_recipe(recipe)
    return run
