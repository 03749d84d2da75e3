"""What every unit of a run is made from, and whether it is fresh. `stages.py` makes what is not.

A stage is one unit (a folder), but `experts` is one unit a model. What a unit is made from follows from the recipe and, for the experts,
from the clusters on disk, so it is computed stage by stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from megaxelm.errors import StageError
from megaxelm.files import hash_file, hash_value, read_json
from megaxelm.growth import grown_fingerprint, read_growth
from megaxelm.lineage import Entry, lineage_entries
from megaxelm.loaded import model_sources, tokenizer_sources
from megaxelm.recipe import Recipe, result_settings
from megaxelm.run import MadeFrom, RunFolder
from megaxelm.train.members import Member, find_member, member_settings, members_of_run

STAGES = ("corpus", "tokenizer", "tokens", "clusters", "index", "seed", "experts", "ensemble", "evaluation", "report")
_STAGE_VERSION = 1


class Ingredients:
    """The units of one run under one recipe.

    Args:
        check_sources: look whether the files that the run was made from have changed. Verbs that use a run do not: it may have been moved
            away from its sources.
        known_sources: unit -> hashes of its source files, where they are known and need not be looked at.
    """

    def __init__(
        self, run: RunFolder, recipe: Recipe, check_sources: bool = True, known_sources: Mapping[str, dict[str, str]] | None = None
    ) -> None:
        self.folder = run
        self.recipe = recipe
        self.check_sources = check_sources
        self._known_sources = dict(known_sources or {})

    def units(self, stage: str) -> dict[str, MadeFrom]:
        """Folder names of a stage's units and what each is made from; the stages before it must be on disk for `experts` and later."""
        if stage == "seed":
            return {"experts/seed": self._expert_made_from(self.members()["seed"])}
        if stage == "experts":
            return {f"experts/{name}": self._expert_made_from(item) for name, item in self.members().items() if item.kind != "seed"}
        return {stage: getattr(self, f"_{stage}_made_from")()}

    def made_from(self, unit: str) -> MadeFrom:
        """What a unit is made from, by its folder name."""
        if unit.startswith("experts/"):
            return self._expert_made_from(find_member(self.members(), unit.removeprefix("experts/")))
        return self.units(unit)[unit]

    def members(self) -> dict[str, Member]:
        """Seed, dense and the experts of all rounds; the names of the last round's are the clusters'."""
        return members_of_run(self.folder, self.recipe)

    def _settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        return {"version": _STAGE_VERSION, **settings}

    def _fingerprints(self, *units: str) -> dict[str, str]:
        return {unit: self._fingerprint(unit) for unit in units}

    def _fingerprint(self, unit: str) -> str:
        made_from = self.made_from(unit)
        marker = self.folder.marker(unit) if unit.startswith("experts/") else None
        if marker is None or marker["fingerprint"] != made_from.fingerprint:
            return made_from.fingerprint
        # The same training gives other weights on another device: what branches from a model depends on the weights themselves.
        return hash_value([made_from.fingerprint, marker["weights"]])

    def _sources(self, unit: str, look: Callable[[], dict[str, str]]) -> dict[str, str]:
        if unit not in self._known_sources:
            marker = None if self.check_sources else self.folder.marker(unit)
            self._known_sources[unit] = look() if marker is None else marker["sources"]
        return self._known_sources[unit]

    def _corpus_made_from(self) -> MadeFrom:
        from megaxelm.corpus.inputs import source_fingerprint

        corpus = self.recipe.corpus
        sources = self._sources("corpus", lambda: source_fingerprint([*corpus.train, *corpus.valid]))
        return MadeFrom(self._settings({"corpus": result_settings(corpus)}), sources=sources)

    def _tokenizer_made_from(self) -> MadeFrom:
        settings = self._settings({"tokenizer": result_settings(self.recipe.tokenizer)})
        loaded = self.recipe.tokenizer.load
        if loaded is None:
            return MadeFrom(settings, self._fingerprints("corpus"))
        return MadeFrom(settings, sources=self._sources("tokenizer", lambda: tokenizer_sources(Path(loaded))))

    def _tokens_made_from(self) -> MadeFrom:
        return MadeFrom(self._settings({}), self._fingerprints("corpus", "tokenizer"))

    def _clusters_made_from(self) -> MadeFrom:
        clusters = self.recipe.clusters
        kind = clusters.partitioner
        used = ("partitioner", "k", kind, *(["seed"] if kind in ("tfidf", "random") else []))
        settings: dict[str, Any] = {"clusters": {key: value for key, value in result_settings(clusters).items() if key in used}}
        sources: dict[str, str] = {}
        by_typology = kind == "typology"
        if len(self.recipe.rounds) > 1:
            settings["rounds"] = [item.k for item in self.recipe.rounds]
            if kind in ("language", "mapping"):
                # the tree above such clusters is made by the distances of their languages
                settings["clusters"]["typology"] = result_settings(clusters.typology)
                by_typology = True
        if by_typology and clusters.typology.distances:
            table = Path(clusters.typology.distances)
            sources = self._sources("clusters", lambda: {table.name: hash_file(table)} if table.is_file() else {})
        if kind == "tfidf" and clusters.tfidf.assign == "balanced":
            # documents are balanced within a block
            settings["block_bytes"] = self.recipe.executor.block_bytes
        return MadeFrom(self._settings(settings), self._fingerprints("tokens"), sources)

    def _index_made_from(self) -> MadeFrom:
        return MadeFrom(self._settings({}), self._fingerprints("tokens", "clusters"))

    def _expert_made_from(self, member: Member) -> MadeFrom:
        settings = self._settings(member_settings(self.recipe, member))
        if member.kind == "seed" and self.recipe.seed.load:
            loaded = Path(self.recipe.seed.load)
            sources = self._sources("experts/seed", lambda: model_sources(loaded))
            return MadeFrom(settings, self._fingerprints("tokenizer"), sources)
        languages = self._languages_of(member)
        if languages is None:
            inputs = self._fingerprints("index")
        else:
            # Where a cluster is a set of languages its text is the same under any other clustering with that set.
            inputs = self._fingerprints("corpus", "tokenizer")
            settings["languages"] = languages
        if member.parent is not None:
            inputs |= self._fingerprints(f"experts/{member.parent}")
        return MadeFrom(settings, inputs)

    def _languages_of(self, member: Member) -> list[str] | None:
        """The languages that a member trains on, or None when a language is spread over several clusters."""
        index = self.folder.folder("index") / "manifest.json"
        if not index.exists():
            raise StageError(f"{self.folder.path}: the token index is missing; make it first: megaxelm run RECIPE --until index")
        clusters = read_json(index, clusters=dict)["clusters"]
        owners: dict[str, list[str]] = {}
        for cluster, found in clusters.items():
            for language in found:
                owners.setdefault(language, []).append(cluster)
        if any(len(found) > 1 for found in owners.values()):
            return None
        return sorted(language for language, found in owners.items() if member.clusters is None or found[0] in member.clusters)

    def _ensemble_made_from(self) -> MadeFrom:
        settings = {"ensemble": result_settings(self.recipe.ensemble), "tfidf": result_settings(self.recipe.clusters.tfidf)}
        fallback = self.recipe.ensemble.fallback
        growth = read_growth(self.folder.path)
        members = self.members()
        kept = growth.kept(name for name, member in members.items() if member.is_leaf)
        experts = [f"experts/{name}" for name in members if name in kept or name == fallback]
        inputs = self._fingerprints("clusters", "index", *experts) | self._of_grown(item.name for item in growth.experts)
        return MadeFrom(self._settings(settings | {"seed": self.recipe.clusters.seed} | growth.settings()), inputs)

    def _evaluation_made_from(self) -> MadeFrom:
        evaluation = result_settings(self.recipe.evaluation)
        # What is not asked for is left out: runs made before it could be asked for stay fresh.
        evaluation = {name: value for name, value in evaluation.items() if value or name not in ("top_m", "texts")}
        settings = {"evaluation": evaluation, "sequence_length": self.recipe.train.sequence_length}
        # Experts of rounds before the last are not evaluated; what branched from them depends on them.
        members = [f"experts/{name}" for name, member in self.members().items() if member.kind != "expert" or member.is_leaf]
        sources: dict[str, str] = {}
        if self.recipe.evaluation.texts:
            from megaxelm.evaluate.texts import text_sources

            marker = self.folder.marker("evaluation")
            told = marker is not None and marker["settings"].get("evaluation", {}).get("texts") == evaluation["texts"]
            # Texts that the last evaluation did not read must be at hand, whatever the verb.
            look = partial(text_sources, self.recipe.evaluation.texts)
            sources = self._sources("evaluation", look) if told else look()
        comparisons = self._of_grown(item.name for item in read_growth(self.folder.path).comparisons)
        return MadeFrom(self._settings(settings), self._fingerprints("corpus", "ensemble", *members) | comparisons, sources)

    def _of_grown(self, names: Iterable[str]) -> dict[str, str]:
        return {f"grown/{name}": grown_fingerprint(self.folder.path, name) for name in names}

    def _report_made_from(self) -> MadeFrom:
        return MadeFrom(self._settings({}), self._fingerprints("evaluation"))

    def lineage(self) -> dict[str, Entry]:
        """Every trained model by its name, parents before children: see `megaxelm.lineage`."""
        return lineage_entries(self.folder, self.members(), self._languages_of)

    def require(self, last: str) -> None:
        """Look whether a stage and all before it are made and fresh.

        Raises:
            StageError: naming the first one that is not, and why.
        """
        self._require_fresh(STAGES[: STAGES.index(last) + 1])

    def is_fresh(self, last: str) -> bool:
        """Whether a stage and all before it are made and fresh."""
        try:
            self.require(last)
        except StageError:
            return False
        return True

    def _require_fresh(self, stages: tuple[str, ...]) -> None:
        for stage in stages:
            for unit, made_from in self.units(stage).items():
                reason = self.folder.status(unit, made_from)
                if reason is not None:
                    raise StageError(f"{self.folder.path}/{unit} is {reason}; make it first: megaxelm run RECIPE --until {stage}")
