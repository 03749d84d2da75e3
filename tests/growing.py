"""A trained run of four languages without the training: every model is its parent with noise. And text of languages that it lacks."""

from __future__ import annotations

import json
import random
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import tiny_recipe

from megaxelm.corpus.tokenizer import Tokenizer
from megaxelm.model.config import config_from_recipe
from megaxelm.model.decoder import Decoder
from megaxelm.model.hub import load_pretrained, save_pretrained, weights_hash
from megaxelm.recipe import Recipe
from megaxelm.run import RunFolder
from megaxelm.stages import Stages
from megaxelm.train.members import Member

NEW_WORDS = {
    "az": "bir kiçik ev çay köhnə gəzir görür parlaq səhər altında körpü sakit insanlar oxuyur və sonra yağış yağır".split(),
    "uk": "дім річка малий старий іде бачить світлий ранок під мостом тихі люди співають і потім дощ падає знову".split(),
    "xx": "bala kuna tiri molo sefa nuru pika lomo zata rero".split(),
}


def write_new_languages(folder: Path, documents: int = 30) -> Path:
    """One JSONL file a language."""
    folder.mkdir(parents=True, exist_ok=True)
    for language, words in NEW_WORDS.items():
        draw = random.Random(language)
        with open(folder / f"{language}.jsonl", "w", encoding="utf-8") as file:
            for number in range(documents):
                text = ". ".join(" ".join(draw.choices(words, k=draw.randint(4, 9))) for _ in range(draw.randint(1, 4)))
                file.write(json.dumps({"id": f"{language}-{number}", "language": language, "text": text}, ensure_ascii=False) + "\n")
    return folder


def pretend_to_train(run: RunFolder, recipe: Recipe, members: list[Member], options: object = None) -> None:
    """Stands for `train_members`: a loaded seed is copied, a fresh one drawn, and what branches is its parent with noise of its own."""
    tokenizer = Tokenizer.load(run.folder("tokenizer"))
    for member in members:
        if member.parent is not None:
            decoder = load_pretrained(run.expert(member.parent) / "export")
            noise = torch.Generator().manual_seed(zlib.crc32(f"{member.name} {member.steps} {recipe.train.language_weights}".encode()))
            with torch.no_grad():
                for parameter in decoder.parameters():
                    parameter += 0.3 * parameter.std() * torch.randn(parameter.shape, generator=noise)
        elif recipe.seed.load:
            decoder = load_pretrained(recipe.seed.load)
        else:
            decoder = Decoder(config_from_recipe(recipe.model, tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, 3))
            decoder.initialise(0)
        export = run.expert(member.name) / "export"
        shutil.rmtree(export, ignore_errors=True)
        save_pretrained(decoder, export, tokenizer_folder=run.folder("tokenizer"))
        made_from = Stages(run, recipe, check_sources=False).made_from(f"experts/{member.name}")
        run.close_expert(member.name, made_from, weights_hash(export))


def stand_in(patch: pytest.MonkeyPatch) -> None:
    """No training and no figures of the report, which take the time."""
    patch.setattr("megaxelm.train.launch.train_members", pretend_to_train)
    patch.setattr("megaxelm.stages.Stages._make_report", lambda stages, out: None)


def grow_recipe(base: Path, /, **sections: Any) -> dict[str, Any]:
    """A recipe over both folders of text, of which it names the four languages of the first."""
    tree = tiny_recipe(base / "corpus", **sections)
    tree["corpus"] |= {"train": [f"{base}/corpus/*.jsonl", f"{base}/new/*.jsonl"], "languages": ["bg", "de", "en", "ru"]}
    tree["clusters"] |= {"tfidf": {"dimensions": 8, "sample_documents": 80}}
    tree["evaluation"] = {"max_documents": 4}
    return tree


def write_index(folder: Path, clusters: dict[str, dict[str, int]]) -> None:
    """The manifest of a token index, with the tokens of each language in each cluster."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {name: {code: {"tokens": tokens} for code, tokens in text.items()} for name, text in clusters.items()}
    (folder / "manifest.json").write_text(json.dumps({"clusters": found}))


def grow_in(run: Path, *languages: str, **options: Any) -> tuple[bool, list[str]]:
    """Grow languages in a run; returns whether anything was trained, and what was said."""
    from megaxelm.grow.make import GrowOptions, grow

    folder, said = RunFolder(run), list[str]()
    return grow(folder, folder.recipe(), GrowOptions(languages, **options), said.append), said


def drop_in(run: Path, languages: str = "", experts: str = "", undo: bool = False) -> list[str]:
    """Drop languages or experts, or bring them back; returns what was said."""
    from megaxelm.grow.drop import drop

    folder, said = RunFolder(run), list[str]()
    drop(folder, folder.recipe(), languages.split(), experts.split(), undo, said.append)
    return said
