"""Fit the settings of routers on one half of the held-out documents, and judge them on the other: `megaxelm router fit RUN`.

What is fitted minimises the macro mean of bits per byte of the mixture on the first half:

- `tfidf`: temperature T, for both powers of the distance, by a search on log T.
- `posterior`: prior and decay; the prior by gradient descent for each decay of a grid. (With all experts and decay 1 this is the maximum
  likelihood of a mixture of documents, which EM would climb more slowly.)
- `fallback_weight`, which all routers share, and `top_m`: for the router that the ensemble takes by default. The m is the smallest whose
  mean is within a tolerance of the best one's.

Nothing is reported of the first half but how it went; intervals are of the second one, paired with today's settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megaxelm.ensemble.folder import Ensemble, load_ensemble
from megaxelm.ensemble.routers.tfidf import TfidfRouter
from megaxelm.errors import RoutingError
from megaxelm.evaluate.fit_data import (
    Half,
    Table,
    asked_at,
    best_of_document,
    distances_of,
    document_bytes,
    evidence_of,
    mixture_nats,
    read_halves,
    table_of,
)
from megaxelm.evaluate.fit_write import significant
from megaxelm.evaluate.statistics import Bootstrap

TOLERANCE = 1e-3
"""Bits per byte that fewer experts may cost."""
DECAYS = (1.0, 0.99, 0.95, 0.9, 0.7, 0.5, 0.0)
_LOG_T = (math.log(1e-4), math.log(1e3))
_WEIGHT = (1e-4, 0.45)
_PRIOR_REACH = 8.0
"""A fitted prior gives no expert less than exp(-8) of the heaviest one's weight: that half of some documents did not want it is no proof
that none ever will."""


@dataclass(frozen=True)
class Fit:
    """A router with what was fitted: `settings` are overrides of `make_router`, `recipe` the same as fields of `ensemble.*`."""

    router: str
    bits: float
    settings: dict[str, Any]
    recipe: dict[str, Any] = field(default_factory=dict)


def fit_run(run_folder: Path, router: str | None = None, tolerance: float = TOLERANCE) -> dict[str, Any]:
    """Fit the routers of an evaluated run.

    Args:
        router: whose fallback weight and top_m are fitted; None: the ensemble's default router.

    Returns:
        `routers`: today's and fitted settings of each with the figures of both halves; `top_m`: the choice; `recipe`: fields of
        `ensemble.*` with their fitted values.

    Raises:
        RoutingError: a router that the ensemble does not have. StageError: the run has not been evaluated, or has too few documents.
    """
    ensemble = load_ensemble(run_folder / "ensemble")
    main = router or ensemble.settings.router
    ensemble.router(main)
    if not tolerance >= 0:
        raise RoutingError(f"--tolerance {tolerance}: choose 0 or more bits per byte")
    half, other = read_halves(run_folder, ensemble)
    fits = [_FITS.get(main, partial(_fit_constant, main))(ensemble, half, None)]
    # The fallback's weight is one for all routers: the others are fitted beside what suits the main one.
    weight = fits[0].settings.get("fallback_weight", ensemble.data.fallback_weight)
    fits += [fit(ensemble, half, weight) for name, fit in _FITS.items() if name != main and _can_fit(ensemble, name)]
    choice = choose_top_m(ensemble, half, fits[0], tolerance)
    recipe: dict[str, Any] = {"top_m": choice["chosen"]}
    for fit in fits:
        recipe |= fit.recipe
    return {
        "split": "fitted on the first, third, ... held-out document of each language; judged by the others",
        "languages": {
            language: {"fit": len(item.ids), "judge": len(other.held_out[language].ids)} for language, item in half.held_out.items()
        },
        "router": main,
        "top_m": choice,
        "routers": {fit.router: _judged(ensemble, half, other, fit, choice["chosen"]) for fit in fits},
        "recipe": recipe,
    }


def choose_top_m(ensemble: Ensemble, half: Half, fit: Fit, tolerance: float) -> dict[str, Any]:
    """Bits per byte on the half for each number of experts, and the smallest number within `tolerance` of the best; None: all."""
    router, table = ensemble.router(fit.router, **fit.settings), table_of(half)
    log_w = torch.cat(
        [router.along(_request(language), ids, rows if router.needs_expert_logprobs else None) for language, ids, rows in half.documents()]
    )
    count = len(ensemble.trained)
    bits = {m: table.bits(router.keep(log_w, m).dense(router.num_experts)) for m in range(1, count + 1)}
    least = min(bits.values())
    chosen = next(m for m, value in bits.items() if value <= least + tolerance)
    return {"router": fit.router, "bits": bits, "tolerance": tolerance, "chosen": None if chosen == count else chosen}


def _can_fit(ensemble: Ensemble, name: str) -> bool:
    return name != "tfidf" or ensemble.data.space is not None


def _fit_tfidf(ensemble: Ensemble, half: Half, given: float | None) -> Fit:
    """T and power; the fallback's weight in turns with T where it is not `given`."""
    table, data = table_of(half), ensemble.data
    plain = cast(TfidfRouter, ensemble.router("tfidf", refresh="token"))
    rows = asked_at(half, data.refresh, data.refresh_tokens)
    distance, known = (each[rows] for each in distances_of(half, plain))

    def bits(power: int, temperature: float, weight: float) -> float:
        settings = {"temperature": temperature, "distance_power": power, "fallback_weight": weight, "refresh": "token"}
        made = cast(TfidfRouter, ensemble.router("tfidf", **settings))
        return table.bits(made.keep(made.of_distances(distance, known), None).dense(made.num_experts))

    found: list[tuple[float, int, float, float]] = []
    for power in (2, 4):
        weight, temperature = given or data.fallback_weight, data.temperature
        free = data.fallback is not None and given is None
        for _ in range(3 if free else 1):
            temperature = math.exp(_least(lambda x, p=power, w=weight: bits(p, math.exp(x), w), _LOG_T))  # type: ignore[misc]
            if free:
                weight = _fit_weight(lambda w, p=power, t=temperature: bits(p, t, w))  # type: ignore[misc]
        found.append((bits(power, temperature, weight), power, temperature, weight))
    # the paper's power unless the other one is better
    value, power, temperature, weight = min(found)
    settings: dict[str, Any] = {"temperature": significant(temperature), "distance_power": power}
    if data.fallback:
        settings["fallback_weight"] = significant(weight)
    return Fit("tfidf", value, settings, settings)


