"""What is measured before an expert is grown: the tokenizer's fit, and how near every possible donor is. Told, and written down.

`grown/<name>/sample/` holds the text of the new languages as the stage `corpus` leaves it, `grown/<name>/growth_report.json` what was
found: it is what a second `megaxelm grow` reads, so that the same command comes to the same donor although more experts are there by then
(what a dry run left is not read).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megaxelm.errors import GrowError
from megaxelm.files import hash_value, read_json, write_json
from megaxelm.grow.donors import BASELINES, BY_RULE, Candidate, Choice, choose_donor, sample_bits, typology_distances
from megaxelm.grow.fit import TokenizerFit, measure_fit, poor_fit
from megaxelm.growth import grown_folder
from megaxelm.recipe import Recipe

if TYPE_CHECKING:
    from megaxelm.corpus.tokenizer import Tokenizer

REPORT = "growth_report.json"
SAMPLE = "sample"
_FIT_DOCUMENTS = 200
_BITS_DOCUMENTS = 40
_TAKEN = 0.05
"""Share of a language's documents from which on it is told that another centre takes them."""


@dataclass(frozen=True)
class Study:
    """What was found out about one group of new languages. Tables are by expert, or by language."""

    name: str
    languages: tuple[str, ...]
    candidates: list[str]
    """The experts that a rule chose among."""
    fits: list[TokenizerFit]
    known_fits: list[TokenizerFit]
    warnings: list[str]
    distances: dict[str, float]
    bits: dict[str, dict[str, float]]
    """Candidate or baseline -> new language -> bits per byte."""
    bits_key: str
    notes: list[str]
    choice: Choice
    tokens: dict[str, float]
    """Training tokens of the new languages, by the bytes of their text and the tokenizer's bytes per token."""

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "languages": list(self.languages),
            "candidates": self.candidates,
            "tokenizer": {
                "new": {fit.language: fit.to_json() for fit in self.fits},
                "known": {fit.language: fit.to_json() for fit in self.known_fits},
                "warnings": self.warnings,
            },
            "typology": self.distances,
            "bits_per_byte": self.bits,
            "bits_key": self.bits_key,
            "notes": self.notes,
            "donor": {"name": self.choice.name, "how": self.choice.how, "why": self.choice.why},
            "tokens": self.tokens,
        }


def study_languages(
    recipe: Recipe,
    run_folder: Path,
    name: str,
    languages: Sequence[str],
    models: Mapping[str, Candidate],
    rule_names: Sequence[str],
    wanted: str,
    tokenizer: Tokenizer,
    known_fits: Sequence[TokenizerFit],
    say: Callable[[str], None],
) -> Study:
    """Measure fit and donors for languages whose sample lies in `grown/<name>/sample`, and choose.

    Args:
        models: every model that may be a donor. rule_names: the experts that a rule chooses among. wanted: as `choose_donor`.

    Raises:
        GrowError: the vector space of the tfidf router has no term of the languages, or as `choose_donor`.
    """
    from megaxelm.corpus.prepare import load_manifest

    folder = grown_folder(run_folder, name)
    corpus = folder / SAMPLE / "corpus"
    texts = {code: sample_texts(corpus, code, _FIT_DOCUMENTS) for code in languages}
    fits = [measure_fit(tokenizer, code, texts[code]) for code in languages]
    warnings = [f"{fit.language}: {reason}" for fit in fits for reason in poor_fit(fit, known_fits)]
    crowding = space_notes(run_folder, name, tokenizer, texts, [fit.language for fit in known_fits])

    old = read_json(folder / REPORT) if (folder / REPORT).exists() else {}
    # A trained expert keeps those that it was chosen from. One that was stopped keeps those that are not dropped; a dry run binds nobody.
    left: Collection[str] = models if name in models else [] if old.get("dry_run") else rule_names
    names = [item for item in old.get("candidates", rule_names) if item in left] or list(rule_names)
    distances, notes = typology_distances(languages, [models[item] for item in names], recipe.clusters.typology)
    scored = list(
        dict.fromkeys([*names, *(item for item in reversed(BASELINES) if item in models), *([wanted] if wanted in models else [])])
    )
    max_tokens = recipe.evaluation.sequence_length or recipe.train.sequence_length
    sample = read_json(corpus / "stage.json", fingerprint=str)["fingerprint"]
    key = hash_value([{item: model_hash(models[item].export) for item in scored}, sample, max_tokens, _BITS_DOCUMENTS])
    if old.get("bits_key") == key:
        bits = old["bits_per_byte"]
    else:
        say(f"grow {name}: {len(scored)} models read a sample of {', '.join(languages)}")
        documents = {code: texts[code][:_BITS_DOCUMENTS] for code in languages}
        bits = sample_bits([models[item] for item in scored], documents, tokenizer, max_tokens)
    notes = [*notes, *crowding]
    mean = {item: sum(found.values()) / len(found) for item, found in bits.items()}
    choice = choose_donor(wanted, names, distances, mean)
    better = [item for item in BASELINES if item in mean and mean[item] < mean[choice.name]]
    if better and choice.name not in BASELINES:
        verb = "predicts" if len(better) == 1 else "predict"
        advice = f"--donor {min(better, key=lambda item: mean[item])} branches from there"
        notes = [*notes, f"{' and '.join(better)} {verb} this text better than the donor {choice.name}: {advice}"]
    sizes = load_manifest(corpus)["languages"]
    tokens = {fit.language: sizes[fit.language]["train_bytes"] / fit.bytes_per_token for fit in fits}
    study = Study(name, tuple(languages), names, fits, list(known_fits), warnings, distances, bits, key, notes, choice, tokens)
    write_json(folder / REPORT, study.to_json())
    return study


