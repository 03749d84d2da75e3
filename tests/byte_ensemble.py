"""A small ensemble folder on disk: random experts over bytes, a tokenizer of bytes, every router."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import xxhash
from tokenizers import Tokenizer as Backend
from tokenizers import decoders as backend_decoders
from tokenizers import models, processors

from megaxelm.cluster.space import TfidfSpace
from megaxelm.corpus.tokenizer import Tokenizer
from megaxelm.ensemble.folder import EnsembleSettings, save_ensemble
from megaxelm.ensemble.routers import RouterData
from megaxelm.model.config import DecoderConfig
from megaxelm.model.decoder import Decoder
from megaxelm.model.hub import save_pretrained
from megaxelm.recipe import TfidfConfig

VOCABULARY = 260
TEXTS = ["the cat sat on the mat", "a dog ran in a park", "кот сидел на ковре", "собака бежала в парке"]
NAMES = ("e0", "e1", "e2")


def write_byte_tokenizer(folder: Path, with_start: bool = False) -> None:
    """A real tokenizer folder of 260 pieces: four special ones and the bytes; `with_start`: its own call puts BOS in front."""
    folder.mkdir(parents=True)
    vocabulary = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("<pad>", 0.0), *((f"<0x{byte:02X}>", -5.0) for byte in range(256))]
    backend = Backend(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    backend.decoder = backend_decoders.Sequence([backend_decoders.ByteFallback(), backend_decoders.Fuse()])
    backend.add_special_tokens(["<unk>", "<s>", "</s>", "<pad>"])
    if with_start:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[("<s>", 1)])
    backend.save(str(folder / "tokenizer.json"))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    settings = {
        "begin_of_document": True,
        "bos_id": 1,
        "eos_id": 2,
        "vocab_size": VOCABULARY,
        "fingerprint": xxhash.xxh3_128_hexdigest((folder / "tokenizer.json").read_bytes()),
        "trained": False,
        "name": "bytes",
    }
    (folder / "megaxelm_tokenizer.json").write_text(json.dumps(settings))


def byte_decoder(seed: int, max_positions: int = 64, scale: float = 8.0) -> Decoder:
    """A decoder of two layers whose predictions are far from uniform and differ from seed to seed."""
    config = DecoderConfig(
        family="llama",
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=48,
        max_positions=max_positions,
        extra={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3},
    )
    decoder = Decoder(config)
    decoder.initialise(seed)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale)
    return decoder.eval()


def write_byte_ensemble(root: Path, max_positions: int = 64, scale: float = 8.0, **settings: Any) -> Path:
    """`root/ensemble` with the experts e0, e1, e2; e0 has the language en, e1 ru."""
    write_byte_tokenizer(root / "tokenizer", with_start=True)
    tokenizer = Tokenizer.load(root / "tokenizer")
    for number, name in enumerate(NAMES):
        save_pretrained(byte_decoder(number, max_positions, scale), root / "exports" / name, tokenizer_folder=root / "tokenizer")
    space = TfidfSpace.fit(TEXTS, TfidfConfig(analyzer="subword", dimensions=3), 0, tokenizer)
    vectors = torch.from_numpy(space.transform(TEXTS))
    data = RouterData(
        list(NAMES),
        language_expert={"en": "e0", "ru": "e1"},
        fixed_weights={"e0": 0.25, "e2": 0.75},
        temperature=0.3,
        space=space,
        centres=torch.stack([vectors[0], vectors[2], vectors[1]]),
    )
    exports = {name: root / "exports" / name for name in NAMES}
    save_ensemble(root / "ensemble", exports, root / "tokenizer", data, EnsembleSettings(**settings))
    return root / "ensemble"
