"""Which expert a new language branches from: the nearest by typology (paper, HMR), or the one that predicts its text best.

The published rule is the donor of least typological distance. It needs no text and no model, and says the same on every sample. Bits per
byte is what is left where URIEL knows nothing of the language, and can be asked for. Each measure decides where the other is even.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megaxelm.cluster.typology import donors, language_distances
from megaxelm.errors import ClusterError, GrowError
from megaxelm.growth import Growth, export_folder, grown_folder, index_clusters
from megaxelm.recipe import Recipe, TypologyConfig

if TYPE_CHECKING:
    from megaxelm.corpus.tokenizer import Tokenizer

BY_RULE = ("auto", "bits", "typology")
BASELINES = ("seed", "dense")


@dataclass(frozen=True)
class Candidate:
    """A model that a new expert may branch from."""

    name: str
    languages: tuple[str, ...]
    """Those it was trained for, dropped ones too, by which typology judges it; a baseline stands for none."""
    tokens: Mapping[str, int]
    """Tokens of its training text by language: what it is reminded of by replay."""
    export: Path


@dataclass(frozen=True)
class Choice:
    """The donor, and why it was chosen."""

    name: str
    how: str
    """`typology`, `bits` or `by hand`."""
    why: str


def find_candidates(recipe: Recipe, run_folder: Path, growth: Growth, tokenizer: Tokenizer) -> dict[str, Candidate]:
    """Every expert of the run, then grown ones, dropped ones too, then dense and seed: by name."""
    from megaxelm.cluster.load import load_partitioner
    from megaxelm.ensemble.stage import language_experts

    partitioner = load_partitioner(run_folder / "clusters", tokenizer)
    text = {
        name: {code: counts["tokens"] for code, counts in found.items()}
        for name, found in index_clusters(run_folder).items()
        if name in partitioner.names
    }
    # What is dropped leaves the ensemble and not the weights: an expert is as near as it was, and the same command finds the same donor.
    owners = language_experts(partitioner.languages(), text)
    found = {}
    for name in partitioner.names:
        held = tuple(sorted(code for code, owner in owners.items() if owner == name))
        found[name] = Candidate(name, held, text[name], export_folder(run_folder, name, growth))
    for item in growth.grown:
        if item.kind == "expert":
            of_child = index_clusters(grown_folder(run_folder, item.name))[item.name]
            tokens = {code: counts["tokens"] for code, counts in of_child.items()}
            found[item.name] = Candidate(item.name, item.languages, tokens, export_folder(run_folder, item.name, growth))
    everything = {code: sum(tokens.get(code, 0) for tokens in text.values()) for code in sorted({c for t in text.values() for c in t})}
    for name in ["dense", "seed"] if recipe.experts.dense else ["seed"]:
        found[name] = Candidate(name, (), everything, export_folder(run_folder, name, growth))
    return found


def typology_distances(
    targets: Sequence[str], candidates: Sequence[Candidate], config: TypologyConfig
) -> tuple[dict[str, float], list[str]]:
    """Distance of each expert from the new languages: the mean over these of its nearest language's. And what could not be compared.

    Returns:
        Expert -> distance, without the experts of which no language can be compared; empty where a new language cannot.
    """
    known = sorted({code for item in candidates for code in item.languages})
    comparable: list[str] = []
    silent: list[str] = []
    for code in known:
        (comparable if _has_features(code, config) else silent).append(code)
    notes = [f"no typological features of {', '.join(silent)}: left out of the distances"] if silent else []
    missing = [code for code in targets if not _has_features(code, config)]
    if missing:
        return {}, [*notes, f"no typological features of {', '.join(missing)} ({_source(config)})"]
    if not comparable:
        return {}, notes
    try:
        rows = {code: dict(found) for code, found in donors(list(targets), comparable, config)}
    except ClusterError as error:
        return {}, [*notes, str(error)]
    distances = {}
    for item in candidates:
        near = [min((rows[code][other] for other in item.languages if other in rows[code]), default=math.inf) for code in targets]
        if all(math.isfinite(value) for value in near):
            distances[item.name] = sum(near) / len(near)
    return distances, notes


def sample_bits(
    candidates: Sequence[Candidate], documents: Mapping[str, Sequence[str]], tokenizer: Tokenizer, max_tokens: int
) -> dict[str, dict[str, float]]:
    """Bits per byte of each candidate on a sample of each new language: candidate -> language -> bits.

    No candidate has seen this text. It comes from the training text of the language, so that no choice is made on the text that the
    evaluation reads.
    """
    from megaxelm.evaluate.documents import document_scores, language_scores
    from megaxelm.evaluate.perplexity import HeldOut, score_models
    from megaxelm.evaluate.subjects import export_loader

    held_out = {}
    for language, texts in documents.items():
        cuts = [(ids, size) for ids, size in (tokenizer.cut(text, max_tokens) for text in texts) if len(ids) and size]
        if not cuts:
            raise GrowError(f"language {language}: its sample has no text to measure; give other text by --corpus")
        held_out[language] = HeldOut(language, [list(map(int, ids)) for ids, _ in cuts], [size for _, size in cuts])
    streams = score_models({item.name: export_loader(item.export, item.name) for item in candidates}, held_out, tokenizer.start_id)
    documents_of = document_scores(held_out, streams)
    return {
        item.name: {language: score.bits_per_byte for language, score in language_scores(documents_of, item.name).items()}
        for item in candidates
    }


def choose_donor(wanted: str, names: Sequence[str], distances: Mapping[str, float], bits: Mapping[str, float]) -> Choice:
    """The donor by a rule, or by name.

    Args:
        wanted: `auto`, `typology`, `bits`, or the name of a candidate.
        names: the experts in order, of which a rule chooses.
        distances: typological, of those that have one. bits: per byte, mean over the new languages, of every candidate.

    Raises:
        GrowError: `typology` where no expert has a distance.
    """
    if wanted not in BY_RULE:
        return Choice(wanted, "by hand", f"--donor {wanted}")
    if wanted == "typology" and not distances:
        raise GrowError("--donor typology: no typological distance is known here (see above); choose --donor bits, or an expert's name")
    near = [name for name in names if name in distances]
    if wanted == "bits" or not near:
        best = min(names, key=lambda name: (bits[name], distances.get(name, math.inf), names.index(name)))
        why = f"{bits[best]:.3f} bits per byte on the sample, the fewest of the experts"
        return Choice(best, "bits", why + ("" if wanted == "bits" else "; there is no typological distance to go by"))
    best = min(near, key=lambda name: (distances[name], bits[name], names.index(name)))
    even = [name for name in near if distances[name] == distances[best]]
    why = f"typological distance {distances[best]:.3f}, the smallest"
    return Choice(
        best, "typology", why + (f" (as that of {', '.join(n for n in even if n != best)}; bits decide)" if len(even) > 1 else "")
    )


def _has_features(code: str, config: TypologyConfig) -> bool:
    try:
        language_distances([code], config)
    except ClusterError:
        return False
    return True


def _source(config: TypologyConfig) -> str:
    return f"clusters.typology.distances = {config.distances}" if config.distances else f"URIEL, {config.features}"