def sample_texts(corpus_folder: Path, language: str, most: int) -> list[str]:
    """Texts of a language from the sample that the stage `corpus` keeps, `most` at most."""
    from megaxelm.corpus.prepare import read_documents

    path = corpus_folder / "sample" / f"{language}.jsonl"
    return [document.text for document in islice(read_documents(path), most)] if path.is_file() else []


def known_languages_fit(run_folder: Path, languages: Sequence[str], tokenizer: Tokenizer) -> list[TokenizerFit]:
    """The tokenizer's fit for the run's own languages."""
    return [
        measure_fit(tokenizer, code, texts) for code in languages if (texts := sample_texts(run_folder / "corpus", code, _FIT_DOCUMENTS))
    ]


def model_hash(export: Path) -> str:
    """The hash of a model's weights as its marker has it.

    Raises:
        StageError: the model is not finished.
    """
    weights: str = read_json(export.parent / "stage.json", weights=str)["weights"]
    return weights


def show_study(study: Study, donor_rule: str) -> None:
    """Print the tables: tokenizer, donors, warnings."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(title=f"the tokenizer on {', '.join(study.languages)}, beside the run's languages", title_justify="left")
    table.add_column("language")
    for heading in ("tokens a word", "bytes a token", "byte pieces", "unknown"):
        table.add_column(heading, justify="right")
    for fit in [*study.fits, *study.known_fits]:
        name = f"{fit.language} (new)" if fit in study.fits else fit.language
        fertility = f"{fit.tokens_per_word:.2f}" if fit.spaced else f"{fit.tokens_per_word:.2f} (no spaces)"
        table.add_row(name, fertility, f"{fit.bytes_per_token:.2f}", f"{fit.byte_share:.1%}", f"{fit.unknown_share:.1%}")
        if fit is study.fits[-1]:
            table.add_section()
    console.print(table)
    for warning in study.warnings:
        console.print(f"warning: poor fit of the tokenizer: {warning}", markup=False)
    table = Table(title=f"donors for {', '.join(study.languages)}: smaller is nearer", title_justify="left")
    table.add_column("model")
    table.add_column("typological distance", justify="right")
    table.add_column("bits per byte", justify="right")
    for name, found in sorted(study.bits.items(), key=lambda item: (study.distances.get(item[0], 9.0), sum(item[1].values()))):
        distance = f"{study.distances[name]:.3f}" if name in study.distances else "-"
        mark = " *" if name == study.choice.name else ""
        table.add_row(f"{name}{mark}", distance, f"{sum(found.values()) / len(found):.3f}")
    console.print(table)
    for note in study.notes:
        console.print(f"note: {note}", markup=False)
    rule = f" (--donor {donor_rule})" if donor_rule in BY_RULE else ""
    console.print(f"donor of {study.name}: {study.choice.name}{rule}: {study.choice.why}", markup=False)


def space_notes(run_folder: Path, name: str, tokenizer: Tokenizer, texts: Mapping[str, Sequence[str]], known: Sequence[str]) -> list[str]:
    """What growing will do to the router `tfidf`: of which known languages the new centre takes documents away from their own.

    The vector space stays that of the run, whose terms are not the new language's: its centre may lie in the midst of a related language.

    Args:
        name: of the new expert, which may be in the ensemble by now. texts: sample of each new language. known: languages of the run.

    Raises:
        GrowError: the space has no term of the new languages: the router could never find them, and the ensemble could not be built.
    """
    from megaxelm.cluster.space import TfidfSpace

    folder = run_folder / "ensemble" / "router"
    if not (folder / "centres.safetensors").exists():
        return []
    from safetensors.numpy import load_file

    from megaxelm.ensemble.folder import SPACE_NAME

    space = TfidfSpace.load(folder, SPACE_NAME, tokenizer)
    tensors = load_file(folder / "centres.safetensors")
    by_language = "experts" in tensors
    together = ", ".join(texts)
    groups = texts if by_language else {together: [text for of_language in texts.values() for text in of_language]}
    new = np.stack([space.transform(found).sum(0, dtype=np.float64) for found in groups.values()])
    norm = np.linalg.norm(new, axis=-1, keepdims=True)
    unknown = [codes for codes, length in zip(groups, norm[:, 0], strict=True) if not length > 0]
    if unknown:
        raise GrowError(
            f"{', '.join(unknown)}: the vector space of the router tfidf knows no term of this text, so the router could never find it; "
            "grow it from a run whose tokenizer and clusters.tfidf.analyzer read its script"
        )
    new /= norm
    experts = [entry["name"] for entry in read_json(run_folder / "ensemble" / "config.json", experts=list)["experts"]]
    owners = tensors["experts"].tolist() if by_language else range(len(tensors["centres"]))
    old = tensors["centres"][[number for number, owner in enumerate(owners) if experts[owner] != name]]
    taken = {}
    for code in known:
        documents = sample_texts(run_folder / "corpus", code, _FIT_DOCUMENTS)
        found = space.transform(documents) if documents else np.empty((0, 0), np.float32)
        found = found[np.abs(found).max(-1) > 0] if len(found) else found
        if len(found):
            to_old, to_new = (np.square(found[:, None] - centres).sum(-1).min(-1) for centres in (old, new))
            taken[code] = float(np.mean(to_new < to_old))
    much = sorted(((share, code) for code, share in taken.items() if share >= _TAKEN), reverse=True)
    if not much:
        return []
    shares = ", ".join(f"{share:.0%} of {code}" for share, code in much)
    return [
        f"the router tfidf will take {shares} for {' and '.join(texts)}, since its vector space stays that of the run; the routers "
        f"posterior and language do not{'' if by_language else '; ensemble.centres = language gives each language a centre of its own'}"
    ]
