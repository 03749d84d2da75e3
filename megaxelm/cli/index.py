"""`megaxelm index`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from megaxelm.cli.options import RUNS, RunsOption, open_run
from megaxelm.errors import TokenIndexError
from megaxelm.run import RunFolder

app = typer.Typer(no_args_is_help=True, help="Look at token indexes.")
IndexArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, its recipe, an index folder, or a Megatron prefix.")]


@app.command("verify")
def index_verify(run: IndexArgument, runs: RunsOption = RUNS) -> None:
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


@app.command("stats")
def index_stats_command(
    run: IndexArgument, as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False, runs: RunsOption = RUNS
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


@app.command("peek")
def index_peek(
    run: IndexArgument,
    name: Annotated[str | None, typer.Argument(metavar="CLUSTER/LANGUAGE", help="Which index; left out for a plain prefix.")] = None,
    document: Annotated[int, typer.Option(min=0, help="Number of the document.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Documents to print.")] = 1,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer folder of a run. Default: the one beside the index.")] = None,
    runs: RunsOption = RUNS,
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


@app.command("merge")
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
    folder, _ = open_run(path, None, runs)
    return folder.folder("index"), folder
