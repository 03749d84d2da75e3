"""Sections of the recipe about the mixture: how the experts are mixed, and what it is evaluated on."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from megaxelm.recipe.section import Section

RouterName = Literal["language", "tfidf", "posterior", "uniform", "fixed"]


class EnsembleConfig(Section):
    """The mixture of experts at inference (method: paper, section 3.3)."""

    router: RouterName = "posterior"
    """Default router of the ensemble folder."""
    top_m: int | None = Field(None, ge=1)
    """Experts kept and run; null: all. A fallback expert is not counted."""
    combine: Literal["mixture", "logit_mean"] = "mixture"
    """`mixture`: the weighted sum of the experts' probabilities. `logit_mean`: the weighted mean of their logits (a product of experts), as
    the released downstream code has it."""
    temperature_on: Literal["mixture", "experts"] = "mixture"
    """Whose distribution the temperature of sampling sharpens: the mixture's, or each expert's before they are mixed."""
    devices: int = Field(1, ge=1)
    """Devices that the experts are spread over in `megaxelm generate`, a process each; at most as many as experts."""
    refresh: Literal["token", "chunk", "frozen"] = "token"
    """When weights are made anew: for every token; for every chunk of `refresh_tokens` after the prompt; or for every token until the
    text, prompt counted, has `refresh_tokens`, and then no more."""
    refresh_tokens: int = Field(64, ge=1)
    """Tokens of a chunk, or until weights are frozen."""
    temperature: float = Field(0.1, gt=0)
    """T of the `tfidf` router: w ~ exp(-distance^power / T). Published: 0.1 for perplexity, 1 downstream."""
    distance_power: Literal[2, 4] = 2
    """2 is the paper's formula, 4 what its released code computes."""
    centres: Literal["cluster", "language"] = "cluster"
    """What the `tfidf` router measures the distance to. `cluster`: one centre an expert, as published. `language`: one for each language
    of an expert, and the nearest counts: fewer texts go astray where clusters hold several languages, above all after growing."""
    fixed_weights: dict[str, float] = {}
    """Weights by cluster name of the `fixed` router; normalised; clusters not named get none."""
    posterior_prior: Literal["uniform", "tokens"] | dict[str, float] = "uniform"
    """Weights of the `posterior` router before any text: all the same, the shares of the training tokens, or by cluster name (normalised;
    clusters not named get none)."""
    posterior_decay: float = Field(1.0, ge=0, le=1)
    """How much a token counts for each token that came after it. 1 or `cumulative`: all tokens the same, the exact Bayes mixture; 0 or
    `one-step`: only the last token counts, w ~ prior * p(last token)."""
    posterior_reads: Literal["kept", "all"] = "kept"
    """With `top_m`: after the prompt the kept experts alone run, and one that is dropped stays out; or all run on every token, so that
    any can come back, and `top_m` bounds the mixture alone. Without `top_m` both are the same."""
    detect_language: bool = True
    """The `language` router reads the language off the prompt where none is given; else that is an error."""
    fallback: Literal["seed", "dense"] | None = None
    """A model that takes part as one more expert, and is heard when the router trusts no expert."""
    fallback_weight: float = Field(0.01, gt=0, lt=0.5)
    """Weight of the fallback: with `uniform` and `fixed` always, with `posterior` as its prior, with `tfidf` for a text as near to a
    centre as half of the training sample; `language` gives it all for a language that no expert holds."""
    fallback_quantile: float = Field(0.95, gt=0.5, lt=1)
    """With `tfidf` the fallback has half of the weight for a text as far from every centre as this share of the training sample is at
    most."""

    @field_validator("posterior_decay", mode="before")
    @classmethod
    def _named_decay(cls, value: object) -> object:
        return {"cumulative": 1.0, "one-step": 0.0}.get(value, value) if isinstance(value, str) else value

    @field_validator("posterior_prior")
    @classmethod
    def _a_prior(cls, value: str | dict[str, float]) -> str | dict[str, float]:
        if isinstance(value, dict) and (any(weight < 0 for weight in value.values()) or not any(value.values())):
            raise ValueError("ensemble.posterior_prior: weights must not be negative, and at least one is above 0")
        return value


class EvaluationConfig(Section):
    """Perplexity and bits per byte on held-out text."""

    max_documents: int = Field(200, ge=1)
    """Held-out documents scored a language at most, in order of their hash."""
    sequence_length: int | None = Field(None, ge=8)
    """Tokens scored of a document; the rest is cut. Null: `train.sequence_length`."""
    routers: list[RouterName] = Field(["language", "tfidf", "posterior", "uniform"], min_length=1)
    """Mixtures to evaluate."""
    top_m: list[Annotated[int, Field(ge=1)]] = []
    """Numbers of experts kept with which each mixture is evaluated besides `ensemble.top_m`."""
    texts: dict[str, list[str]] = {}
    """Further sets of texts that every model reads, each under a name of its own: files `<language>.jsonl` (also .gz, .zst; patterns are
    allowed) with `text` in each line, e.g. `udhr: data/udhr/*.jsonl`. Parallel texts compare languages, by the bits of a whole set."""

    @field_validator("texts", mode="before")
    @classmethod
    def _one_pattern_is_a_list(cls, value: object) -> object:
        return {name: [files] if isinstance(files, str) else files for name, files in value.items()} if isinstance(value, dict) else value

    @field_validator("texts")
    @classmethod
    def _names_of_folders(cls, value: dict[str, list[str]]) -> dict[str, list[str]]:
        for name, files in value.items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or not files:
                raise ValueError(f"evaluation.texts: {name!r}: a name has letters, digits, '.', '_' and '-' alone, and at least one file")
        return value
