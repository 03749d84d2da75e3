"""An ensemble folder of random experts over bytes, for the programs that take a RUN."""

from __future__ import annotations

from pathlib import Path

import torch
from byte_ensemble import write_byte_tokenizer

from megaxelm.ensemble.folder import EnsembleSettings, save_ensemble
from megaxelm.ensemble.routers import RouterData
from megaxelm.model.config import config_from_recipe
from megaxelm.model.decoder import Decoder
from megaxelm.model.hub import save_pretrained
from megaxelm.recipe import ModelConfig

EXPERTS = ["north", "south"]
POSITIONS = 96


def write_mixture(run: Path) -> Path:
    """A run of which only `ensemble/` is there: two experts whose predictions are far from uniform, router `uniform`."""
    write_byte_tokenizer(run / "tokenizer")
    model = ModelConfig(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, max_positions=POSITIONS)
    exports = {}
    for number, name in enumerate(EXPERTS):
        decoder = Decoder(config_from_recipe(model, 260, 1, 2, 3))
        decoder.initialise(number)
        with torch.no_grad():
            for parameter in decoder.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(6)
        exports[name] = run / "exports" / name
        save_pretrained(decoder, exports[name])
    data = RouterData(EXPERTS, language_expert={"en": "north", "de": "south"}, fixed_weights={"north": 0.25, "south": 0.75})
    save_ensemble(run / "ensemble", exports, run / "tokenizer", data, EnsembleSettings("uniform"))
    return run
