"""The router `tfidf`: weights by the distance of the text so far to the centres of the experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megaxelm.ensemble.routers.base import NO_TOKEN, BaseRouter, Request, Space
from megaxelm.ensemble.routers.fallback import DistanceTrust, add_fallback
from megaxelm.errors import RoutingError


class TfidfRouter(BaseRouter):
    """w_e ~ exp(-d2_e^(power/2) / T), d2_e = squared distance of the text's vector to the centre of expert e (paper, section 3.3), to the
    nearest where an expert has several.

    Before the first known term the text has no vector and the weights are uniform; with a fallback expert that one has them all. A token
    costs the same however long the text is: the vector is a sum that the terms of the token are added to.

    Args:
        centres: [centres, dimensions].
        distance_power: 2 is the paper's formula, 4 what its released code computes.
        trust: when the fallback expert is heard; None: there is none.
        experts: number of the expert that each centre belongs to; None: a centre each, in order.

    Raises:
        RoutingError: a value out of range, or an expert without a centre.
    """

    name = "tfidf"

    def __init__(
        self,
        space: Space,
        centres: Tensor,
        temperature: float,
        distance_power: int = 2,
        trust: DistanceTrust | None = None,
        experts: Sequence[int] | None = None,
    ) -> None:
        if not temperature > 0:
            raise RoutingError(f"ensemble.temperature = {temperature}: must be above 0")
        if distance_power not in (2, 4):
            raise RoutingError(f"ensemble.distance_power = {distance_power}: choose 2 (the paper) or 4 (its code)")
        owners = list(range(len(centres))) if experts is None else list(experts)
        trained = len(set(owners))
        if len(owners) != len(centres) or sorted(set(owners)) != list(range(trained)):
            raise RoutingError(
                f"router tfidf: {len(centres)} centres of the experts {owners}: every expert needs one, and each is an expert's"
            )
        self.space, self.centres = space, centres.to(torch.float64)
        self._owners = None if owners == list(range(trained)) else torch.tensor(owners)
        self._trained = trained
        self.temperature, self.distance_power, self.trust = temperature, distance_power, trust
        self.fallback = None if trust is None else trained
        self.num_experts = trained + (trust is not None)

    def log_weights(self, squared_distance: Tensor) -> Tensor:
        """Log weights [..., experts] of squared distances [..., experts] of the trained experts alone."""
        energy = squared_distance.to(torch.float64) ** (self.distance_power // 2)
        # The smallest is taken off first, so that T -> 0 gives top-1 and not -inf everywhere.
        return (-(energy - energy.amin(-1, keepdim=True)) / self.temperature).log_softmax(-1)

    def of_vectors(self, vectors: Tensor) -> Tensor:
        """Log weights [..., experts] of text vectors [..., dimensions]; a zero vector is a text that nothing is known of."""
        return self.of_distances(*self.distances(vectors))

    def distances(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Squared distances [..., trained experts] of text vectors [..., dimensions], and whether anything is known of the text [...]."""
        vectors = vectors.to(torch.float64)
        distance = (vectors.unsqueeze(-2) - self.centres).square().sum(-1)
        if self._owners is not None:
            nearest = distance.new_full((*distance.shape[:-1], self._trained), torch.inf)
            distance = nearest.scatter_reduce(-1, self._owners.expand_as(distance), distance, "amin")
        return distance, vectors.abs().amax(-1) > 0

    def of_distances(self, distance: Tensor, known: Tensor) -> Tensor:
        """Log weights [..., experts] of what `distances` gives."""
        log_w = torch.where(known.unsqueeze(-1), self.log_weights(distance), -math.log(self._trained))
        if self.trust is None:
            return log_w
        log_fallback, log_rest = self.trust.log_weights(distance.amin(-1))
        nothing = self.trust.log_weights_of_nothing()
        return add_fallback(log_w, torch.where(known, log_fallback, nothing[0]), torch.where(known, log_rest, nothing[1]))

    def start(self, batch: Sequence[Request]) -> list[Any]:
        states = [self.space.start() for _ in batch]
        for state, request in zip(states, batch, strict=True):
            if len(request.prompt_ids):
                self.space.push(state, list(request.prompt_ids))
        return states

    def weights(self, state: list[Any]) -> Tensor:
        if not state:
            return torch.empty(0, self.num_experts, dtype=torch.float64)
        return self.of_vectors(torch.from_numpy(np.stack([self.space.vector(row) for row in state])))

    def update(self, state: list[Any], tokens: Tensor, expert_logprobs: Tensor | None = None) -> None:
        for row, token in zip(state, tokens.tolist(), strict=True):
            if token != NO_TOKEN:
                self.space.push(row, [token])

    def along(self, request: Request, tokens: Sequence[int], expert_logprobs: Tensor | None = None) -> Tensor:
        if not len(tokens):
            return torch.empty(0, self.num_experts, dtype=torch.float64)
        return self.of_vectors(torch.from_numpy(self.space.prefixes(self.start([request])[0], tokens)))
