"""The runner of a run: makes what is missing or stale, stage by stage, in the order of `STAGES`.

`Stages(run, recipe).run(...)` is what `megaxelm run` does. What each unit is made from: `ingredients.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaxelm.errors import StageError
from megaxelm.files import read_json, write_if_changed
from megaxelm.ingredients import STAGES, Ingredients
from megaxelm.lineage import write_lineage
from megaxelm.recipe import Recipe
from megaxelm.run import MadeFrom, RunFolder
from megaxelm.train.members import Member, account, account_text, check_language_weights, find_member, training_rounds

if TYPE_CHECKING:
    from megaxelm.train.launch import LaunchOptions


class Stages(Ingredients):
    """The runner of one run under one recipe. `say` tells what is done; the other arguments are those of `Ingredients`."""

    def __init__(
        self,
        run: RunFolder,
        recipe: Recipe,
        say: Callable[[str], None] = lambda text: print(text, flush=True),
        check_sources: bool = True,
        known_sources: Mapping[str, dict[str, str]] | None = None,
    ) -> None:
        super().__init__(run, recipe, check_sources, known_sources)
        self.say = say
        self._launch: LaunchOptions | None = None

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
