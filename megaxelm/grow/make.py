"""`megaxelm grow`: measure, choose a donor, train the new expert in a run directory of its own, and let the ensemble know.

Each new expert is a child run `grown/<name>/` that the ordinary stages make, so it is resumed, killed and found fresh as any run is. The
models of the run are read and never written: their weights are hashed before and after.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaxelm.errors import CorpusError, GrowError
from megaxelm.files import read_json, write_json
from megaxelm.grow.child import ChildPlan, child_recipe, mixing_weights, parse_sources
from megaxelm.grow.donors import BASELINES, BY_RULE, Candidate, find_candidates
from megaxelm.grow.proof import model_hashes, record_untouched
from megaxelm.grow.study import REPORT, SAMPLE, Study, known_languages_fit, model_hash, show_study, study_languages
from megaxelm.growth import FOLDER, Grown, Growth, grown_folder, held_clusters, read_growth, write_growth
from megaxelm.recipe import Recipe
from megaxelm.run import RunFolder

if TYPE_CHECKING:
    from megaxelm.stages import Stages
    from megaxelm.train.members import Member

Say = Callable[[str], None]


@dataclass(frozen=True)
class GrowOptions:
    """What `megaxelm grow` was asked for."""

    languages: Sequence[str]
    corpus: Sequence[str] = ()
    valid: Sequence[str] = ()
    donor: str = "auto"
    replay: float = 0.25
    """Share of the training text that is of the donor's languages."""
    steps: int | None = None
    """None: as many as an expert of the run got."""
    lapt: bool = False
    together: bool = False
    dry_run: bool = False
    overrides: Sequence[str] = field(default=())


def grow(folder: RunFolder, recipe: Recipe, options: GrowOptions, say: Say = lambda text: print(text, flush=True)) -> bool:
    """Grow one expert a language, or one for all of them, and make ensemble, evaluation and report again.

    Returns:
        Whether a model was trained.

    Raises:
        GrowError: what cannot be grown, before anything is made. StageError: the run is not trained. CorpusError: text cannot be read.
        Preempted: training was asked to stop; the same command goes on.
    """
    from megaxelm.corpus.tokenizer import Tokenizer
    from megaxelm.stages import Stages

    _check_options(options, recipe)
    with folder.lock(FOLDER):
        stages = Stages(folder, recipe, say, check_sources=False)
        stages.require("experts")
        growth = read_growth(folder.path)
        tokenizer = Tokenizer.load(folder.folder("tokenizer"))
        models = find_candidates(recipe, folder.path, growth, tokenizer)
        groups = [list(options.languages)] if options.together else [[code] for code in options.languages]
        for group in groups:
            _check_group(group, folder, growth, models, options)
        known_fits = known_languages_fit(folder.path, sorted(models["seed"].tokens), tokenizer)
        run_experts = [name for name in models if name not in (*BASELINES, *growth.names)]
        member = stages.members()[run_experts[0]]
        plans: list[tuple[Grown, ChildPlan]] = []
        for group in groups:
            name = "-".join(group)
            _make_sample(folder, recipe, name, group, options, say)
            names = _rule_names(name, group, growth, models)
            study = study_languages(recipe, folder.path, name, group, models, names, options.donor, tokenizer, known_fits, say)
            show_study(study, options.donor)
            planned = _plan(folder, recipe, study, models, member, growth, options)
            _report_plan(folder, planned, options, member, say)
            plans += planned
        made_recipes = [child_recipe(recipe, folder.folder("tokenizer"), plan) for _, plan in plans]
        if options.dry_run:
            say(f"dry run: nothing was trained; the measurements are in {folder.path}/{FOLDER}/*/{REPORT}")
            return False
        made = _train(folder, plans, made_recipes, say)
    for stage in ("ensemble", "evaluation", "report"):
        Stages(folder, recipe, say, check_sources=False).make_one(stage)
    return made