def _fit_posterior(ensemble: Ensemble, half: Half, given: float | None) -> Fit:
    """Prior for each decay of the grid, the fallback's among them where it is not `given`."""
    table, data = table_of(half), ensemble.data
    rows = asked_at(half, data.refresh, data.refresh_tokens)
    best: tuple[float, float, NDArray[np.float64], float] | None = None
    for decay in DECAYS:
        evidence = evidence_of(half, decay)[rows]
        value, prior, weight = fit_prior(table, evidence, (given or data.fallback_weight) if data.fallback else None, given is None)
        if best is None or value < best[0] - 1e-9:
            best = value, decay, prior, weight
    assert best is not None
    value, decay, prior, weight = best
    settings: dict[str, Any] = {"posterior_prior": prior.tolist(), "posterior_decay": decay}
    recipe: dict[str, Any] = {
        "posterior_prior": {name: round(share, 6) for name, share in zip(ensemble.trained, prior.tolist(), strict=True)},
        "posterior_decay": decay,
    }
    if data.fallback:
        settings["fallback_weight"] = recipe["fallback_weight"] = significant(weight)
    return Fit("posterior", value, settings, recipe)


def fit_prior(table: Table, evidence: Tensor, weight: float | None, free_weight: bool) -> tuple[float, NDArray[np.float64], float]:
    """Prior of the trained experts that minimises the mean bits of the posterior mixture.

    With b the log prior, the nats of a token are logsumexp(b + evidence) - logsumexp(b + evidence + logprob), whose gradient in b is the
    posterior before the token minus the one after it. Minimised by L-BFGS within bounds.

    Args:
        evidence: [tokens, experts], as `evidence_of`. weight: prior of the fallback expert, the last column; None: there is none.
        free_weight: fit that too.

    Returns:
        Bits per byte, prior of the trained experts (sum 1), weight of the fallback (0 where there is none).
    """
    from scipy.optimize import minimize

    trained = evidence.shape[1] - (weight is not None)

    start = np.zeros(trained + (weight is not None and free_weight))
    bounds: list[tuple[float, float]] = [(-_PRIOR_REACH / 2, _PRIOR_REACH / 2)] * trained
    if weight is not None and free_weight:
        start[trained] = math.log(weight / (1 - weight))
        bounds.append((math.log(_WEIGHT[0] / (1 - _WEIGHT[0])), math.log(_WEIGHT[1] / (1 - _WEIGHT[1]))))
    found = minimize(lambda x: prior_loss(x, table, evidence, weight, free_weight), start, jac=True, method="L-BFGS-B", bounds=bounds)
    prior, share = _prior_of(found.x, trained, weight, free_weight)
    trained_prior = (prior[:trained] - prior[:trained].logsumexp(0)).exp().numpy()
    return float(found.fun), trained_prior, share


