"""`megaxelm <verb>`: thin functions, one a verb. Verbs that make take a RECIPE, verbs that use take a RUN directory.

A mistake of the user (MegaxelmError) is printed without a traceback and ends with exit code 2.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from megaxelm import __version__
from megaxelm.console import end_on_signals, run_guarded
from megaxelm.errors import RoutingError, StageError, TokenIndexError
from megaxelm.recipe import Recipe, dump_recipe, load_recipe, recipe_docs
from megaxelm.run import RunFolder

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Train, mix and grow X-ELM language models."
)
recipe_app = typer.Typer(no_args_is_help=True, help="Look at recipes.")
cluster_app = typer.Typer(no_args_is_help=True, help="Divide the corpus among experts.")
index_app = typer.Typer(no_args_is_help=True, help="Look at token indexes.")
bench_app = typer.Typer(no_args_is_help=True, help="Measure speed and memory.")
app.add_typer(recipe_app, name="recipe")
app.add_typer(cluster_app, name="cluster")
app.add_typer(index_app, name="index")
app.add_typer(bench_app, name="bench")

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, or the recipe of one.")]
IndexArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, its recipe, an index folder, or a Megatron prefix.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a field, e.g. --set train.lr=2e-3. Repeatable.")
]
RunsOption = Annotated[Path, typer.Option("--runs", help="Folder that holds the run directories.")]
_RUNS = Path("runs")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(f"megaxelm {__version__}")
        raise typer.Exit


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    until: Annotated[str | None, typer.Option(help="Last stage to make.")] = None,
    start: Annotated[str | None, typer.Option("--from", help="Make this stage and those after it, even when fresh.")] = None,
    only: Annotated[str | None, typer.Option(help="Make this stage alone.")] = None,
    runs: RunsOption = _RUNS,
) -> None:
    """Make what is missing or stale of a run, from the corpus to the report."""
    from megaxelm.stages import Stages

    loaded = load_recipe(recipe, overrides or ())
    folder = RunFolder(runs / loaded.name)
    made = Stages(folder, loaded).run(until=until, start=start, only=only)
    if not made:
        print(f"{folder.path}: everything is up to date; nothing to do")
    if (folder.path / "evaluation" / "results.json").exists() and made and until is None:
        _print_table(folder)
    if (folder.path / "report" / "index.html").exists():
        print(f"report: {folder.path}/report/index.html")


@app.command()
def prepare(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    start: Annotated[str | None, typer.Option("--from", help="Make this stage and those after it, even when fresh.")] = None,
    runs: RunsOption = _RUNS,
) -> None:
    """Prepare a corpus: read, deduplicate, tokenise, assign to clusters, merge into token indexes. Where: the recipe's `executor:`."""
    from megaxelm.stages import Stages

    loaded = load_recipe(recipe, overrides or ())
    folder = RunFolder(runs / loaded.name)
    if not Stages(folder, loaded).run(until="index", start=start):
        print(f"{folder.path}: everything is up to date; nothing to do")


@app.command()
def train(
    run: RunArgument,
    expert: Annotated[
        str | None, typer.Option(help="seed, dense, or a cluster's name; its parents are trained if they have to be. Default: all.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Seed, dense and every expert; the default.")] = False,
    hostfile: Annotated[Path | None, typer.Option(help="Nodes that deepspeed reaches by ssh, a line each: `worker-1 slots=8`.")] = None,
    overrides: SetOption = None,
    runs: RunsOption = _RUNS,
) -> None:
    """Train models of a run whose token index is made. Exit code 75: stopped and saved, the same command goes on."""
    from megaxelm.stages import Stages
    from megaxelm.train.ds_config import check_ds_config, find_ds_config
    from megaxelm.train.launch import LaunchOptions
    from megaxelm.train.members import find_member

    if everything and expert is not None:
        raise StageError(f"--all and --expert {expert}: give one of them")

    folder, recipe = _open_run(run, overrides, runs)
    check_ds_config(find_ds_config(recipe.train.deepspeed_config), recipe.train)
    stages = Stages(folder, recipe, check_sources=False)
    if expert is not None:
        find_member(stages.members(), expert)
    made = stages.train_models(expert, LaunchOptions(hostfile))
    if not made:
        print("trained already and fresh; nothing to do")


