"""A corpus of several files and a recipe that prepares it in seconds, and what came out of it, to compare runs."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

from tiny_run import WORDS, tiny_recipe

from megaxelm.recipe import Recipe, parse_recipe
from megaxelm.run import RunFolder
from megaxelm.stages import Stages


def write_files(folder: Path, files: int = 6, documents: int = 60) -> Path:
    """JSONL files of mixed languages, one of them compressed."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(files)
    for number in range(files):
        lines = []
        for i in range(documents):
            language = draw.choice(list(WORDS))
            text = " ".join(draw.choices(WORDS[language], k=draw.randint(5, 60)))
            lines.append(json.dumps({"id": f"{number}-{i}", "language": language, "text": text, "domain": draw.choice("ab")}))
        (folder / f"{number}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def pipeline_recipe(folder: Path, tokenizer: Path | None = None, /, **sections: Any) -> Recipe:
    """A recipe over `write_files`; with a finished tokenizer nothing has to be trained."""
    tree = tiny_recipe(folder, **{key: value for key, value in sections.items() if key != "executor"})
    if tokenizer is not None:
        tree["tokenizer"] = {"load": str(tokenizer)}
    tree["executor"] = {"block_bytes": 4000, "workers": 1} | sections.get("executor", {})
    return parse_recipe(tree)


def prepare(run: Path, recipe: Recipe, until: str = "index") -> list[str]:
    """Prepare a corpus; returns what was said."""
    said: list[str] = []
    Stages(RunFolder(run), recipe, say=said.append).run(until=until)
    return said


def index_hashes(run: Path) -> dict[str, str]:
    """Hash of every file of the index, by its name."""
    folder = run / "index"
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".bin", ".idx")
    }
