"""The verb `export`: a trained model as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megaxelm.cli.options import RUNS, RunsOption, open_run
from megaxelm.errors import StageError
from megaxelm.run import RunFolder

_WHAT = {"hf": "a Hugging Face checkpoint", "adapter": "an adapter for peft"}


def export(
    source: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT", help="Run directory, its recipe, or a folder checkpoints/<step>.")],
    output: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    expert: Annotated[str | None, typer.Option(help="Of a run: seed, dense, or a cluster's name.")] = None,
    to: Annotated[
        str, typer.Option(help="Format: hf, a Hugging Face folder (low-rank deltas merged); adapter, the deltas for peft.")
    ] = "hf",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    runs: RunsOption = RUNS,
) -> None:
    """Write a trained model, or any checkpoint of its training, as a Hugging Face folder with its tokenizer, and compare logits."""
    from megaxelm.corpus.tokenizer import Tokenizer
    from megaxelm.model.export import export_checkpoint
    from megaxelm.model.hub import load_config
    from megaxelm.train.export import export_checkpoint_folder, is_checkpoint_path, sample_texts

    if to not in _WHAT:
        raise StageError(f"--to {to}: choose {' or '.join(_WHAT)}")
    if is_checkpoint_path(source):
        if expert is not None:
            raise StageError(f"--expert {expert}: {source} is a checkpoint of one model already; leave --expert out")
        tag = export_checkpoint_folder(source, output, dtype, to)
        print(f"{output}: {_WHAT[to]} of {tag} in {dtype}; reloaded, and its logits agree")
        _tell_base(output, to)
        return
    if expert is None:
        raise StageError(f"--expert is missing: which model of {source}? Name one, or give a folder experts/<name>/checkpoints/<step>")
    folder, _ = open_run(source, None, runs)
    trained = _trained(folder, expert)
    texts = sample_texts(folder, Tokenizer.load(folder.folder("tokenizer")), load_config(trained).max_positions)
    export_checkpoint(trained, output, dtype, texts, to)
    print(f"{output}: {_WHAT[to]} of `{expert}` in {dtype}; reloaded, and its logits agree")
    _tell_base(output, to)


def _tell_base(output: Path, to: str) -> None:
    if to == "adapter":
        from megaxelm.model.adapter_files import base_folder

        print(
            f"{output}: its base is {base_folder(output)}; keep the way from one folder to the other, or write the new one into the adapter"
        )


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
