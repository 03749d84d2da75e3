"""Routers: which expert may speak, and how loud, given the text so far.

A router is asked before every token: `start(batch)` reads the prompts, `weights(state)` gives the log weights for the next token,
`update(state, tokens, expert_logprobs)` tells what the token was. Token t is so predicted with the weights of the text before it.
A router with `needs_expert_logprobs` learns from the experts' own predictions: the caller tells it of the prompt's tokens through
`update` too. All weights are fp64, normalised over the experts; -inf drops an expert.

Routers: `language`, `tfidf`, `posterior`, `uniform`, `fixed` (paper, section 3.3; the posterior is c-BTM's, section 2).
Around each: how often weights are made anew (`refresh.py`), and the fallback expert that is heard when no other is trusted (`fallback.py`).
"""

from megaxelm.ensemble.routers.base import NO_TOKEN, ROUTER_NAMES, BaseRouter, Request, Router, Space
from megaxelm.ensemble.routers.constant import FixedRouter, UniformRouter
from megaxelm.ensemble.routers.fallback import DistanceTrust
from megaxelm.ensemble.routers.language import LanguageRouter, PromptDetector
from megaxelm.ensemble.routers.make import RouterData, make_router
from megaxelm.ensemble.routers.posterior import PosteriorRouter
from megaxelm.ensemble.routers.refresh import REFRESH, RefreshRouter
from megaxelm.ensemble.routers.tfidf import TfidfRouter

__all__ = [
    "NO_TOKEN",
    "REFRESH",
    "ROUTER_NAMES",
    "BaseRouter",
    "DistanceTrust",
    "FixedRouter",
    "LanguageRouter",
    "PosteriorRouter",
    "PromptDetector",
    "RefreshRouter",
    "Request",
    "Router",
    "RouterData",
    "Space",
    "TfidfRouter",
    "UniformRouter",
    "make_router",
]
