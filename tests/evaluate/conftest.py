"""A small run directory as the stages before `ensemble` leave it: three languages, random models over bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_ensemble import write_byte_tokenizer

from megaxelm.cluster.language import LanguagePartitioner
from megaxelm.cluster.partitioner import Partitioner
from megaxelm.cluster.tfidf import TfidfPartitioner
from megaxelm.corpus.document import Document
from megaxelm.corpus.tokenizer import Tokenizer
from megaxelm.model.config import DecoderConfig
from megaxelm.model.decoder import Decoder
from megaxelm.model.hub import save_pretrained
from megaxelm.recipe import Recipe, parse_recipe

SENTENCES = {
    "en": ["the cat sat on the mat", "a dog ran in the park", "rain fell all day long", "we read a good book"],
    "ja": ["猫が敷物に座った。", "犬が公園を走った。", "一日中雨が降った。", "良い本を読んだ。"],
    "ru": ["кот сидел на ковре", "собака бежала в парке", "весь день шёл дождь", "мы читали хорошую книгу"],
}


def write_model(seed: int, folder: Path) -> None:
    """Export of a random model whose predictions are far from uniform and differ from seed to seed."""
    config = DecoderConfig(
        family="llama",
        vocab_size=260,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=24,
        max_positions=64,
        extra={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3},
    )
    decoder = Decoder(config)
    decoder.initialise(seed)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10)
    save_pretrained(decoder, folder)


def recipe_of(partitioner: str, **sections: dict[str, Any]) -> Recipe:
    clusters = {"partitioner": partitioner, "k": 3, "tfidf": {"dimensions": 4, "sample_documents": 12}}
    train = {"sequence_length": 48, "batch_sequences": 6}
    return parse_recipe({"name": "t", "corpus": {"train": "x.jsonl"}, "clusters": clusters, "train": train} | sections)


def write_run(folder: Path, partitioner_name: str) -> None:
    """Everything that `ensemble` and `evaluation` read."""
    documents = [Document(text, f"{code}-{number}", code) for code, texts in SENTENCES.items() for number, text in enumerate(texts)]
    for kind in ("valid", "sample"):
        (folder / "corpus" / kind).mkdir(parents=True)
        for code in SENTENCES:
            lines = [json.dumps(asdict(document), ensure_ascii=False) for document in documents if document.language == code]
            (folder / "corpus" / kind / f"{code}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_byte_tokenizer(folder / "tokenizer")
    tokenizer = Tokenizer.load(folder / "tokenizer")
    recipe = recipe_of(partitioner_name)
    by_document = TfidfPartitioner(3, recipe.clusters.tfidf, 0, tokenizer)
    partitioner: Partitioner = by_document if partitioner_name == "tfidf" else LanguagePartitioner()
    partitioner.fit(documents)
    (folder / "clusters").mkdir()
    partitioner.save(folder / "clusters")
    clusters: dict[str, dict[str, dict[str, int]]] = {name: {} for name in partitioner.names}
    for document, number in zip(documents, partitioner.assign(documents), strict=True):
        entry = clusters[partitioner.names[number]].setdefault(document.language, {"documents": 0, "tokens": 0, "bytes": 0})
        entry["documents"] += 1
        entry["tokens"] += document.num_bytes + 2
        entry["bytes"] += document.num_bytes
    (folder / "index").mkdir()
    (folder / "index" / "manifest.json").write_text(json.dumps({"clusters": clusters}))
    for seed, name in enumerate(["seed", "dense", *partitioner.names]):
        write_model(seed, folder / "experts" / name / "export")
    (folder / "account.json").write_text(json.dumps({"equal": True, "seed_tokens": 1, "dense_tokens": 2}))


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[[str], Path]:
    def make(partitioner: str = "language") -> Path:
        write_run(tmp_path / "run", partitioner)
        return tmp_path / "run"

    return make


@pytest.fixture(scope="session")
def make_recipe() -> Callable[..., Recipe]:
    return recipe_of


@pytest.fixture(scope="session")
def run_writer() -> Callable[[Path, str], None]:
    """`write_run`, for fixtures of a module."""
    return write_run
