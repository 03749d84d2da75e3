"""Verbs that use trained models: `export`, `generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from megaxelm.cli.options import RUNS, RunsOption, open_run
from megaxelm.errors import RoutingError, StageError
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


def generate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, or an ensemble folder that was moved.")],
    prompt: Annotated[list[str], typer.Option(help="Text to continue. Repeatable.")],
    language: Annotated[str | None, typer.Option(help="Language of the prompts, for the language router. Default: detected.")] = None,
    expert: Annotated[str | None, typer.Option(help="One expert alone instead of the mixture.")] = None,
    router: Annotated[str | None, typer.Option(help="language, tfidf, posterior, uniform or fixed. Default: the ensemble's.")] = None,
    top_m: Annotated[int | None, typer.Option(help="Experts kept and run. Default: the ensemble's.")] = None,
    refresh: Annotated[str | None, typer.Option(help="Weights are made anew: token, chunk or frozen. Default: the ensemble's.")] = None,
    refresh_tokens: Annotated[int | None, typer.Option(help="Tokens of a chunk, or until weights are frozen.")] = None,
    posterior_decay: Annotated[
        str | None, typer.Option(help="cumulative (1), one-step (0), or a number between: what a token counts for each one after it.")
    ] = None,
    posterior_reads: Annotated[str | None, typer.Option(help="With --top-m: kept or all; who runs after the prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the smallest set of tokens that holds this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
) -> None:
    """Write on from prompts with the mixture of experts."""
    for text in prompt:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RoutingError("--prompt: not UTF-8 text; check the encoding of the terminal or file it came from") from None
    from megaxelm.ensemble.folder import load_ensemble
    from megaxelm.ensemble.generation import generate as write_on

    ensemble = load_ensemble(run if (run / "config.json").exists() else run / "ensemble")
    given: dict[str, object] = {"refresh": refresh, "refresh_tokens": refresh_tokens, "posterior_reads": posterior_reads}
    given = {name: value for name, value in given.items() if value is not None}
    if posterior_decay is not None:
        given["posterior_decay"] = _decay(posterior_decay)
    results = write_on(
        ensemble,
        prompt,
        languages=[language] * len(prompt),
        expert=expert,
        router=ensemble.router(router, **given) if given else router,
        top_m=top_m,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    for text, result in zip(prompt, results, strict=True):
        print(f"{text}{result.text}")
        weights = ", ".join(f"{name} {weight:.2f}" for name, weight in result.mean_weights().items() if weight >= 0.005)
        found = f"; language {result.detected_language} (detected)" if result.detected_language else ""
        print(f"  [{len(result.token_ids)} tokens{found}; mean weights: {weights}]", file=sys.stderr)


def _decay(text: str) -> float:
    from megaxelm.ensemble.routers.posterior import DECAY_NAMES

    try:
        return DECAY_NAMES[text] if text in DECAY_NAMES else float(text)
    except ValueError:
        raise RoutingError(f"--posterior-decay {text}: choose cumulative, one-step, or a number from 0 to 1") from None


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
