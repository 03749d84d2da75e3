"""The smallest real run: a corpus of four languages, a recipe that trains on it in seconds, and how to start the program."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]

WORDS = {
    "en": "the a house river small old walks sees bright morning under bridge quiet people sing and then rain falls".split(),
    "de": "das ein Haus Fluss klein alt geht sieht heller Morgen unter Brücke stille Leute singen und dann Regen fällt wieder".split(),
    "ru": "дом река малый старый идёт видит светлое утро под мостом тихие люди поют и потом дождь падает снова над холмами".split(),
    "bg": "къща река малък стар върви вижда светло утро под моста тихи хора пеят и после дъжд пада отново над хълмовете".split(),
}


def write_corpus(folder: Path, documents: int = 60) -> Path:
    """One JSONL file a language: sentences of random words, so that there is something to learn."""
    folder.mkdir(parents=True, exist_ok=True)
    for language, words in WORDS.items():
        draw = random.Random(language)
        with open(folder / f"{language}.jsonl", "w", encoding="utf-8") as file:
            for number in range(documents):
                text = ". ".join(" ".join(draw.choices(words, k=draw.randint(4, 9))) for _ in range(draw.randint(1, 5)))
                file.write(json.dumps({"id": f"{language}-{number}", "language": language, "text": text}, ensure_ascii=False) + "\n")
    return folder


def tiny_recipe(corpus: Path, /, **sections: dict[str, Any]) -> dict[str, Any]:
    """A recipe over `write_corpus` that trains in seconds; `sections` are merged into it."""
    tree: dict[str, Any] = {
        "name": "tiny",
        "corpus": {"train": f"{corpus}/*.jsonl", "held_out": {"share": 0.1}},
        "tokenizer": {"vocab_size": 400},
        "clusters": {"partitioner": "typology", "k": 2},
        "model": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64, "max_positions": 64},
        "train": {
            "sequence_length": 32,
            "batch_sequences": 8,
            "micro_batch_size": 2,
            "steps": 6,
            "lr": 1e-2,
            "precision": "fp32",
            "log_every": 1,
        },
        "evaluation": {"max_documents": 5},
    }
    for section, values in sections.items():
        tree[section] = tree.get(section, {}) | values
    return tree


def load_tokenizer_of(run: Path, folder: Path) -> None:
    """Make a run up to the token index again with the tokenizer in `folder` as a loaded one."""
    from megaxelm.recipe import load_recipe
    from megaxelm.run import RunFolder
    from megaxelm.stages import Stages

    recipe = load_recipe(run / "recipe.yaml", [f"tokenizer.load={folder}"])
    Stages(RunFolder(run), recipe, say=lambda text: None).run(until="index")


def run_module(*arguments: str, timeout: int = 480, **variables: str) -> subprocess.CompletedProcess[str]:
    """`python -m ...` as a user would, with the tools of this environment on the PATH."""
    env = dict(os.environ) | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'kernels'}"} | variables
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=timeout, env=env)