def prior_loss(
    x: NDArray[np.float64], table: Table, evidence: Tensor, weight: float | None, free_weight: bool
) -> tuple[float, NDArray[np.float64]]:
    """Mean bits of the posterior mixture and their gradient in x: log weights of the trained experts, then the logit of the fallback's."""
    trained = evidence.shape[1] - (weight is not None)
    prior, share = _prior_of(x, trained, weight, free_weight)
    before, after = prior + evidence, prior + evidence + table.logprobs
    nats = before.logsumexp(-1) - after.logsumexp(-1)
    slope = (table.share.unsqueeze(-1) * (before.softmax(-1) - after.softmax(-1))).sum(0).numpy()
    of_trained = slope[:trained].sum()
    gradient = np.zeros_like(x)
    gradient[:trained] = slope[:trained] - np.exp(x[:trained] - np.logaddexp.reduce(x[:trained])) * of_trained
    if weight is not None and free_weight:
        gradient[trained] = slope[trained] * (1 - share) - of_trained * share
    return float((table.share * nats).sum()), gradient


def _prior_of(x: NDArray[np.float64], trained: int, weight: float | None, free_weight: bool) -> tuple[Tensor, float]:
    """Log prior [experts] and the fallback's share of it."""
    b = torch.from_numpy(x[:trained]).log_softmax(0)
    if weight is None:
        return b, 0.0
    share = float(torch.sigmoid(torch.tensor(x[trained]))) if free_weight else weight
    return torch.cat([b + math.log1p(-share), torch.tensor([math.log(share)], dtype=torch.float64)]), share


def _fit_constant(name: str, ensemble: Ensemble, half: Half, given: float | None) -> Fit:
    """A router without settings of its own: the weight of the fallback, where it is heard by it."""
    table = table_of(half)

    def bits(settings: dict[str, Any]) -> float:
        router = ensemble.router(name, **settings)
        log_w = torch.cat([router.along(_request(language), ids) for language, ids, _ in half.documents()])
        return table.bits(router.keep(log_w, None).dense(router.num_experts))

    if ensemble.fallback is None or name == "language":
        return Fit(name, bits({}), {})
    settings = {"fallback_weight": significant(_fit_weight(lambda weight: bits({"fallback_weight": weight})))}
    return Fit(name, bits(settings), settings, settings)


_FITS: dict[str, Callable[[Ensemble, Half, float | None], Fit]] = {"tfidf": _fit_tfidf, "posterior": _fit_posterior}


def _judged(ensemble: Ensemble, half: Half, other: Half, fit: Fit, top_m: int | None) -> dict[str, Any]:
    """Today's settings against the fitted ones, both as they are used, on the half that was not fitted on."""
    today = {name: getattr(ensemble.data, name) for name in fit.settings}
    before, after = ensemble.router(fit.router), ensemble.router(fit.router, **fit.settings)
    m = ensemble.settings.top_m
    nats = {
        "today": mixture_nats(other, before, m),
        "fitted": mixture_nats(other, after, m),
        "fitted_top_m": mixture_nats(other, after, top_m),
        "best": best_of_document(other),
    }
    bootstrap = Bootstrap(nats, document_bytes(other))
    first = Bootstrap({"today": mixture_nats(half, before, m)}, document_bytes(half), resamples=1)
    return {
        "today": today | {"top_m": m},
        "fitted": dict(fit.settings),
        "fit_half": {"today": first.mean("today").value, "fitted": fit.bits},
        "other_half": {
            "today": bootstrap.mean("today").to_json(),
            "fitted": bootstrap.mean("fitted").to_json(),
            "difference": bootstrap.mean("fitted", "today").to_json(),
            "with_top_m": {"top_m": top_m, "difference": bootstrap.mean("fitted_top_m", "today").to_json()},
            "regret_today": bootstrap.mean("today", "best").to_json(),
            "regret_fitted": bootstrap.mean("fitted", "best").to_json(),
        },
    }


def _fit_weight(bits: Callable[[float], float]) -> float:
    """Weight of the fallback with the least bits."""
    reach = math.log(_WEIGHT[0] / (1 - _WEIGHT[0])), math.log(_WEIGHT[1] / (1 - _WEIGHT[1]))
    return 1 / (1 + math.exp(-_least(lambda x: bits(1 / (1 + math.exp(-x))), reach)))


def _least(figure: Callable[[float], float], reach: tuple[float, float], steps: int = 24) -> float:
    """Where a figure of one number is least: the best of a grid, refined between its neighbours."""
    from scipy.optimize import minimize_scalar

    grid = np.linspace(reach[0], reach[1], steps)
    values = [figure(float(x)) for x in grid]
    place = int(np.argmin(values))
    low, high = grid[max(place - 1, 0)], grid[min(place + 1, steps - 1)]
    found = minimize_scalar(figure, bounds=(low, high), method="bounded", options={"xatol": 1e-3})
    return float(found.x) if found.fun < values[place] else float(grid[place])


def _request(language: str) -> Any:
    from megaxelm.ensemble.routers import Request

    return Request((), language)
