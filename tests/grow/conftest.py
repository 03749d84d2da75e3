"""A trained run of four languages without the training: every model is its parent with noise. And text of languages that it lacks."""

from __future__ import annotations

import json
import random
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import tiny_recipe, write_corpus

from megaxelm.corpus.tokenizer import Tokenizer
from megaxelm.model.config import config_from_recipe
from megaxelm.model.decoder import Decoder
from megaxelm.model.hub import load_pretrained, save_pretrained, weights_hash
from megaxelm.recipe import Recipe, parse_recipe
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


@pytest.fixture(autouse=True)
def _no_training(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "real_training" not in request.keywords and not request.node.get_closest_marker("slow"):
        monkeypatch.setattr("megaxelm.train.launch.train_members", pretend_to_train)


@pytest.fixture(scope="session")
def _trained_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    base = tmp_path_factory.mktemp("grow")
    write_corpus(base / "corpus", documents=40)
    write_new_languages(base / "new")
    recipe = parse_recipe(grow_recipe(base))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megaxelm.train.launch.train_members", pretend_to_train)
        Stages(RunFolder(base / "runs" / "tiny"), recipe, say=lambda text: None).run(until="ensemble")
    yield base


def grow_recipe(base: Path, /, **sections: Any) -> dict[str, Any]:
    """A recipe over both folders of text, of which it uses the four languages of the first."""
    tree = tiny_recipe(base / "corpus", **sections)
    tree["corpus"] |= {"train": [f"{base}/corpus/*.jsonl"], "languages": ["bg", "de", "en", "ru"]}
    tree["clusters"] |= {"tfidf": {"dimensions": 8, "sample_documents": 80}}
    tree["evaluation"] = {"max_documents": 4}
    return tree


@pytest.fixture
def trained_run(_trained_run: Path, tmp_path: Path) -> Path:
    """A run directory of its own with a trained run; new text lies in `new/` beside `runs/`."""
    shutil.copytree(_trained_run / "runs", tmp_path / "runs")
    shutil.copytree(_trained_run / "new", tmp_path / "new")
    return tmp_path / "runs" / "tiny"


@pytest.fixture
def grow_languages(trained_run: Path) -> Callable[..., tuple[bool, list[str]]]:
    """Grow languages in the trained run with the text in `new/`; returns whether anything was made, and what was said."""
    from megaxelm.grow.make import GrowOptions, grow

    def run(*languages: str, **options: Any) -> tuple[bool, list[str]]:
        folder, said = RunFolder(trained_run), list[str]()
        options = {"corpus": [f"{trained_run.parent.parent}/new/*.jsonl"]} | options
        return grow(folder, folder.recipe(), GrowOptions(languages, **options), said.append), said

    return run
