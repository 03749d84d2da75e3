"""A maker of run directories with plausible figures, for the tests of the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.cluster.hierarchy import linkage

CODES = ["ar", "az", "bg", "de", "el", "en", "es", "fr", "he", "hi", "ja", "ko", "pl", "ru", "sv", "sw", "tr", "ur", "vi", "zh"]


def make_run(folder: Path, num_languages: int = 20, k: int = 16, lines: int = 60, dense_wins: tuple[str, ...] = ("tr",)) -> Path:
    """Write a run directory as the stages do; the dense model is better than the own expert in `dense_wins` alone."""
    random = np.random.default_rng(3)
    codes = CODES[:num_languages]
    groups = [list(group) for group in np.array_split(np.array(codes), k)]
    clusters = {"-".join(map(str, group)): [str(code) for code in group] for group in groups}
    own = {code: name for name, group in clusters.items() for code in group}
    bits = _bits(random, codes, clusters, own, dense_wins)
    results = {
        "languages": [{"code": code, "own": own[code], "documents": 40, "bytes": 51_200, "tokens": 14_000} for code in codes],
        "models": {key: _column(label, bits[key]) for key, label in LABELS.items()},
        "experts": {name: bits[name] for name in clusters},
        "verdict": {"beaten": [], "not_beaten": {}},
        "settings": {"sequence_length": 256, "max_documents": 200, "top_m": None, "temperature": 0.1, "dtype": "float32"},
    }
    write(folder / "evaluation/results.json", results)
    tokens = 1_048_576
    each = tokens // k
    experts = {name: each for name in clusters}
    account = {"seed_tokens": tokens, "dense_tokens": each * k, "expert_tokens": experts, "experts_total": each * k, "equal": True}
    write(folder / "account.json", account)
    write(folder / "lineage.json", {"experts": _lineage(clusters, codes, tokens, each, k)})
    _write_index(folder, codes, clusters, random)
    for name, last, end in [("seed", 6.1, tokens), ("dense", 5.6, each * k), *((name, 5.3, each) for name in clusters)]:
        _write_metrics(folder / f"experts/{name}/metrics.jsonl", 9.0 if name == "seed" else 6.1, last, end, lines, random)
    (folder / "recipe.yaml").write_text("name: fixture\ncorpus:\n  train: [{files: ['a/*.jsonl']}]\n", encoding="utf-8")
    return folder


LABELS = {
    "seed": "seed",
    "dense": "dense",
    "own": "own expert",
    "mixture-language": "language mixture",
    "mixture-tfidf": "tfidf mixture",
    "mixture-posterior": "posterior mixture",
    "mixture-uniform": "uniform mixture",
    "worst": "worst expert",
}


def _bits(random: Any, codes: list[str], clusters: dict[str, list[str]], own: dict[str, str], dense_wins: tuple[str, ...]) -> Any:
    level = {code: random.uniform(1.4, 3.6) for code in codes}
    dense = {code: round(level[code] - random.uniform(0.1, 0.25), 4) for code in codes}
    gain = {code: random.uniform(0.02, 0.16) * (-0.3 if code in dense_wins else 1) for code in codes}
    experts = {name: {code: round(dense[code] + random.uniform(0.15, 1.7), 4) for code in codes} for name in clusters}
    for code in codes:
        experts[own[code]][code] = round(dense[code] - gain[code], 4)
    best = {code: experts[own[code]][code] for code in codes}
    worst = {code: max(row[code] for row in experts.values()) for code in codes}
    return {
        **experts,
        "seed": level,
        "dense": dense,
        "own": best,
        "worst": worst,
        "mixture-language": best,
        "mixture-tfidf": {code: best[code] + random.uniform(0.0, 0.04) for code in codes},
        "mixture-posterior": {code: best[code] + random.uniform(-0.01, 0.012) for code in codes},
        "mixture-uniform": {code: dense[code] + random.uniform(0.15, 0.4) for code in codes},
    }


def _column(label: str, bits: dict[str, float]) -> dict[str, Any]:
    worst = max(bits, key=lambda code: bits[code])
    languages = {code: {"bits_per_byte": value, "perplexity": 2 ** (value * 3.6)} for code, value in bits.items()}
    mean = sum(bits.values()) / len(bits)
    return {"label": label, "languages": languages, "mean_bits_per_byte": mean, "worst_language": worst, "worst_bits_per_byte": bits[worst]}


def _lineage(clusters: dict[str, list[str]], codes: list[str], tokens: int, each: int, k: int) -> dict[str, Any]:
    def member(parent: str | None, kind: str, languages: Any, seen: int) -> dict[str, Any]:
        return {"parent": parent, "kind": kind, "languages": languages, "tokens": seen, "steps": 256, "weights": "9f" * 16}

    members = {"seed": member(None, "seed", codes, tokens), "dense": member("seed", "dense", "by document", each * k)}
    return members | {name: member("seed", "expert", group, each) for name, group in clusters.items()}


def _write_index(folder: Path, codes: list[str], clusters: dict[str, list[str]], random: Any) -> None:
    size = {code: int(random.uniform(2e5, 6e6)) for code in codes}
    counts = {
        code: {"train_documents": n // 900, "train_bytes": n, "valid_documents": 40, "valid_bytes": 51_200} for code, n in size.items()
    }
    package = {"kind": "catalogs", "package": "django", "distribution": "Django", "version": "5.2", "licence": "BSD-3-Clause"}
    train = [package, {"kind": "files", "files": ["a/ar.jsonl", "a/az.jsonl"]}]
    write(folder / "corpus/manifest.json", {"languages": counts, "sources": {"train": train, "valid": []}})
    tokens = {name: {code: {"documents": 9, "tokens": int(size[code] / 3.7)} for code in group} for name, group in clusters.items()}
    write(folder / "index/manifest.json", {"clusters": tokens})
    rows = linkage(random.random((len(codes), 4)), "average").tolist() if len(codes) > 1 else []
    report = {
        "partitioner": "typology",
        "k": len(clusters),
        "method": "agglomerative",
        "clusters": [
            {"name": name, "languages": {code: {"documents": 9, "bytes": size[code]} for code in group}, "forced": number == 1}
            for number, (name, group) in enumerate(clusters.items())
        ],
        "languages": codes,
        "linkage": rows,
        "notes": ["az and bg are a left-over pair, not relatives"],
    }
    write(folder / "clusters/report.json", report)


def _write_metrics(path: Path, first: float, last: float, tokens: int, lines: int, random: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(1, lines + 1):
        share = number / lines
        loss = last + (first - last) * float(np.exp(-4 * share)) + random.normal(0, 0.04)
        row = {"step": number * 10, "loss": loss, "lr": 1e-3 * (1 - share), "tokens": int(tokens * share), "grad_norm": 1.0}
        rows.append(json.dumps(row | {"tokens_per_second": 6800 + 300 * random.random(), "seconds": 150 * share}))
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture
def run_maker() -> Callable[..., Path]:
    return make_run


@pytest.fixture(scope="session")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 languages in 4 clusters, with the report in `report/`."""
    from megaxelm.report.stage import build_report

    folder = make_run(tmp_path_factory.mktemp("runs") / "small", num_languages=12, k=4)
    (folder / "report").mkdir()
    build_report(folder, folder / "report")
    return folder
