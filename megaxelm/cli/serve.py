"""The verb `serve`: an OpenAI-compatible server over the mixture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from megaxelm.cli.options import (
    CombineOption,
    DeviceOption,
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
)
from megaxelm.errors import ServeError


def serve(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, or an ensemble folder that was moved.")],
    host: Annotated[str, typer.Option(help="Address to listen on; another than this machine's own wants an API key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one and prints it.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with the key that clients must show. Or set MEGAXELM_API_KEY in the environment.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model. Default: the run's name.")] = None,
    expert: Annotated[str | None, typer.Option(help="One expert alone instead of the mixture; the model is then <run>/<expert>.")] = None,
    router: RouterOption = None,
    top_m: TopMOption = None,
    refresh: RefreshOption = None,
    refresh_tokens: RefreshTokensOption = None,
    posterior_decay: PosteriorDecayOption = None,
    posterior_reads: PosteriorReadsOption = None,
    combine: CombineOption = None,
    draft: DraftOption = None,
    draft_tokens: DraftTokensOption = 4,
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
    max_batch: Annotated[int, typer.Option(help="Texts written at one time; the others wait.")] = 32,
    max_tokens: Annotated[
        int | None, typer.Option(help="Places of the KV cache in all, one a token and kept expert. Default: no bound.")
    ] = None,
    resident: ResidentOption = None,
    max_queue: Annotated[int, typer.Option(help="Texts that may wait; more are refused with 429.")] = 128,
    max_texts: Annotated[int, typer.Option(help="Texts of one request: prompts times n.")] = 32,
    max_text_tokens: Annotated[int | None, typer.Option(help="Prompt and max_tokens of one text. Default: the experts' positions.")] = None,
    max_body_bytes: Annotated[int, typer.Option(help="Size of a request's body.")] = 1 << 20,
    stop_seconds: Annotated[float, typer.Option(help="How long running requests may go on after SIGTERM or SIGINT.")] = 30.0,
) -> None:
    """Serve the mixture: /v1/completions (also streamed), /v1/models, /health, /metrics. Made for OpenAI's clients."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ServeError(f"megaxelm serve needs the extra `serve` ({error.name} is missing): pip install 'megaxelm[serve]'") from None
    from megaxelm.serve.app import Service
    from megaxelm.serve.chat import load_template
    from megaxelm.serve.limits import Limits
    from megaxelm.serve.metrics import Metrics
    from megaxelm.serve.runner import EngineRunner
    from megaxelm.serve.server import bind, read_key, run_server, say_on_stderr

    limits = Limits(
        batch=max_batch, queue=max_queue, texts=max_texts, tokens=max_text_tokens, body_bytes=max_body_bytes, stop_seconds=stop_seconds
    )
    key = read_key(api_key_file)
    with bind(host, port, key is not None) as listening:
        ensemble, engine = open_mixture(
            run,
            dtype,
            device,
            router=router,
            routing=router_settings(refresh, refresh_tokens, posterior_decay, posterior_reads),
            top_m=top_m,
            combine=combine,
            expert=expert,
            draft=draft,
            draft_tokens=draft_tokens,
            max_batch=max_batch,
            max_tokens=max_tokens,
            resident=resident,
        )
        if ensemble.settings.devices > 1:
            say_on_stderr(f"ensemble.devices = {ensemble.settings.devices}: a server holds all experts in one process")
        ensemble.tokenizer.encode(["x"])  # loads what it is made of, before two threads may want to
        template = load_template(ensemble.tokenizer)
        called = name or _name_of(run, expert)
        routed = (
            f"the expert {expert} alone" if expert else f"router {engine.router.name}, {engine.top_m} of {len(ensemble.experts)} experts"
        )
        say_on_stderr(
            f"{called}: {routed}, {dtype} on {ensemble.device}; "
            f"{max_batch} texts at one time, {max_queue} may wait; {'with' if key else 'no'} API key; "
            f"{'chats' if template else 'no chat template'}"
        )
        metrics = Metrics(ensemble.experts)
        service = Service(
            called,
            ensemble.experts,
            ensemble.tokenizer,
            EngineRunner(engine, limits.capacity, metrics),
            metrics,
            limits,
            key,
            engine.stack.config.max_positions,
            template,
        )
        run_server(service, listening, say_on_stderr)


def _name_of(run: Path, expert: str | None) -> str:
    folder = Path(os.path.abspath(run))
    if (folder / "config.json").exists() and folder.name == "ensemble":
        folder = folder.parent
    return f"{folder.name}/{expert}" if expert else folder.name
