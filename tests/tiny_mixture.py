"""A tokenizer of bytes and an ensemble folder of random experts, for the programs that take a RUN."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import xxhash
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from megaxelm.ensemble.folder import EnsembleSettings, save_ensemble
from megaxelm.ensemble.routers import RouterData
from megaxelm.model.config import config_from_recipe
from megaxelm.model.decoder import Decoder
from megaxelm.model.hub import save_pretrained
from megaxelm.recipe import ModelConfig

EXPERTS = ["north", "south"]
POSITIONS = 96


def write_byte_tokenizer(folder: Path) -> None:
    """A real tokenizer folder of 260 pieces: four special ones and the bytes."""
    folder.mkdir(parents=True)
    vocabulary = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("<pad>", 0.0), *((f"<0x{byte:02X}>", -5.0) for byte in range(256))]
    backend = Backend(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<unk>", "<s>", "</s>", "<pad>"])
    backend.save(str(folder / "tokenizer.json"))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    fingerprint = xxhash.xxh3_128_hexdigest((folder / "tokenizer.json").read_bytes())
    settings = {"begin_of_document": True, "bos_id": 1, "eos_id": 2, "vocab_size": 260, "trained": False, "name": "bytes"}
    (folder / "megaxelm_tokenizer.json").write_text(json.dumps(settings | {"fingerprint": fingerprint}))


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
