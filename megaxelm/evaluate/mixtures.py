"""Mixtures of what the experts said: token log-probabilities of every router on the held-out text, and the weights that it gave.

No model is run here: a mixture is arithmetic on the experts' token log-probabilities.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from megaxelm.ensemble.folder import Ensemble
from megaxelm.ensemble.routers import Request, Router
from megaxelm.ensemble.scoring import mix_streams
from megaxelm.evaluate.perplexity import HeldOut
from megaxelm.evaluate.subjects import Mixture, model_key

Streams = Mapping[str, Sequence[Tensor]]
"""Language -> documents of [tokens]."""
Heard = Callable[[Mixture, str, int, Tensor, Tensor, Tensor], None]
"""Called with mixture, language, number of the document, weights [tokens, experts], log-probabilities [experts, tokens] and [tokens]."""


def expert_rows(ensemble: Ensemble, streams: Mapping[str, Streams], language: str, number: int) -> Tensor:
    """Token log-probabilities [experts, tokens] of one document, in the order of the ensemble's weights."""
    return torch.stack([streams[model_key(name)][language][number] for name in ensemble.experts])


def mix_held_out(
    ensemble: Ensemble,
    mixtures: Sequence[Mixture],
    held_out: Mapping[str, HeldOut],
    streams: Mapping[str, Streams],
    heard: Heard | None = None,
) -> dict[str, dict[str, list[Tensor]]]:
    """Token log-probabilities of every mixture: key -> language -> documents of [tokens] fp64.

    A router reads a document once, however many numbers of experts are asked of it.

    Args:
        heard: told of the weights of each document, which are not kept.
    """
    routers: dict[str, list[Mixture]] = {}
    for mixture in mixtures:
        routers.setdefault(mixture.router, []).append(mixture)
    found: dict[str, dict[str, list[Tensor]]] = {mixture.key: {language: [] for language in held_out} for mixture in mixtures}
    total = sum(len(item.ids) for item in held_out.values())
    for name, asked in routers.items():
        made = ensemble.router(name)
        with tqdm(total=total, desc=f"mixture {name}", unit="doc", file=sys.stderr, mininterval=0.5) as bar:
            for language, item in held_out.items():
                for number, ids in enumerate(item.ids):
                    stream = expert_rows(ensemble, streams, language, number)
                    log_w = weights_before(made, language, ids, stream)
                    for mixture in asked:
                        kept = made.keep(log_w, mixture.top_m).dense(made.num_experts)
                        mixed = mix_streams(stream, kept)
                        found[mixture.key][language].append(mixed)
                        if heard:
                            heard(mixture, language, number, kept.exp(), stream, mixed)
                    bar.update()
    return found


def weights_before(router: Router, language: str, ids: Sequence[int], stream: Tensor) -> Tensor:
    """Log weights [tokens, experts] before each token of a document whose language is told, all experts kept."""
    return router.along(Request((), language), ids, stream if router.needs_expert_logprobs else None)