def _check_options(options: GrowOptions, recipe: Recipe) -> None:
    from megaxelm.corpus.scan import check_language

    if not options.languages:
        raise GrowError("--languages: name at least one language, e.g. --languages az,he")
    twice = sorted({code for code in options.languages if list(options.languages).count(code) > 1})
    if twice:
        raise GrowError(f"--languages: {', '.join(twice)} given more than once; name each language once")
    for code in options.languages:
        check_language(code, "--languages")
    if not 0 <= options.replay < 1:
        raise GrowError(f"--replay {options.replay:g}: the share of the donor's text is at least 0 and below 1; published runs mix both")
    if options.steps is not None and options.steps < 1:
        raise GrowError(f"--steps {options.steps}: at least 1")
    if options.lapt and not recipe.experts.dense:
        raise GrowError(
            "--lapt continues the dense model and the seed, but this run has no dense model (experts.dense = false): leave --lapt out"
        )
    if options.valid and not recipe.corpus.valid and options.replay:
        raise GrowError(
            "--valid: this run holds its text out by hash (corpus.valid is empty), and so must what is grown with its text: leave --valid "
            "out (corpus.held_out.share of the new text is held out), or give --replay 0"
        )


def _check_group(group: Sequence[str], folder: RunFolder, growth: Growth, models: Mapping[str, Candidate], options: GrowOptions) -> None:
    """Refuse languages that have an expert, names that are taken, and donors that are not there."""
    name = "-".join(group)
    entry = growth.find(name)
    held = {code: expert for expert, text in held_clusters(folder.path, growth).items() for code in text}
    again = entry is not None and entry.kind == "expert" and list(entry.languages) == list(group)
    if again and name in growth.dropped_experts:
        raise GrowError(
            f"--languages {','.join(group)}: `{name}` was dropped and is still there: megaxelm drop {folder.path} --experts {name} --undo"
        )
    for code in group:
        if code in held and held[code] != name:
            raise GrowError(
                f"--languages: {code} has an expert already, `{held[code]}`; leave it out, or drop it there first: megaxelm drop "
                f"{folder.path} --languages {code}"
            )
    if not again and (name in models or entry is not None or (folder.path / "experts" / name).exists()):
        raise GrowError(f"--languages {','.join(group)}: a model of this run is named `{name}` already; grow the languages in other groups")
    if options.donor not in (*BY_RULE, *models):
        raise GrowError(f"--donor {options.donor}: choose {', '.join(BY_RULE)}, or one of {', '.join(models)}")
    donor: str | None = options.donor
    while donor is not None:
        if donor == name:
            raise GrowError(f"--donor {options.donor}: it branches from `{name}` itself; choose another")
        found = growth.find(donor)
        donor = found.donor if found else None


def _rule_names(name: str, group: Sequence[str], growth: Growth, models: Mapping[str, Candidate]) -> list[str]:
    """The experts that a rule chooses among: those that were there before this one, without dropped ones."""
    later = growth.names[growth.names.index(name) :] if name in growth.names else []
    return [
        item.name
        for item in models.values()
        if item.name not in (*BASELINES, *later, *growth.dropped_experts)
        and not (growth.find(item.name) and set(item.languages) & set(group))
    ]


def _make_sample(folder: RunFolder, recipe: Recipe, name: str, group: Sequence[str], options: GrowOptions, say: Say) -> None:
    """The text of the new languages as the stage `corpus` of a run of its own, in `grown/<name>/sample`."""
    from megaxelm.stages import Stages

    home = grown_folder(folder.path, name)
    new = not home.exists()
    given = parse_sources(options.corpus, group)
    dumped = recipe.model_dump(mode="json")["corpus"]
    valid = [*parse_sources(options.valid, group), *dumped["valid"]]
    weights = {code: 1.0 for code in group}
    plan = ChildPlan(name, tuple(group), "seed", folder.expert("seed") / "export", weights, 1, 1, given or dumped["train"], valid)
    sample = child_recipe(
        recipe.model_copy(update={"train": recipe.train.model_copy(update={"warmup_steps": 0})}), folder.folder("tokenizer"), plan
    )
    home.mkdir(parents=True, exist_ok=True)
    try:
        run = RunFolder(home / SAMPLE)
        run.path.mkdir(exist_ok=True)
        Stages(run, sample, lambda text: say(f"{name} | {text}")).run(until="corpus")
    except CorpusError as error:
        if new:
            shutil.rmtree(home)
        raise GrowError(f"{', '.join(group)}: no text to grow from. {error}{_hint(group)}") from None
    except BaseException:
        if new:
            shutil.rmtree(home)
        raise