@app.command(context_settings={"allow_extra_args": True})
def submit(
    context: typer.Context,
    recipe: RecipeArgument,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the jobs and submit none.")] = False,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of one model's training.")] = 1,
    gpus_per_node: Annotated[int | None, typer.Option(min=0, help="0: train on CPUs. Default: train.num_devices.")] = None,
    partition: Annotated[str | None, typer.Option(help="Partition of all jobs.")] = None,
    account: Annotated[str | None, typer.Option(help="Account of all jobs.")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit of each job, as sbatch has it.")] = None,
    stage: Annotated[Path | None, typer.Option(help="Copy the token index to this folder of each node and train from there.")] = None,
    overrides: SetOption = None,
    runs: RunsOption = _RUNS,
) -> None:
    """Submit to Slurm what is missing or stale of a run: prepare, seed, experts (an array), evaluate. After --: options of sbatch."""
    from megaxelm.submit import SubmitOptions, plan_jobs, plan_text, submit_jobs

    loaded = load_recipe(recipe, overrides or ())
    folder = RunFolder(runs / loaded.name)
    options = SubmitOptions(nodes, gpus_per_node, partition, account, time, stage and stage.absolute(), context.args)
    jobs = plan_jobs(folder, loaded, options)
    if not jobs:
        print(f"{folder.path}: everything is up to date; nothing to submit")
        return
    print(plan_text(folder, jobs))
    if not dry_run:
        numbers = submit_jobs(folder, loaded, jobs)
        print("submitted: " + ", ".join(f"{name} as job {number}" for name, number in numbers.items()))
        print(f"see how it goes: megaxelm status {folder.path}")


@app.command()
def status(
    run: RunArgument, as_json: Annotated[bool, typer.Option("--json", help="One JSON object a model.")] = False, runs: RunsOption = _RUNS
) -> None:
    """Print state, step, loss, speed and time left of every model of a run, and what Slurm says of its jobs."""
    import json
    from dataclasses import asdict

    from megaxelm.status import run_status, status_text

    lines, members = run_status(_open_run(run, None, runs)[0])
    print("\n".join(json.dumps(asdict(item), ensure_ascii=False) for item in members) if as_json else status_text(lines, members))


@app.command()
def evaluate(run: RunArgument, overrides: SetOption = None, runs: RunsOption = _RUNS) -> None:
    """Bits per byte and perplexity by language of seed, dense, experts and mixtures; made again only when stale."""
    from megaxelm.stages import Stages

    folder, recipe = _open_run(run, overrides, runs)
    stages = Stages(folder, recipe, check_sources=False)
    stages.make_one("ensemble")
    stages.make_one("evaluation")
    _print_table(folder)


@app.command()
def report(run: RunArgument, runs: RunsOption = _RUNS) -> None:
    """Write the HTML report of an evaluated run again."""
    from megaxelm.stages import Stages

    folder, recipe = _open_run(run, None, runs)
    Stages(folder, recipe, check_sources=False).run(only="report")
    print(f"report: {folder.path}/report/index.html")


