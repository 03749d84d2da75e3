"""The verb `generate`: write on from prompts, or from a file of them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megaxelm.cli.options import (
    CombineOption,
    DeviceOption,
    DevicesOption,
    DraftOption,
    DraftTokensOption,
    DtypeOption,
    PosteriorDecayOption,
    PosteriorReadsOption,
    RefreshOption,
    RefreshTokensOption,
    ResidentOption,
    RouterOption,
    TopMOption,
    open_mixture,
    router_settings,
    spread_over_devices,
)
from megaxelm.errors import RoutingError

if TYPE_CHECKING:
    from megaxelm.ensemble.batch import Item
    from megaxelm.ensemble.engine import Engine
    from megaxelm.ensemble.generation import GenerationResult
    from megaxelm.ensemble.sampling import SamplingParams, TokenEvent

_STANDARD = Path("-")
_SHOW_SECONDS = 0.2


def generate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, or an ensemble folder that was moved.")],
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue. Repeatable.")] = None,
    language: Annotated[str | None, typer.Option(help="Language of the prompts, for the language router. Default: detected.")] = None,
    expert: Annotated[str | None, typer.Option(help="One expert alone instead of the mixture.")] = None,
    router: RouterOption = None,
    top_m: TopMOption = None,
    refresh: RefreshOption = None,
    refresh_tokens: RefreshTokensOption = None,
    posterior_decay: PosteriorDecayOption = None,
    posterior_reads: PosteriorReadsOption = None,
    combine: CombineOption = None,
    draft: DraftOption = None,
    draft_tokens: DraftTokensOption = 4,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from so many of the likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the smallest set of tokens that holds this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Sample tokens at least this times as likely as the likeliest.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End a text before this string. Repeatable.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text as it comes.")] = False,
    weights: Annotated[
        bool, typer.Option("--weights", help="Show the mixture weights of every token: colours in a terminal, else one line a token.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a prompt.")] = False,
    batch: Annotated[Path | None, typer.Option(help='JSONL of {"prompt", "language", sampling fields}; - is the standard input.')] = None,
    output: Annotated[Path, typer.Option(help="JSONL to write with --batch; - is the standard output.")] = _STANDARD,
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Texts written at one time; the others wait.")] = 32,
    devices: DevicesOption = None,
    resident: ResidentOption = None,
) -> None:
    """Write on from prompts with the mixture of experts."""
    from megaxelm.ensemble.sampling import SamplingParams

    if not spread_over_devices(run, devices, batch == _STANDARD):
        output = _STANDARD
    _check(prompt, stop, stream, as_json, batch, output)
    sampling = SamplingParams(max_new_tokens, temperature, top_k, top_p, min_p, seed, tuple(stop or ()))
    items = _read(prompt, batch, language, sampling)
    routing = router_settings(refresh, refresh_tokens, posterior_decay, posterior_reads)
    settings = {"top_m": top_m, "combine": combine, "expert": expert, "draft": draft, "draft_tokens": draft_tokens, "resident": resident}
    ensemble, engine = open_mixture(run, dtype, device, router=router, routing=routing, max_batch=max_batch, **settings)
    if batch is not None:
        _write_batch(engine, items, ensemble.experts, None if output == _STANDARD else output, weights)
    else:
        _write_prompts(engine, items, ensemble.experts, stream, weights, as_json)
    if draft is not None:
        print(f"  [{engine.drafted.line()}]", file=sys.stderr)
    if engine.stack.swaps.swaps:
        print(f"  [{engine.stack.swaps.line()}]", file=sys.stderr)


def _check(prompt: Sequence[str] | None, stop: Sequence[str] | None, stream: bool, as_json: bool, batch: Path | None, output: Path) -> None:
    if (prompt is None) == (batch is None):
        raise RoutingError("give either --prompt or --batch" if prompt is None else "--prompt and --batch: leave one of the two out")
    for condition, text in (
        (stream and as_json, "--stream and --json: a JSON object is whole or nothing; leave one of the two out"),
        (stream and batch is not None, "--stream: a batch is written line by line as it is; leave it out"),
        (as_json and batch is not None, "--json: a batch is written as JSON in any case; leave it out"),
        (batch is None and output != _STANDARD, f"--output {output}: only with --batch; redirect the standard output instead"),
        (not output.absolute().parent.is_dir(), f"--output {output}: there is no folder {output.parent}; make it first"),
    ):
        if condition:
            raise RoutingError(text)
    for name, texts in (("--prompt", prompt), ("--stop", stop)):
        for text in texts or ():
            try:
                text.encode()
            except UnicodeEncodeError:
                raise RoutingError(f"{name}: not UTF-8 text; check the encoding of the terminal or file it came from") from None


def _read(prompts: Sequence[str] | None, batch: Path | None, language: str | None, sampling: SamplingParams) -> list[Item]:
    from megaxelm.ensemble.batch import Item, numbered, read_batch
    from megaxelm.ensemble.sampling import GenerationRequest

    if batch is None:
        return numbered([Item(GenerationRequest(text, language, sampling), "", {"prompt": text}) for text in prompts or ()])
    try:
        with nullcontext(sys.stdin.buffer) if batch == _STANDARD else open(batch, "rb") as file:
            return numbered(read_batch(file, "standard input" if batch == _STANDARD else str(batch), language, sampling))
    except FileNotFoundError:
        raise RoutingError(f"--batch {batch}: no such file") from None


def _write_batch(engine: Engine, items: Sequence[Item], experts: Sequence[str], output: Path | None, weights: bool) -> None:
    import orjson
    from tqdm import tqdm

    from megaxelm.ensemble.batch import add_all, record, whole_file, write_all

    number_of = add_all(engine, items)
    with whole_file(output) as file, tqdm(total=len(items), desc="generate", unit="text", file=sys.stderr) as bar:
        tokens, shown = 0, 0.0

        def count(number: int, event: TokenEvent) -> None:
            nonlocal tokens, shown
            tokens += 1
            if time.monotonic() > shown + _SHOW_SECONDS:
                shown = time.monotonic()
                bar.set_postfix_str(f"{tokens} tokens")

        for number, result in write_all(engine, number_of, experts, count):
            file.write(orjson.dumps(record(items[number], result, weights)) + b"\n")
            if output is None:
                file.flush()
            bar.update()
        bar.set_postfix_str(f"{tokens} tokens")


def _write_prompts(engine: Engine, items: Sequence[Item], experts: Sequence[str], stream: bool, weights: bool, as_json: bool) -> None:
    from megaxelm.ensemble.batch import add_all, record, write_all

    number_of = add_all(engine, items)
    held: dict[int, str] = {}  # text of prompts whose turn has not come
    turn = 0

    def show(number: int, event: TokenEvent) -> None:
        if number == turn:
            print(event.text, end="", flush=True)
        else:
            held[number] = held.get(number, "") + event.text

    def begin(number: int) -> None:
        if stream and number < len(items):
            print(f"{items[number].request.prompt}{held.pop(number, '')}", end="", flush=True)

    begin(0)
    for number, result in write_all(engine, number_of, experts, show if stream else None):
        if as_json:
            print(json.dumps(record(items[number], result, weights), ensure_ascii=False), flush=True)
            continue
        print("" if stream else f"{items[number].request.prompt}{result.text}")
        if weights:
            _show_weights(engine, result)
        found = f"; language {result.detected_language} (detected)" if result.detected_language else ""
        mean = ", ".join(f"{name} {weight:.2f}" for name, weight in result.mean_weights().items() if weight >= 0.005)
        print(f"  [{len(result.token_ids)} tokens{found}; mean weights: {mean}]", file=sys.stderr, flush=True)
        turn = number + 1
        begin(turn)


def _show_weights(engine: Engine, result: GenerationResult) -> None:
    """In a terminal the text in the colours of the experts; in a file one line a token, with the weight of each expert that ran."""
    from megaxelm.ensemble.trace import print_weights, written_trace

    trace = written_trace(engine.ensemble, engine.router.name, result.token_ids, result.weights)
    if sys.stdout.isatty():
        print_weights(trace)
        return
    for piece, weights in zip(trace.pieces, result.weights, strict=True):
        heard = "  ".join(f"{name} {weight:.2f}" for name, weight in zip(result.experts, weights, strict=True) if weight >= 0.005)
        print(f"  {piece!r:16} {heard}")