def _hint(group: Sequence[str]) -> str:
    """What may be wrong with a code that typology does not know."""
    from megaxelm.cluster.uriel import iso_639_3
    from megaxelm.errors import ClusterError

    for code in group:
        try:
            iso_639_3(code)
        except ClusterError as error:
            return f". And {str(error).partition('. ')[0]}"
    return ". Text comes from --corpus, or else from the run's own corpus.train"


def _plan(
    folder: RunFolder,
    recipe: Recipe,
    study: Study,
    models: Mapping[str, Candidate],
    member: Member,
    growth: Growth,
    options: GrowOptions,
) -> list[tuple[Grown, ChildPlan]]:
    """The new expert, and with `lapt` the two models that it is compared with: the same text, shares, steps and batch, another parent."""
    donor = models[study.choice.name]
    weights = mixing_weights(study.tokens, donor.tokens, options.replay)
    replayed = [code for code in weights if code not in study.languages]
    train, valid = _sources(folder, recipe, donor.name, bool(replayed), growth, options)
    if options.replay and not replayed:
        raise GrowError(f"--replay {options.replay:g}: the donor {donor.name} has no text of other languages to replay; give --replay 0")

    def planned(name: str, parent: Candidate, kind: Any) -> tuple[Grown, ChildPlan]:
        plan = ChildPlan(
            name,
            study.languages,
            parent.name,
            parent.export,
            weights,
            options.steps or member.steps,
            member.batch_sequences,
            train,
            valid,
            options.overrides,
            _generation(donor.name, growth),
        )
        return Grown(name, study.languages, parent.name, kind, model_hash(parent.export)), plan

    found = [planned(study.name, donor, "expert")]
    if options.lapt:
        found += [planned(f"{study.name}-lapt-{base}", models[base], "lapt") for base in reversed(BASELINES)]
    return found


def _generation(donor: str, growth: Growth) -> int:
    found = growth.find(donor)
    return 1 if found is None else 1 + _generation(found.donor, growth)


def _sources(
    folder: RunFolder, recipe: Recipe, donor: str, replays: bool, growth: Growth, options: GrowOptions
) -> tuple[list[Any], list[Any]]:
    """Training and held-out sources of a child: what was given, then the run's, then those that a grown donor had besides.

    Raises:
        GrowError: sources of the run that are gone, or a file given by --corpus that is one of them.
    """
    from megaxelm.corpus.inputs import list_inputs

    own = recipe.model_dump(mode="json")["corpus"]
    train, valid = list(own["train"]), list(own["valid"])
    given = parse_sources(options.corpus, options.languages)
    if growth.find(donor):
        of_donor = RunFolder(grown_folder(folder.path, donor)).recipe().model_dump(mode="json")["corpus"]
        # A file that the donor was given may hold the new language as well, and is given again for it.
        given_files = [item["files"] for item in given]
        train += [item for item in of_donor["train"] if item not in train and item.get("files") not in given_files]
        valid += [item for item in of_donor["valid"] if item not in valid]
    if given and not replays:
        return given, [*parse_sources(options.valid, options.languages), *(valid if not options.valid else [])]
    try:
        parsed = recipe.corpus.model_validate(own | {"train": train})
        own_files = {str(Path(file).resolve()) for item in list_inputs(parsed.train) for file in item.files}
    except CorpusError as error:
        raise GrowError(
            f"the text of the run is needed again, to remind the new expert of its donor's languages: {error}. Bring it back, or give "
            "--corpus with the new text and --replay 0"
        ) from None
    if given:
        parsed = recipe.corpus.model_validate(own | {"train": given})
        twice = [file for item in list_inputs(parsed.train) for file in item.files if str(Path(file).resolve()) in own_files]
        if twice:
            raise GrowError(f"--corpus: {twice[0]} is a source of the run already, so its text would count twice; leave it out")
    return [*given, *train], [*parse_sources(options.valid, options.languages), *valid]


