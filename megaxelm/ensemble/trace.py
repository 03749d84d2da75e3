"""Mixture weights along a text: whom a router believes, piece by piece.

trace = weight_trace(load_ensemble("runs/mine/ensemble"), "Good morning. Доброе утро.", router="posterior")
print_weights(trace)                      # in the terminal, each piece in the colour of its heaviest expert
plot_weights(trace, Path("weights.svg"))  # stacked areas along the text (trace_plot.py); or .png
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megaxelm.ensemble.routers import Request, Router
from megaxelm.ensemble.scoring import expert_streams
from megaxelm.ensemble.streaming import TextStream
from megaxelm.errors import RoutingError

if TYPE_CHECKING:
    from rich.console import Console

    from megaxelm.ensemble.folder import Ensemble

# Okabe and Ito's colours, distinct with every common colour blindness; yellow is left out, being faint on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#5b4b9a", "#8c6d31")
FALLBACK_COLOUR = "#8a8f98"


@dataclass(frozen=True)
class WeightTrace:
    """Weights [tokens, experts] of each expert, sum 1 a row, made of the text before the token; and the text that each token adds."""

    router: str
    experts: list[str]
    fallback: str | None
    pieces: list[str]
    """Empty while the bytes of a character are unfinished; together they are the text."""
    weights: Tensor

    def heaviest(self) -> list[int]:
        """Index of the heaviest expert of each token."""
        return self.weights.argmax(-1).tolist()

    def colour(self, expert: int) -> str:
        """The colour of an expert, `#rrggbb`; after eight they come again."""
        return FALLBACK_COLOUR if self.experts[expert] == self.fallback else COLOURS[expert % len(COLOURS)]

    def show(self, console: Console | None = None) -> None:
        """`print_weights` of this trace."""
        print_weights(self, console)


def weight_trace(
    ensemble: Ensemble,
    text: str | Sequence[int],
    router: Router | str | None = None,
    language: str | None = None,
    top_m: int | None = None,
) -> WeightTrace:
    """Weights along a text that is given, before each of its tokens.

    Args:
        text: or its token ids without a start token.
        router, top_m: None takes the ensemble's own. language: for the `language` router; where none is given it is detected from the text.

    Raises:
        RoutingError: an empty text, or as the router.
    """
    made = ensemble.router(router) if router is None or isinstance(router, str) else router
    ids = ensemble.tokenizer.encode([text])[0] if isinstance(text, str) else list(text)
    if not ids:
        raise RoutingError("weights along a text: the text is empty; give one")
    streams = None
    if made.needs_expert_logprobs:
        streams = expert_streams(ensemble.decoders, [ids], ensemble.tokenizer.start_id)[0]
    # A router that looks at the request alone reads the language off the whole text.
    request = Request(ids if made.constant else (), language)
    kept = made.keep(made.along(request, ids, streams), top_m if top_m is not None else ensemble.settings.top_m)
    weights = kept.dense(made.num_experts).exp()
    return WeightTrace(made.name, list(ensemble.experts), ensemble.fallback, text_pieces(ensemble.tokenizer.decode, ids), weights)


def written_trace(ensemble: Ensemble, router: str, token_ids: Sequence[int], weights: Sequence[Sequence[float]]) -> WeightTrace:
    """The trace of tokens that were generated, from the weights [tokens][experts] that came with them."""
    pieces = text_pieces(ensemble.tokenizer.decode, token_ids)
    return WeightTrace(router, list(ensemble.experts), ensemble.fallback, pieces, torch.tensor(weights, dtype=torch.float64))


def text_pieces(decode: Callable[[list[int]], str], ids: Sequence[int]) -> list[str]:
    """The text that each token adds; a character spelt in bytes comes with the last of them."""
    stream = TextStream(decode)
    pieces = [stream.push([token]) for token in ids]
    if pieces:
        pieces[-1] += stream.flush()
    return pieces


def print_weights(trace: WeightTrace, console: Console | None = None) -> None:
    """Print the text, each piece in the colour of its heaviest expert, bold from a weight of 0.9, faint below 0.5; then who is who."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    line = Text()
    for piece, expert, weight in zip(trace.pieces, trace.heaviest(), trace.weights.amax(-1).tolist(), strict=True):
        emphasis = "bold " if weight >= 0.9 else "dim " if weight < 0.5 else ""
        line.append(piece, style=f"{emphasis}{trace.colour(expert)}")
    console.print(line)
    legend = Text(f"router {trace.router}; mean weights: ", style="none")
    mean = trace.weights.mean(0).tolist()
    for number, expert in enumerate(sorted(range(len(mean)), key=lambda expert: -mean[expert])):
        legend.append(", " if number else "")
        legend.append(f"■ {trace.experts[expert]} {mean[expert]:.2f}", style=trace.colour(expert))
    console.print(legend)
