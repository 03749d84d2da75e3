"""The verb `export`: a trained model as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megaxelm.cli.options import RUNS, RunsOption, open_run
from megaxelm.errors import StageError
from megaxelm.run import RunFolder


def export(
    source: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT", help="Run directory, its recipe, or a folder checkpoints/<step>.")],
    output: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    expert: Annotated[str | None, typer.Option(help="Of a run: seed, dense, or a cluster's name.")] = None,
    to: Annotated[str, typer.Option(help="Format: hf, a Hugging Face folder.")] = "hf",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    runs: RunsOption = RUNS,
) -> None:
    """Write a trained model, or any checkpoint of its training, as a Hugging Face folder with its tokenizer, and compare logits."""
    from megaxelm.corpus.tokenizer import Tokenizer
    from megaxelm.model.export import export_checkpoint
    from megaxelm.train.export import export_checkpoint_folder, is_checkpoint_path, sample_texts

    if to != "hf":
        raise StageError(f"--to {to}: hf is the only format there is")
    if is_checkpoint_path(source):
        if expert is not None:
            raise StageError(f"--expert {expert}: {source} is a checkpoint of one model already; leave --expert out")
        tag = export_checkpoint_folder(source, output, dtype)
        print(f"{output}: a Hugging Face checkpoint of {tag} in {dtype}; reloaded, and its logits agree")
        return
    if expert is None:
        raise StageError(f"--expert is missing: which model of {source}? Name one, or give a folder experts/<name>/checkpoints/<step>")
    folder, _ = open_run(source, None, runs)
    export_checkpoint(_trained(folder, expert), output, dtype, sample_texts(folder, Tokenizer.load(folder.folder("tokenizer"))))
    print(f"{output}: a Hugging Face checkpoint of `{expert}` in {dtype}; reloaded, and its logits agree")


def _trained(folder: RunFolder, name: str) -> Path:
    experts = folder.path / "experts"
    trained = sorted(path.name for path in experts.iterdir() if (path / "export").exists()) if experts.exists() else []
    if name not in trained:
        raise StageError(f"--expert {name}: not trained in {folder.path}; trained are: {', '.join(trained) or 'none yet'}")
    marker = folder.marker(f"experts/{name}")
    if marker is None:
        raise StageError(f"--expert {name}: its training is not finished: megaxelm train {folder.path} --expert {name}")
    from megaxelm.model.hub import weights_hash

    source = experts / name / "export"
    if weights_hash(source) != marker["weights"]:
        raise StageError(f"{source}: these are not the weights that were trained; remove experts/{name}/export and train it again")
    return source