def _report_plan(folder: RunFolder, planned: Sequence[tuple[Grown, ChildPlan]], options: GrowOptions, member: Member, say: Say) -> None:
    """Say what will be trained, and put it into the growth report."""
    entry, plan = planned[0]
    tokens = plan.steps * plan.batch_sequences * member.sequence_length
    shares = ", ".join(f"{code} {weight:.1%}" for code, weight in plan.weights.items())
    say(f"{entry.name} trains on {tokens:,} tokens ({plan.steps} steps of {plan.batch_sequences} x {member.sequence_length}): {shares}")
    if len(planned) > 1:
        say(f"compared at the same tokens and text: {', '.join(item.name for item, _ in planned[1:])}")
    path = grown_folder(folder.path, entry.name) / REPORT
    training = {
        "replay": options.replay,
        "language_weights": dict(plan.weights),
        "steps": plan.steps,
        "batch_sequences": plan.batch_sequences,
        "sequence_length": member.sequence_length,
        "tokens": tokens,
        "compared_with": [item.name for item, _ in planned[1:]],
    }
    write_json(path, read_json(path) | {"training": training, "dry_run": options.dry_run})


def _train(folder: RunFolder, plans: Sequence[tuple[Grown, ChildPlan]], recipes: Sequence[Recipe], say: Say) -> bool:
    """Train what is missing or stale, each in its run directory; a model stands in growth.json once it is trained."""
    before: dict[str, str] = {}
    made: list[str] = []
    try:
        for (entry, plan), recipe in zip(plans, recipes, strict=True):
            # Looked at in turn: a donor may have been made again just before.
            stages = _child_stages(folder, entry.name, recipe, say)
            if stages.is_fresh("experts"):
                say(f"{entry.name}: fresh")
            else:
                before = before or model_hashes(folder.path)
                stages.folder.path.mkdir(parents=True, exist_ok=True)
                stages.run(until="experts")
                _check_tokenizer(folder, stages.folder)
                made.append(entry.name)
            _enter(folder.path, replace(entry, donor_weights=model_hash(plan.donor_export)))
    finally:
        # What was trained before a stop is proved too: the command that goes on finds it fresh.
        if made:
            record_untouched(folder.path, f"grow {' '.join(made)}", before, made)
            say(f"{len(before)} models hashed before and after: those that were there are as they were")
    return bool(made)


def _child_stages(folder: RunFolder, name: str, recipe: Recipe, say: Say) -> Stages:
    """The stages of a child run, with donor and tokenizer under the places that it has stored where these very files were read already.

    A run may be moved, and a command may name it by another path: neither makes anything new.
    """
    from megaxelm.loaded import model_sources, tokenizer_sources
    from megaxelm.stages import Stages

    child = RunFolder(grown_folder(folder.path, name))
    known: dict[str, dict[str, str]] = {}
    if (child.path / "recipe.yaml").exists():
        stored = child.recipe()
        for section, unit, look in (("seed", "experts/seed", model_sources), ("tokenizer", "tokenizer", tokenizer_sources)):
            marker, wanted = child.marker(unit), getattr(recipe, section)
            if marker and getattr(stored, section).load and marker["sources"] == look(Path(wanted.load)):
                known[unit] = marker["sources"]
                recipe = recipe.model_copy(update={section: wanted.model_copy(update={"load": getattr(stored, section).load})})
    return Stages(child, recipe, lambda text: say(f"{name} | {text}"), known_sources=known)


def _check_tokenizer(folder: RunFolder, child: RunFolder) -> None:
    from megaxelm.corpus.tokenizer import Tokenizer

    mine, theirs = (Tokenizer.load(item.folder("tokenizer")) for item in (folder, child))
    if mine.hf.get_vocab() != theirs.hf.get_vocab():
        raise GrowError(f"{child.path}: its tokenizer has other pieces than the run's; the run's was made again meanwhile: grow once more")


def _enter(run_folder: Path, entry: Grown) -> None:
    """Put a trained model into growth.json, in its old place where it has one; its languages are no longer dropped, and are its alone."""
    growth = read_growth(run_folder)
    grown = [entry if item.name == entry.name else item for item in growth.grown]
    if growth.find(entry.name) is None:
        grown.append(entry)
    languages = growth.dropped_languages
    if entry.kind == "expert":
        languages = tuple(code for code in languages if code not in entry.languages)
    made = Growth(tuple(grown), languages, growth.dropped_experts)
    if entry.kind == "expert":
        made = made.handed_over(entry.name, entry.languages)
    if made != growth:
        write_growth(run_folder, made)
