"""The stages of a run in order, what each is made from, and the runner that makes what is missing or stale.

`Stages(run, recipe).run(...)` is what `megaxelm run` does. A stage is one unit (a folder), but `experts` is one unit a model. What
a unit is made from follows from the recipe and, for the experts, from the clusters on disk, so it is computed stage by stage.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaxelm.errors import StageError
from megaxelm.files import hash_file, hash_value, read_json, write_if_changed
from megaxelm.grow.record import grown_fingerprint, read_growth
from megaxelm.lineage import Entry, lineage_entries, write_lineage
from megaxelm.loaded import model_sources, tokenizer_sources
from megaxelm.recipe import Recipe, result_settings
from megaxelm.run import MadeFrom, RunFolder
from megaxelm.train.members import (
    Member,
    account,
    account_text,
    check_language_weights,
    find_member,
    member_settings,
    members_of_run,
    training_rounds,
)

if TYPE_CHECKING:
    from megaxelm.train.launch import LaunchOptions

STAGES = ("corpus", "tokenizer", "tokens", "clusters", "index", "seed", "experts", "ensemble", "evaluation", "report")
_STAGE_VERSION = 1


class Stages:
    """The stages of one run under one recipe.

    Args:
        check_sources: look whether the files that the run was made from have changed. Verbs that use a run do not: it may have been moved
            away from its sources.
        known_sources: unit -> hashes of its source files, where they are known and need not be looked at.
    """

    def __init__(
        self,
        run: RunFolder,
        recipe: Recipe,
        say: Callable[[str], None] = lambda text: print(text, flush=True),
        check_sources: bool = True,
        known_sources: Mapping[str, dict[str, str]] | None = None,
    ) -> None:
        self.folder = run
        self.recipe = recipe
        self.say = say
        self.check_sources = check_sources
        self._launch: LaunchOptions | None = None
        self._known_sources = dict(known_sources or {})

    # What every unit is made from.

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

    # Making them.

    def run(self, *, until: str | None = None, start: str | None = None, only: str | None = None) -> bool:
        """Make what is missing or stale; returns whether anything was made.

        Args:
            until: last stage to make.
            start: make this stage and those after it even when fresh (experts are moved to `replaced/`).
            only: this stage alone, even when fresh; the ones before it must be fresh.
        """
        for name in (until, start, only):
            if name is not None and name not in STAGES:
                raise StageError(f"stage {name!r}: choose one of {', '.join(STAGES)}")
        if only and (until or start):
            raise StageError("--only makes one stage alone: leave out --until and --from")
        last = STAGES.index(only or until or STAGES[-1])
        first = STAGES.index(only) if only else 0
        if start is not None and STAGES.index(start) > last:
            raise StageError(f"--from {start} comes after --until {until}: nothing would be made")
        self._require_fresh(STAGES[:first])
        made = False
        with self.folder.lock():
            self.folder.write_recipe(self.recipe)
            for stage in STAGES[first : last + 1]:
                forced = stage == only or (start is not None and STAGES.index(stage) >= STAGES.index(start))
                made = self._run_stage(stage, forced, None) or made
        return made

    def train_models(self, expert: str | None, options: LaunchOptions | None = None) -> bool:
        """Train seed and experts, or one of them with its parents; the index must be fresh. Returns whether anything was trained."""
        self._launch = options
        self._require_fresh(STAGES[: STAGES.index("seed")])
        with self.folder.lock():
            self.folder.write_recipe(self.recipe)
            made = self._run_stage("seed", False, None)
            return (expert != "seed" and self._run_stage("experts", False, expert)) or made

    def make_one(self, stage: str) -> bool:
        """Make one stage when it is missing or stale; the ones before it must be fresh. Returns whether it was made."""
        self._require_fresh(STAGES[: STAGES.index(stage)])
        with self.folder.lock():
            self.folder.write_recipe(self.recipe)
            self.write_lineage()
            return self._run_stage(stage, False, None)

    def _run_stage(self, stage: str, forced: bool, expert: str | None) -> bool:
        if stage in ("seed", "experts"):
            if stage == "seed":
                self.say(account_text(self.members()))
            return self._train_stage(stage, forced, expert)
        made_from = self.units(stage)[stage]
        reason = self.folder.status(stage, made_from) or ("asked for" if forced else None)
        if reason is None:
            self.say(f"{stage:<11} fresh")
            return False
        self.say(f"{stage:<11} making ({reason})")
        began = time.monotonic()
        with self.folder.making(stage, made_from) as out:
            getattr(self, f"_make_{stage}")(out)
        self.say(f"{stage:<11} done in {time.monotonic() - began:.1f} s")
        return True

    def _train_stage(self, stage: str, forced: bool, expert: str | None) -> bool:
        """Train what is missing or stale of the seed, or of the experts round by round: a child branches from weights that are there."""
        from megaxelm.train.launch import train_members

        trained = False
        for names in [["seed"]] if stage == "seed" else training_rounds(self.members(), expert):
            waiting = self._open_experts(stage, names, forced)
            if waiting:
                began = time.monotonic()
                try:
                    train_members(self.folder, self.recipe, waiting, self._launch)
                finally:
                    self.write_lineage()
                self.say(f"{stage:<11} done in {time.monotonic() - began:.1f} s")
                trained = True
        self.write_lineage()
        return trained

    def _open_experts(self, stage: str, names: Sequence[str], forced: bool) -> list[Member]:
        """Of these models the ones that have to be trained, their folders ready; what their parents are is on disk by now."""
        members = self.members()
        waiting = []
        for name in names:
            unit, made_from = f"experts/{name}", self._expert_made_from(members[name])
            reason = self.folder.status(unit, made_from) or ("asked for" if forced else None)
            if reason is None:
                self.say(f"{stage:<11} {name}: fresh")
                continue
            with self.folder.lock(unit):
                moved = self.folder.set_expert_aside(name) if forced else None
                moved = self.folder.open_expert(name, made_from) or moved
            self.say(f"{stage:<11} {name}: making ({reason})" + (f"; the earlier one is kept in {moved}" if moved else ""))
            waiting.append(members[name])
        return waiting

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

    def open_for_training(self, name: str) -> tuple[Member, MadeFrom]:
        """What a training process needs to know of its model; what it is made from must be on disk and fresh.

        Raises:
            StageError: the index or the parent is missing or stale.
        """
        self._require_fresh(STAGES[: STAGES.index("seed")])
        member = find_member(self.members(), name)
        if member.parent is not None:
            parent = f"experts/{member.parent}"
            reason = self.folder.status(parent, self.made_from(parent))
            if reason is not None:
                raise StageError(
                    f"`{name}` branches from `{member.parent}`, which is {reason}: train that first (--expert {member.parent})"
                )
        return member, self._expert_made_from(member)

    def lineage(self) -> dict[str, Entry]:
        """Every trained model by its name, parents before children: see `megaxelm.lineage`."""
        return lineage_entries(self.folder, self.members(), self._languages_of)

    def write_lineage(self) -> None:
        """lineage.json and account.json: who came from whom, on what, with which weights. Written where they would change."""
        write_lineage(self.folder, self.lineage())
        write_if_changed(self.folder.path / "account.json", account(self.members()))

    def _make_corpus(self, out: Path) -> None:
        from megaxelm.corpus.prepare import load_manifest, prepare_corpus

        prepare_corpus(self.recipe, self._shards(), out)
        for line in _corpus_summary(load_manifest(out)):
            self.say(line)

    def _make_tokenizer(self, out: Path) -> None:
        from megaxelm.corpus.tokenizer import build_tokenizer

        build_tokenizer(self.recipe, self.folder.folder("corpus"), out)

    def _make_tokens(self, out: Path) -> None:
        from megaxelm.corpus.prepare import load_manifest
        from megaxelm.corpus.tokens import build_tokens

        # A weight that is missing would else be told when training begins.
        check_language_weights(self.recipe, load_manifest(self.folder.folder("corpus"))["languages"])
        build_tokens(self.recipe, self.folder.folder("corpus"), self.folder.folder("tokenizer"), self._shards(), out)

    def _make_clusters(self, out: Path) -> None:
        from megaxelm.cluster.stage import build_clusters, show_report
        from megaxelm.report.clusters import write_cluster_page

        corpus, tokens, tokenizer = (self.folder.folder(stage) for stage in ("corpus", "tokens", "tokenizer"))
        build_clusters(self.recipe, corpus, tokens, tokenizer, self._shards(), out)
        write_cluster_page(out)
        show_report(read_json(out / "report.json"))

    def _make_index(self, out: Path) -> None:
        from megaxelm.corpus.merge import build_index

        tokens, tokenizer, clusters = (self.folder.folder(stage) for stage in ("tokens", "tokenizer", "clusters"))
        build_index(self.recipe, tokens, tokenizer, clusters, self._fingerprint("clusters"), self._shards(), out)

    def _shards(self) -> Path:
        """Where parts of the preparation are kept; absolute, since other processes and machines work there."""
        return self.folder.path.absolute() / "shards"

    def _make_ensemble(self, out: Path) -> None:
        from megaxelm.ensemble.stage import build_ensemble

        build_ensemble(self.recipe, self.folder.path, out)

    def _make_evaluation(self, out: Path) -> None:
        from megaxelm.evaluate.stage import evaluate_run

        evaluate_run(self.recipe, self.folder.path, out)

    def _make_report(self, out: Path) -> None:
        from megaxelm.report.stage import build_report

        build_report(self.folder.path, out)


def _corpus_summary(manifest: dict[str, Any]) -> list[str]:
    """How much text there is, and where it comes from."""
    languages = manifest["languages"].values()
    documents, size = (sum(counts[f"train_{unit}"] for counts in languages) for unit in ("documents", "bytes"))
    held_out = sum(counts["valid_documents"] for counts in languages)
    lines = [
        f"text: {documents:,} documents, {size / 1e6:.2f} MB in {len(languages)} languages to train on, {held_out:,} documents held out"
    ]
    packages = [
        f"{source['distribution']} {source['version']} ({source['licence']})"
        for source in manifest["sources"]["train"]
        if source["kind"] == "catalogs"
    ]
    if packages:
        lines.append(f"text from the message catalogs of {', '.join(packages)}")
    broken = manifest["broken"]
    if broken["count"]:
        first = broken["examples"][0]
        lines.append(f"{broken['count']:,} broken documents were left out, the first: {first} (all examples: corpus/manifest.json)")
    return lines
