"""What the routers of one ensemble are made from, and the making of one by its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import Tensor

from megaxelm.ensemble.routers.base import ROUTER_NAMES, Router
from megaxelm.ensemble.routers.constant import FixedRouter, UniformRouter
from megaxelm.ensemble.routers.fallback import DistanceTrust
from megaxelm.ensemble.routers.language import LanguageRouter, PromptDetector
from megaxelm.ensemble.routers.posterior import PosteriorRouter
from megaxelm.ensemble.routers.refresh import REFRESH, RefreshRouter
from megaxelm.ensemble.routers.tfidf import TfidfRouter
from megaxelm.ensemble.streaming import TextSpace
from megaxelm.errors import RoutingError


@dataclass
class RouterData:
    """What the routers of one ensemble are made from. `experts` gives the order of every weight vector."""

    experts: list[str]
    language_expert: dict[str, str] = field(default_factory=dict)
    detect_language: bool = True
    fixed_weights: dict[str, float] = field(default_factory=dict)
    temperature: float = 0.1
    distance_power: int = 2
    posterior_prior: list[float] | None = None  # [trained experts]; None: uniform
    posterior_decay: float = 1.0
    posterior_reads: str = "kept"
    refresh: str = "token"
    refresh_tokens: int = 64
    fallback: str | None = None  # name of the fallback expert, the last of `experts`
    fallback_weight: float = 0.01
    fallback_distance: list[float] | None = None  # squared distance to the nearest centre over trained text: median, quantile
    space: Any = None
    centres: Tensor | None = None  # [centres, dimensions]
    centre_experts: list[int] | None = None  # [centres]: number of the expert; None: a centre each, in order
    decode: Callable[[list[int]], str] | None = None  # token ids to text, for a space that reads text and to detect languages

    @property
    def trained(self) -> list[str]:
        """The experts without the fallback."""
        return self.experts if self.fallback is None else self.experts[:-1]


def make_router(name: str, data: RouterData, **overrides: Any) -> Router:
    """The router `name` of an ensemble; `overrides` replace fields of `data` (temperature, fixed_weights, posterior_decay, ...).

    Raises:
        RoutingError: unknown name or override, a value out of range, or the ensemble lacks what the router needs.
    """
    unknown = sorted(set(overrides) - {item.name for item in fields(data)})
    if unknown:
        raise RoutingError(f"router {name}: no setting {', '.join(unknown)}; there are {', '.join(item.name for item in fields(data))}")
    data = replace(data, **overrides) if overrides else data
    if name not in _MAKERS:
        raise RoutingError(f"ensemble.router = {name!r}: choose one of {', '.join(ROUTER_NAMES)}")
    if data.refresh not in REFRESH:
        raise RoutingError(f"ensemble.refresh = {data.refresh!r}: choose one of {', '.join(REFRESH)}")
    router = _MAKERS[name](data)
    # Weights that never change are the same however often they are made.
    return router if data.refresh == "token" or router.constant else RefreshRouter(router, data.refresh, data.refresh_tokens)


def _fallback_weight(data: RouterData) -> float | None:
    return None if data.fallback is None else data.fallback_weight


def _uniform(data: RouterData) -> Router:
    return UniformRouter(len(data.trained), _fallback_weight(data))


def _fixed(data: RouterData) -> Router:
    if not data.fixed_weights:
        raise RoutingError(f"router fixed: no weights; set ensemble.fixed_weights for some of {', '.join(data.trained)}")
    return FixedRouter(data.trained, data.fixed_weights, _fallback_weight(data))


def _language(data: RouterData) -> Router:
    detect = None
    if data.detect_language and data.decode is not None:
        detect = PromptDetector(data.decode, sorted(data.language_expert), among_all=data.fallback is not None)
    return LanguageRouter(data.trained, data.language_expert, detect, data.fallback is not None)


def _posterior(data: RouterData) -> Router:
    return PosteriorRouter(len(data.trained), data.posterior_prior, data.posterior_decay, _fallback_weight(data), data.posterior_reads)


def _tfidf(data: RouterData) -> Router:
    if data.space is None or data.centres is None:
        raise RoutingError("router tfidf: this ensemble was saved without a vector space; build it again, or take another router")
    trust = None
    if data.fallback is not None:
        if data.fallback_distance is None:
            raise RoutingError("router tfidf: this ensemble was saved without the distances that its fallback is heard by; build it again")
        median, quantile = data.fallback_distance
        trust = DistanceTrust(median, quantile, data.fallback_weight)
    space = data.space
    if space.reads_text:
        if data.decode is None:
            raise RoutingError(
                f"router tfidf: the vector space reads text (clusters.tfidf.analyzer = {space.analyzer.name}); give the router a tokenizer"
            )
        space = TextSpace(space, data.decode)
    return TfidfRouter(space, data.centres, data.temperature, data.distance_power, trust, data.centre_experts)


_MAKERS: dict[str, Callable[[RouterData], Router]] = {
    "language": _language,
    "tfidf": _tfidf,
    "posterior": _posterior,
    "uniform": _uniform,
    "fixed": _fixed,
}