@app.command()
def export(
    source: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT", help="Run directory, its recipe, or a folder checkpoints/<step>.")],
    output: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    expert: Annotated[str | None, typer.Option(help="Of a run: seed, dense, or a cluster's name.")] = None,
    to: Annotated[str, typer.Option(help="Format: hf, a Hugging Face folder.")] = "hf",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    runs: RunsOption = _RUNS,
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
    folder, _ = _open_run(source, None, runs)
    export_checkpoint(_trained(folder, expert), output, dtype, sample_texts(folder, Tokenizer.load(folder.folder("tokenizer"))))
    print(f"{output}: a Hugging Face checkpoint of `{expert}` in {dtype}; reloaded, and its logits agree")


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, or an ensemble folder that was moved.")],
    prompt: Annotated[list[str], typer.Option(help="Text to continue. Repeatable.")],
    language: Annotated[str | None, typer.Option(help="Language of the prompts, for the language router.")] = None,
    expert: Annotated[str | None, typer.Option(help="One expert alone instead of the mixture.")] = None,
    router: Annotated[str | None, typer.Option(help="language, tfidf, posterior, uniform or fixed. Default: the ensemble's.")] = None,
    top_m: Annotated[int | None, typer.Option(help="Experts kept and run. Default: the ensemble's.")] = None,
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
    results = write_on(
        ensemble,
        prompt,
        languages=[language] * len(prompt),
        expert=expert,
        router=router,
        top_m=top_m,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    for text, result in zip(prompt, results, strict=True):
        print(f"{text}{result.text}")
        weights = ", ".join(f"{name} {weight:.2f}" for name, weight in result.mean_weights().items() if weight >= 0.005)
        print(f"  [{len(result.token_ids)} tokens; mean weights: {weights}]", file=sys.stderr)


@app.command()
def plan(
    recipe: RecipeArgument,
    gpus: Annotated[int, typer.Option(min=1, help="Devices of a node that train one model.")],
    gpu_memory: Annotated[str, typer.Option(help="Memory of a device, e.g. 80GB.")],
    nodes: Annotated[int, typer.Option(min=1, help="Nodes that train one model.")] = 1,
    speed: Annotated[float | None, typer.Option(min=1e-9, help="Tokens a second of all these devices together.")] = None,
    measured: Annotated[Path | None, typer.Option(help="Folder of a trained expert: its speed a device, from metrics.jsonl.")] = None,
    mfu: Annotated[float | None, typer.Option(min=0.01, max=1.0, help="Share of the device's peak, e.g. 0.4; needs --device.")] = None,
    device: Annotated[str | None, typer.Option(help="A100, H100, H100 PCIe, H200, B200, MI300X.")] = None,
    price: Annotated[float | None, typer.Option(min=0.0, help="Price of a device and hour.")] = None,
    vocab_size: Annotated[int | None, typer.Option(min=1, help="Pieces of the tokenizer, where it cannot be looked at from here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    overrides: SetOption = None,
) -> None:
    """What a recipe needs before it runs: memory by part, what fits, which configuration to take, steps, time and cost."""
    import json

    from megaxelm.plan.choose import parse_bytes
    from megaxelm.plan.table import Hardware, make_plan, show_plan
    from megaxelm.plan.table import speed as find_speed
    from megaxelm.train.shape import model_shape

    loaded = load_recipe(recipe, overrides or ())
    shape = model_shape(loaded, vocab_size)
    hardware = Hardware(gpus, nodes, parse_bytes(gpu_memory, "--gpu-memory"))
    tokens_per_second, said = find_speed(shape, loaded, hardware.devices, speed, measured, mfu, device)
    made = make_plan(loaded, shape, hardware, tokens_per_second, said, price)
    print(json.dumps(made)) if as_json else show_plan(made)


@bench_app.command("train")
def bench_train(
    recipe: RecipeArgument,
    configs: Annotated[str, typer.Option(help="DeepSpeed configurations, with commas.")] = "zero1,zero2,zero3",
    micro_batches: Annotated[str | None, typer.Option(help="Sequences a forward pass, with commas. Default: the recipe's.")] = None,
    checkpointing: Annotated[str, typer.Option(help="none, full, or a number n for every n-th layer, with commas.")] = "none,full",
    steps: Annotated[int, typer.Option(min=1, help="Steps that are timed, after one that is not.")] = 5,
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds after which a combination is given up.")] = 1800.0,
    output: Annotated[Path | None, typer.Option(help="Folder for bench.json and bench.png.")] = None,
    vocab_size: Annotated[int | None, typer.Option(min=1, help="Pieces of the tokenizer, where it cannot be looked at from here.")] = None,
    overrides: SetOption = None,
) -> None:
    """Train some steps on random tokens with each combination: tokens/s, MFU, peak memory, and which to take."""
    from dataclasses import asdict

    from megaxelm.errors import TrainError
    from megaxelm.files import write_json
    from megaxelm.train import bench
    from megaxelm.train.environment import check_compiler
    from megaxelm.train.shape import model_shape

    loaded = load_recipe(recipe, overrides or ())
    parts = [part.strip() for part in (micro_batches or str(loaded.train.micro_batch_size)).split(",")]
    sizes = [int(part) if part.isdigit() else 0 for part in parts]
    chosen = bench.cases(loaded, [part.strip() for part in configs.split(",")], sizes, [part.strip() for part in checkpointing.split(",")])
    model_shape(loaded, vocab_size)
    check_compiler()
    rows = list(bench.bench(loaded, chosen, steps, vocab_size, timeout, lambda text: print(text, file=sys.stderr, flush=True)))
    print(bench.table(rows))
    best = bench.recommend(rows)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        found = {"recipe": loaded.name, "steps": steps, "devices": loaded.train.num_devices, "rows": [asdict(row) for row in rows]}
        write_json(output / "bench.json", found | {"recommended": asdict(best.case) if best else None})
        bench.plot(rows, output / "bench.png", f"{loaded.name}, {loaded.train.num_devices} devices, {steps} steps")
    if best is None:
        raise TrainError("no combination gave a result; the table says why: try smaller --micro-batches, or --checkpointing full")
    print("\nthe fastest, and of those as fast the one with the least memory:\n\ntrain:")
    print(f"  deepspeed_config: {best.case.config}\n  micro_batch_size: {best.case.micro_batch_size}")
    print(f"  activation_checkpointing: {best.case.activation_checkpointing}")


@recipe_app.command("show")
def recipe_show(recipe: RecipeArgument, overrides: SetOption = None) -> None:
    """Print the resolved recipe, every default written out."""
    print(dump_recipe(load_recipe(recipe, overrides or ())), end="")


@recipe_app.command("check")
def recipe_check(recipe: RecipeArgument, overrides: SetOption = None) -> None:
    """Check a recipe without running it, and print what it would train."""
    from megaxelm.train.ds_config import check_ds_config, find_ds_config
    from megaxelm.train.members import account_text, plan_members

    loaded = load_recipe(recipe, overrides or ())
    check_ds_config(find_ds_config(loaded.train.deepspeed_config), loaded.train)
    print(f"{recipe}: valid")
    k = loaded.clusters.num_clusters or (len(loaded.corpus.languages) if loaded.corpus.languages else None)
    if k is None:
        print("one expert a language; how many there are is known when the corpus has been read")
    else:
        print(account_text(plan_members(loaded, [f"cluster-{number}" for number in range(k)])))


@recipe_app.command("docs")
def recipe_docs_command() -> None:
    """Print the reference of all fields (docs/recipe.md)."""
    print(recipe_docs(), end="")


@cluster_app.command("make")
def cluster_make(recipe: RecipeArgument, overrides: SetOption = None, runs: RunsOption = _RUNS) -> None:
    """Make the clusters of a recipe, and what they need."""
    from megaxelm.stages import Stages

    loaded = load_recipe(recipe, overrides or ())
    Stages(RunFolder(runs / loaded.name), loaded).run(until="clusters")


@cluster_app.command("show")
def cluster_show(run: RunArgument, runs: RunsOption = _RUNS) -> None:
    """Print the clusters of a run."""
    from megaxelm.cluster.stage import show_report
    from megaxelm.files import read_json

    folder, _ = _open_run(run, None, runs)
    show_report(read_json(folder.folder("clusters") / "report.json", names=list, clusters=list))


@cluster_app.command("donors")
def cluster_donors(
    languages: Annotated[list[str], typer.Argument(help="Languages that need a donor.")],
    among: Annotated[
        str, typer.Option(help="Languages that have experts, with commas.")
    ] = "ar,bg,de,el,en,es,fr,hi,ja,ko,ru,sw,tr,ur,vi,zh",
    number: Annotated[int, typer.Option(min=1, help="Relatives shown of each language.")] = 5,
    features: Annotated[str, typer.Option(help="URIEL feature set, as in clusters.typology.features.")] = "syntax_average",
    distances: Annotated[Path | None, typer.Option(help="CSV file of your own distances in place of URIEL.")] = None,
) -> None:
    """Print the nearest relatives of languages, by typology: the first one's expert is the donor."""
    from megaxelm.cluster.typology import donors
    from megaxelm.recipe import TypologyConfig

    known = [code.strip() for code in among.split(",") if code.strip()]
    config = TypologyConfig(features=features, distances=str(distances) if distances else None)
    for language, near in donors(languages, known, config):
        print(f"{language}: " + "  ".join(f"{code} {distance:.4f}" for code, distance in near[:number]))


@index_app.command("verify")
def index_verify(run: IndexArgument, runs: RunsOption = _RUNS) -> None:
    """Read every token index through, and compare it with the manifest and with tokenizer and clusters of the run."""
    from megaxelm.corpus.index_folder import verify_index
    from megaxelm.corpus.token_index import TokenIndex
    from megaxelm.corpus.tokenizer import Tokenizer

    place, folder = _find_index(run, runs)
    if not place.is_dir():
        index = TokenIndex(place)
        index.verify()
        print(f"{place}: {index.num_documents:,} documents, {index.num_tokens:,} tokens, sound")
        return
    tokenizer = Tokenizer.load(folder.folder("tokenizer")) if folder else None
    clusters = folder.marker("clusters") if folder else None
    for line in verify_index(place, tokenizer, clusters["fingerprint"] if clusters else None):
        print(line)


@index_app.command("stats")
def index_stats_command(
    run: IndexArgument, as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False, runs: RunsOption = _RUNS
) -> None:
    """Print documents, tokens, bytes a token and lengths of documents of every token index."""
    import json

    from megaxelm.corpus.index_folder import open_each
    from megaxelm.corpus.index_stats import index_stats, print_stats, stats_json
    from megaxelm.corpus.token_index import TokenIndex

    place, _ = _find_index(run, runs)
    indexes = open_each(place) if place.is_dir() else [(place.name, TokenIndex(place), None)]
    stats = [index_stats(index, name, num_bytes) for name, index, num_bytes in indexes]
    if not as_json:
        print_stats(stats)
        return
    for row in stats:
        print(json.dumps(stats_json(row), ensure_ascii=False))


@index_app.command("peek")
def index_peek(
    run: IndexArgument,
    name: Annotated[str | None, typer.Argument(metavar="CLUSTER/LANGUAGE", help="Which index; left out for a plain prefix.")] = None,
    document: Annotated[int, typer.Option(min=0, help="Number of the document.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Documents to print.")] = 1,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer folder of a run. Default: the one beside the index.")] = None,
    runs: RunsOption = _RUNS,
) -> None:
    """Print the token ids and the text of documents."""
    from megaxelm.corpus.index_folder import check_tokenizer, open_one
    from megaxelm.corpus.token_index import TokenIndex
    from megaxelm.corpus.tokenizer import Tokenizer

    place, _ = _find_index(run, runs)
    if place.is_dir() == (name is None):
        raise TokenIndexError(f"{place}: " + ("name one of its indexes, CLUSTER/LANGUAGE" if name is None else f"is one index, not {name}"))
    index = open_one(place, name) if name is not None else TokenIndex(place)
    beside = place.parent / "tokenizer"
    found = Tokenizer.load(tokenizer or beside) if tokenizer or (place.is_dir() and beside.is_dir()) else None
    if found is not None and place.is_dir():
        check_tokenizer(place, found)
    for i in range(document, min(document + count, max(index.num_documents, document + 1))):
        ids = index.document(i).tolist()
        print(f"document {i}, {len(ids)} tokens: {' '.join(map(str, ids))}")
        if found is not None:
            print(found.decode(ids))
    if found is None:
        print("(ids alone: no tokenizer lies beside the index; name one with --tokenizer)", file=sys.stderr)


@index_app.command("merge")
def index_merge(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Prefix to write: OUT.bin and OUT.idx, which must not exist.")],
    prefixes: Annotated[list[Path], typer.Argument(metavar="PREFIX...", help="Prefixes of Megatron token indexes, in order.")],
    vocab_size: Annotated[int | None, typer.Option(min=1, help="Refuse ids from this one on. Default: from the manifests, if any.")] = None,
) -> None:
    """Join Megatron token indexes of one tokenizer to one; each is verified first."""
    from megaxelm.corpus.index_folder import merged_vocab_size
    from megaxelm.corpus.index_merge import merge_indexes
    from megaxelm.corpus.token_index import TokenIndex

    known = merged_vocab_size(prefixes)
    merge_indexes(prefixes, output, vocab_size or known)
    index = TokenIndex(output)
    print(f"{output}: {index.num_documents:,} documents, {index.num_tokens:,} tokens of {len(prefixes)} indexes")


def _find_index(path: Path, runs: Path) -> tuple[Path, RunFolder | None]:
    """The index folder of a run, an index folder as it is, or the prefix of one index; and the run, where there is one."""
    from megaxelm.corpus.index_folder import MANIFEST
    from megaxelm.corpus.token_index import index_paths

    if index_paths(path)[1].exists() or ((path / MANIFEST).exists() and not (path / "recipe.yaml").exists()):
        return path, None
    folder, _ = _open_run(path, None, runs)
    return folder.folder("index"), folder


def _open_run(path: Path, overrides: list[str] | None, runs: Path) -> tuple[RunFolder, Recipe]:
    """A run directory with its stored recipe, or the run directory of a recipe."""
    if path.is_dir():
        folder = RunFolder(path)
        folder.recipe()
        return folder, load_recipe(path / "recipe.yaml", overrides or ())
    recipe = load_recipe(path, overrides or ())
    folder = RunFolder(runs / recipe.name)
    if not folder.path.exists():
        raise StageError(f"{folder.path}: this recipe has not been run yet: megaxelm run {path}")
    return folder, recipe


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


def _print_table(folder: RunFolder) -> None:
    from megaxelm.evaluate.table import print_table
    from megaxelm.files import read_json

    print_table(read_json(folder.path / "evaluation" / "results.json", languages=list, models=dict))


def main() -> None:
    """Entry point of the `megaxelm` command."""
    end_on_signals()
    sys.exit(run_guarded(lambda: app()))


if __name__ == "__main__":
    main()
