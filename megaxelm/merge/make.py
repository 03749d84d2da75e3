"""What `megaxelm merge RUN --into ...` does: make one rung of the ladder, or find it fresh."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaxelm.ensemble.choice import choose_router
from megaxelm.errors import MergeError
from megaxelm.merge.average import average_source
from megaxelm.merge.material import Material, open_material
from megaxelm.merge.moe import moe_config, moe_source
from megaxelm.merge.ridge import RIDGE, LayerFit, fit_routers
from megaxelm.merge.rungs import is_fresh, read_rung, remove_leftovers, rung_folder, rung_names, write_rung
from megaxelm.merge.sample import refuse_without_text, sample_texts
from megaxelm.merge.training import Job, train_rung, training_recipe, training_settings
from megaxelm.merge.weights import SAMPLE_TOKENS, average_weights
from megaxelm.model.source import WeightSource
from megaxelm.recipe import Recipe
from megaxelm.run import RunFolder

KINDS = ("average", "moe", "distilled")


@dataclass(frozen=True)
class MergeOptions:
    """What is asked for. See `megaxelm merge --help`; each field belongs to some kinds alone, which the command checks."""

    into: str
    name: str | None = None
    weights: str = "uniform"
    router: str | None = None
    top_m: int | None = None
    sample_tokens: int = SAMPLE_TOKENS
    top_k: int = 2
    ridge: float = RIDGE
    router_scale: float | None = None
    router_steps: int | None = None
    train: str = "routers"
    steps: int = 100
    start: str = "average"
    label_weight: float = 0.0


class Merging:
    """Makes the rungs of one run.

    Args:
        recipe: of the run. training: of what is trained here: the same, where nothing was overridden.
    """

    def __init__(
        self,
        run: RunFolder,
        recipe: Recipe,
        training: Recipe | None = None,
        say: Callable[[str], None] = lambda text: print(text, flush=True),
    ) -> None:
        self.run, self.recipe, self.training, self.say = run, recipe, training or recipe, say
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.material: Material = open_material(run, self.device)

    def make(self, options: MergeOptions) -> Path:
        """The folder of the rung, made where it was missing or stale.

        Raises:
            MergeError: options that this run cannot have. TrainError, Preempted: of a training.
        """
        if options.into not in KINDS:
            raise MergeError(f"--into {options.into}: choose one of {', '.join(KINDS)}")
        with self.run.lock("merged"):
            return {"average": self._average, "moe": self._moe, "distilled": self._distilled}[options.into](options)

    def _average(self, options: MergeOptions) -> Path:
        name = options.name or _average_name(options.weights)
        made_from = self._made_from("average", self._weights_settings(options))
        if (found := self._fresh(name, made_from)) is not None:
            return found
        weights = self._weights(options)
        source = average_source(self.material.sources, list(weights.values()), self.material.config)
        return self._write(name, "average", made_from, {"weights": weights}, source)

    def _moe(self, options: MergeOptions) -> Path:
        if options.router_steps is None:
            return self._ridge(options, options.name or "moe")
        if options.train not in ("routers", "all"):
            raise MergeError(f"--train {options.train}: choose routers or all")
        name = options.name or "moe-trained"
        job = Job("routers" if options.train == "routers" else "all", options.router_steps)
        start = self._ridge(options, "moe" if name != "moe" else "moe-ridge")
        return self._train(name, "moe trained", job, start)

    def _ridge(self, options: MergeOptions, name: str) -> Path:
        material = self.material
        config = moe_config(material.config, len(material.names), options.top_k)
        settings = self._weights_settings(options) | {
            "top_k": options.top_k,
            "ridge": options.ridge,
            "router_scale": options.router_scale,
            "sample": self._sample_settings(options),
        }
        made_from = self._made_from("moe", settings)
        if (found := self._fresh(name, made_from)) is not None:
            return found
        weights = self._weights(options)
        texts = sample_texts(material, options.sample_tokens, self._length)
        refuse_without_text(material, texts)
        routers: dict[int, Tensor] = {}
        source = moe_source(material.sources, list(weights.values()), routers, config)
        start_id = material.ensemble.tokenizer.start_id
        fits = fit_routers(
            source,
            routers,
            [[start_id, *text.ids] for text in texts],
            [text.expert for text in texts],
            ridge=options.ridge,
            scale=options.router_scale,
            device=self.device,
        )
        self.say(_fits_text(fits, len(material.names)))
        facts = {"weights": weights, "sample_tokens": sum(len(text.ids) for text in texts), "layers": [asdict(fit) for fit in fits]}
        return self._write(name, "moe", made_from, facts, source)

    def _distilled(self, options: MergeOptions) -> Path:
        name = options.name or "distilled"
        router, top_m = choose_router(self.material.ensemble, options.router, options.top_m, None)
        if self.material.ensemble.settings.combine != "mixture":
            self.say("the teacher is the mixture of probabilities, although the ensemble's own way is to average logits")
        if not 0 <= options.label_weight <= 1:
            raise MergeError(f"--label-weight {options.label_weight:g}: choose 0 (the mixture alone) to 1 (the labels alone)")
        given = options.router or self.material.ensemble.settings.router
        job = Job("distilled", options.steps, given, top_m if top_m < len(self.material.names) else None, options.label_weight)
        return self._train(name, "distilled", job, self._start(options.start))

    def _start(self, start: str) -> Path:
        """The checkpoint that a student starts from: the average of the experts, the seed or dense model, or a dense rung."""
        if start == "average":
            return self._average(MergeOptions("average"))
        if start in ("seed", "dense"):
            folder = self.run.expert(start) / "export"
            if not (folder / "config.json").is_file():
                raise MergeError(f"--start {start}: not trained in {self.run.path}: megaxelm train {self.run.path} --expert {start}")
            return folder
        record = read_rung(self.run, start)
        if record is None or record["kind"].startswith("moe"):
            dense = [name for name in rung_names(self.run) if not (read_rung(self.run, name) or {}).get("kind", "").startswith("moe")]
            raise MergeError(
                f"--start {start}: choose average, seed, dense, or a rung that is a dense model: {', '.join(dense) or 'none yet'}"
            )
        return rung_folder(self.run, start)

    def _train(self, name: str, kind: str, job: Job, start: Path) -> Path:
        recipe = training_recipe(self.training, job)
        from megaxelm.model.hub import weights_hash

        settings = training_settings(recipe, job, name) | {
            "start": weights_hash(start),
            "index": self.material.marker("index"),
            "tokenizer": self.material.marker("tokenizer"),
            "routers": self.material.routers_hash if job.what == "distilled" else None,
        }
        made_from = self._made_from(kind, settings)
        if (found := self._fresh(name, made_from)) is not None:
            return found
        folder = train_rung(self.run, recipe, name, kind, job, start, made_from, {"start": start.relative_to(self.run.path).as_posix()})
        self.say(f"{folder}: trained for {job.steps} steps")
        return folder

    @property
    def _length(self) -> int:
        """Tokens that a document of the sample is cut at."""
        return self.recipe.train.sequence_length

    def _weights_settings(self, options: MergeOptions) -> dict[str, Any]:
        settings: dict[str, Any] = {"weights": options.weights}
        if options.weights.split(":")[0] in ("router", "posterior"):
            settings |= {"router": options.router or self.material.ensemble.settings.router, "routers": self.material.routers_hash}
            settings["weights_sample"] = self._sample_settings(options)
        return settings

    def _sample_settings(self, options: MergeOptions) -> dict[str, Any]:
        return {
            "tokens": options.sample_tokens,
            "length": self._length,
            "corpus": self.material.marker("corpus"),
            "clusters": self.material.marker("clusters"),
        }

    def _weights(self, options: MergeOptions) -> dict[str, float]:
        weights = average_weights(self.material, options.weights, options.router, self._length, options.sample_tokens)
        self.say("weights: " + ", ".join(f"{name} {weight:.3f}" for name, weight in weights.items()))
        return weights

    def _made_from(self, kind: str, settings: dict[str, Any]) -> dict[str, Any]:
        return {"kind": kind, "dtype": self.recipe.export.dtype, "experts": self.material.hashes, "settings": settings}

    def _fresh(self, name: str, made_from: dict[str, Any]) -> Path | None:
        folder = rung_folder(self.run, name)
        remove_leftovers(self.run, name)
        if not is_fresh(self.run, name, made_from):
            return None
        self.say(f"{folder}: fresh; nothing to do")
        return folder

    def _write(self, name: str, kind: str, made_from: dict[str, Any], facts: dict[str, Any], source: WeightSource) -> Path:
        from megaxelm.train.export import sample_texts as logit_texts

        texts = logit_texts(self.run, self.material.ensemble.tokenizer, source.config.max_positions)
        folder = write_rung(self.run, name, kind, made_from, facts, source, self.recipe.export.dtype, texts)
        self.say(f"{folder}: written; reloaded, and its logits agree")
        return folder


def _average_name(weights: str) -> str:
    return "average-weights" if "=" in weights else f"average-{weights.replace(':', '-')}"


def _fits_text(fits: list[LayerFit], num_experts: int) -> str:
    first, last = fits[0], fits[-1]
    return (
        f"routers by ridge regression: own expert first for {first.accuracy:.0%} of the sample's tokens in the first layer, "
        f"{last.accuracy:.0%} in the last (by chance {1 / num_experts:.0%}); scales {min(fit.scale for fit in fits):.3g} to "
        f"{max(fit.scale for fit in fits):.3g}"
    )
