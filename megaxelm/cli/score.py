"""The verb `score`: how well a mixture predicts given texts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from megaxelm.errors import RoutingError


def score(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, or an ensemble folder that was moved.")],
    text: Annotated[list[str] | None, typer.Option(help="Text to score. Repeatable.")] = None,
    file: Annotated[
        list[Path] | None,
        typer.Option(help='File to score. .jsonl: {"text": ..., "language": ...} a line; else one text. .gz, .zst too. Repeatable.'),
    ] = None,
    language: Annotated[str | None, typer.Option(help="Language of all texts, for the language router. Default: what a file says.")] = None,
    expert: Annotated[str | None, typer.Option(help="One expert alone instead of the mixture.")] = None,
    router: Annotated[str | None, typer.Option(help="language, tfidf, posterior, uniform or fixed. Default: the ensemble's.")] = None,
    top_m: Annotated[int | None, typer.Option(help="Experts kept at each token. Default: the ensemble's.")] = None,
    combine: Annotated[str | None, typer.Option(help="mixture or logit_mean. Default: the ensemble's.")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens read in one go. Default: the experts' positions.")] = None,
    min_context: Annotated[
        int | None, typer.Option(help="Tokens that each token of a long text has before it in its window. Default: half of it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object: `total`, `texts`, `settings`.")] = False,
) -> None:
    """Log-likelihood, perplexity and bits per byte of texts under the mixture; texts of any length are read in windows."""
    from megaxelm.ensemble.folder import load_ensemble
    from megaxelm.ensemble.text_scores import Text, default_device, read_texts, score_texts, scoring_settings, total_score
    from megaxelm.ensemble.windows import Windows

    texts = [Text(given, language, f"--text {number}") for number, given in enumerate(text or [], start=1)]
    for given in texts:
        try:
            given.text.encode()
        except UnicodeEncodeError:
            raise RoutingError("--text: not UTF-8 text; check the encoding of the terminal or file it came from") from None
    for path in file or []:
        texts += read_texts(path, language)
    if not any(given.text for given in texts):
        raise RoutingError("nothing to score: give --text or --file with some text")
    device = default_device()
    ensemble = load_ensemble(run if (run / "config.json").exists() else run / "ensemble", device=device)
    windows = Windows(window, min_context)
    settings = scoring_settings(ensemble, router, top_m, expert, combine, windows) | {"dtype": "float32", "device": str(device)}
    who = f"expert {expert}" if expert else f"router {settings['router']}, {settings['top_m']} of {len(ensemble.experts)} experts"
    print(
        f"score: {who}, {settings['combine']}, float32 on {device}; windows of {settings['window']}, context at least "
        f"{settings['min_context']}",
        file=sys.stderr,
    )
    scores = score_texts(ensemble, texts, router, top_m, expert, combine, windows, progress=True)
    total = total_score(scores)
    if as_json:
        shown = {"total": total.to_json(), "texts": [each.to_json() for each in scores], "settings": settings}
        print(json.dumps(shown, ensure_ascii=False))
        return
    print(f"{'tokens':>9} {'bytes':>10} {'nats':>13} {'perplexity':>12} {'bits/byte':>10}  text")
    for each in [*scores, total] if len(scores) > 1 else scores:
        perplexity = "-" if each.perplexity is None else f"{each.perplexity:.4g}"
        bits = "-" if each.bits_per_byte is None else f"{each.bits_per_byte:.4f}"
        print(f"{each.tokens:>9} {each.bytes:>10} {-each.log_likelihood:>13.3f} {perplexity:>12} {bits:>10}  {each.name}")
    weights = ", ".join(f"{name} {weight:.2f}" for name, weight in total.weights.items() if weight >= 0.005)
    print(f"  [mean weights: {weights}]", file=sys.stderr)
