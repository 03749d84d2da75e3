"""Who speaks: what a caller left open is taken from the ensemble's settings, and what he gave is checked."""

from __future__ import annotations

from megaxelm.ensemble.folder import Ensemble
from megaxelm.ensemble.routers import FixedRouter, Router
from megaxelm.errors import RoutingError
from megaxelm_kernels.mixture import COMBINE


def choose_router(ensemble: Ensemble, router: Router | str | None, top_m: int | None, expert: str | None) -> tuple[Router, int]:
    """The router and the number of experts it may keep; `expert` is one alone instead of a router.

    Raises:
        RoutingError: an unknown router or expert, both given, or `top_m` out of range.
    """
    num_experts = len(ensemble.trained)
    if expert is not None:
        if router is not None:
            raise RoutingError(f"expert = {expert!r} and a router were both given: leave one out")
        if expert not in ensemble.experts:
            raise RoutingError(f"expert = {expert!r}: this ensemble has {', '.join(ensemble.experts)}")
        return FixedRouter(ensemble.experts, {expert: 1.0}), 1
    if router is None or isinstance(router, str):
        router = ensemble.router(router)
    top_m = top_m if top_m is not None else ensemble.settings.top_m if ensemble.settings.top_m is not None else num_experts
    if not 1 <= top_m <= num_experts:
        raise RoutingError(f"ensemble.top_m = {top_m}: choose 1 to {num_experts}, the number of experts in this ensemble")
    return router, top_m


def choose_combine(ensemble: Ensemble, combine: str | None) -> str:
    """How the experts' predictions are combined.

    Raises:
        RoutingError: not one of `COMBINE`.
    """
    combine = combine or ensemble.settings.combine
    if combine not in COMBINE:
        raise RoutingError(f"combine = {combine!r}: choose one of {', '.join(COMBINE)}")
    return combine
