"""Figures of evaluated runs with their intervals, a JSON file a run: what docs/results.md is written from.

    python -m benchmarks.evidence.collect runs --base evidence-typology-8 --out benchmarks/results/evidence

Every difference is paired: all runs share the held-out documents of the base run, which this looks at before it compares.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from megaxelm.evaluate.documents import DocumentScores
from megaxelm.evaluate.statistics import Bootstrap, Interval
from megaxelm.files import read_json
from megaxelm.recipe import load_recipe

BASES = ("dense", "seed")
OWN = "own"
"""The expert whose cluster holds a language, or most of it."""
CENTRES = "-centres"
"""End of the name of a run that is another's copy with `ensemble.centres: language`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of the runs")
    parser.add_argument("--base", default="evidence-typology-8", help="the run that has the dense model and the seed")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/evidence"))
    parser.add_argument("--only", nargs="*", help="names of runs; default: every evaluated run evidence-*")
    options = parser.parse_args()
    names = options.only or sorted(path.parent.parent.name for path in options.runs.glob("evidence-*/evaluation/documents.npz"))
    options.out.mkdir(parents=True, exist_ok=True)
    for name in names:
        found = collect(options.runs / name, options.runs / options.base)
        path = options.out / f"{name.removeprefix('evidence-')}.json"
        path.write_text(compact_json(found) + "\n", encoding="utf-8")
        print(f"{path}: {len(found['bits'])} models, {len(found['languages'])} languages", flush=True)


def collect(run: Path, base: Path) -> dict[str, Any]:
    """All that docs/results.md says of a run, from its folder and that of the run with the dense model."""
    results = read_json(run / "evaluation" / "results.json")
    own = {row["code"]: row["own"] for row in results["languages"]}
    documents, old = _with_bases(run / "evaluation" / "documents.npz", base / "evaluation" / "documents.npz")
    documents.nats[OWN] = {code: documents.nats[f"expert:{name}"][code] for code, name in own.items()}
    growth = read_json(run / "growth.json")["grown"] if (run / "growth.json").is_file() else []
    new = [f"expert:{item['name']}" for item in growth if item["kind"] == "expert"]
    shown = [model for model in documents.nats if not model.startswith("expert:") or model in new]
    found: dict[str, Any] = {
        "run": run.name,
        "settings": _settings(run),
        "versions": {name: version(name) for name in ("torch", "deepspeed", "transformers")} | {"python": platform.python_version()},
        "account": results["account"],
        "languages": {
            row["code"]: {key: row[key] for key in ("own", "documents", "bytes", "tokens")}
            | {"train_tokens": train, "read": _read_tokens(run, base, row["code"], row["own"])}
            for row, train in zip(results["languages"], _train_tokens(run, list(own)), strict=True)
        },
        "matrix": results["experts"],
        **_compared(documents, shown, old),
    }
    texts = sorted((run / "evaluation" / "texts").glob("*.npz"))
    found["texts"] = {path.stem: _text_set(path, base / "evaluation" / "texts" / path.name, own) for path in texts}
    found["routers"] = {
        name: {key: value for key, value in about.items() if key not in ("languages", "by_position")}
        for name, about in results["routers"].items()
    }
    found["forgetting"] = {
        model: about["summary"]["seed"] for model, about in results["forgetting"]["models"].items() if about["kind"] == "expert"
    }
    for file in ("ladder", "tasks"):
        path = run / "merged" / f"{file}.json"
        if path.is_file() and not run.name.endswith(CENTRES):  # a copy has those of its original
            found[file] = read_json(path)
    for key, row in found.get("ladder", {}).get("models", {}).items():
        made = run / "merged" / key.removeprefix("merged:") / "merge.json"
        row["training_tokens"] = read_json(made)["facts"].get("training_tokens", 0) if made.is_file() else None
    if growth:
        # Mixtures of a run with other centres are compared with those of the same centres.
        same = base.with_name(f"{base.name}{CENTRES}") if run.name.endswith(CENTRES) else base
        found["growth"] = _growth(documents, DocumentScores.load(same / "evaluation" / "documents.npz"), growth, old)
    return _rounded(found)


def _growth(documents: DocumentScores, before: DocumentScores, growth: Sequence[Mapping[str, Any]], old: list[str]) -> dict[str, Any]:
    """Each grown expert beside continued models on its languages, and what became of the old languages.

    `old_languages`: differences over the languages of the base run: of each continued model to what it was continued from, and of each
    mixture to the same mixture before anything was grown.
    """
    nats = dict(documents.nats)
    mixtures = [model for model in nats if model.startswith("mixture:") and model in before.nats]
    nats |= {f"before {model}": before.nats[model] for model in mixtures}
    bootstrap = Bootstrap(nats, documents.num_bytes)
    experts = []
    for item in (item for item in growth if item["kind"] == "expert"):
        key, codes = f"expert:{item['name']}", list(item["languages"])
        others = [model for model in nats if model in ("seed", "dense") or model.startswith(("lapt:", "mixture:"))]
        others = [model for model in others if not model.startswith("lapt:") or model.startswith(f"lapt:{item['name']}-")]
        donor = item["donor"] if item["donor"] in ("seed", "dense") else f"expert:{item['donor']}"
        experts.append(
            {"name": item["name"], "languages": codes, "donor": item["donor"], "bits": bootstrap.mean(key, None, codes).to_json()}
            | {"others": {model: bootstrap.mean(model, None, codes).to_json() for model in dict.fromkeys([donor, *others])}}
            | {"against": {model: bootstrap.mean(key, model, codes).to_json() for model in dict.fromkeys([donor, *others])}}
        )
    changes = {
        f"lapt:{item['name']}": bootstrap.mean(f"lapt:{item['name']}", item["donor"], old).to_json()
        for item in growth
        if item["kind"] == "lapt"
    }
    changes |= {model: bootstrap.mean(model, f"before {model}", old).to_json() for model in mixtures}
    return {"experts": experts, "old_languages": changes}


def _with_bases(path: Path, base: Path) -> tuple[DocumentScores, list[str]]:
    """The documents of a run with the base run's `seed` and `dense` where it has none of its own, and the languages of the base run."""
    documents, other = DocumentScores.load(path), DocumentScores.load(base)
    for code in set(documents.languages) & set(other.languages):
        if not np.array_equal(documents.num_bytes[code], other.num_bytes[code]):
            raise SystemExit(f"{path}: its held-out documents of {code!r} are not those of {base}; their differences would not be paired")
    for model in BASES:
        if model not in documents.nats:
            documents.nats[model] = {code: nats for code, nats in other.nats[model].items() if code in documents.num_bytes}
    return documents, [code for code in documents.languages if code in other.languages]


def _compared(documents: DocumentScores, models: list[str], old: list[str]) -> dict[str, Any]:
    """`bits` of each model, and its difference to the dense model and the seed, by language and as macro mean over the old languages."""
    bootstrap = Bootstrap(documents.nats, documents.num_bytes)
    bits = {}
    against: dict[str, dict[str, Any]] = {base: {} for base in BASES}
    for model in models:
        codes = bootstrap.languages_of(model)
        values = {code: bootstrap.language(model, code) for code in codes}
        shared = [code for code in codes if code in old]
        if not shared:
            continue
        worst = max(shared, key=lambda code: values[code].value)
        bits[model] = {
            "mean": bootstrap.mean(model, None, shared).to_json(),
            "worst": {"language": worst} | values[worst].to_json(),
            "languages": {code: value.to_json() for code, value in values.items()},
        }
        for base in BASES:
            if model != base:
                codes = bootstrap.languages_of(model, base)
                against[base][model] = difference(bootstrap, model, base, codes, shared)
    return {"bits": bits, "against": against}


def difference(bootstrap: Bootstrap, model: str, base: str, codes: list[str], meant: list[str]) -> dict[str, Any]:
    """Bits per byte of `model` minus those of `base`: macro mean over `meant`, by language, and in how many it is better or worse."""
    rows: Mapping[str, Interval] = {code: bootstrap.language(model, code, base) for code in codes}
    return {
        "mean": bootstrap.mean(model, base, meant).to_json(),
        "gini": bootstrap.gini(model, base, meant).to_json(),
        "better": [code for code, row in rows.items() if row.sign < 0],
        "worse": [code for code, row in rows.items() if row.sign > 0],
        "languages": {code: row.to_json() for code, row in rows.items()},
    }


def _text_set(path: Path, base: Path, own: Mapping[str, str]) -> dict[str, Any]:
    documents, old = _with_bases(path, base)
    documents.nats[OWN] = {code: documents.nats[f"expert:{name}"][code] for code, name in own.items() if code in documents.num_bytes}
    shown = [model for model in documents.nats if not model.startswith("expert:")]
    return _compared(documents, shown, old)


def _settings(run: Path) -> dict[str, Any]:
    recipe = load_recipe(run / "recipe.yaml")
    train = recipe.train
    # Of what was trained: the recipe's own shape does not count where the seed was loaded.
    model = read_json(next((run / "experts").glob("*/export/config.json")))
    choices = next((run / "experts").glob("*/choices.json"), None)
    return {
        "partitioner": recipe.clusters.partitioner,
        "k": len(read_json(run / "clusters" / "report.json")["names"]),
        "tokens_per_step": train.batch_sequences * train.sequence_length,
        "sequence_length": train.sequence_length,
        "steps": train.steps,
        "lr": train.lr,
        "schedule": train.schedule,
        "seed": train.seed,
        "precision": read_json(choices)["precision"] if choices else train.precision,
        "vocabulary": recipe.tokenizer.vocab_size,
        "shape": "{model_type}, {num_hidden_layers} layers, width {hidden_size}, FFN {intermediate_size}".format(**model),
        "max_documents": recipe.evaluation.max_documents,
        "evaluated_tokens": recipe.evaluation.sequence_length or train.sequence_length,
    }


def _train_tokens(run: Path, codes: list[str]) -> list[int | None]:
    clusters = read_json(run / "index" / "manifest.json", clusters=dict)["clusters"]
    sizes = {code: sum(int(found[code]["tokens"]) for found in clusters.values() if code in found) for code in codes}
    return [sizes[code] or None for code in codes]


def _read_tokens(run: Path, base: Path, code: str, own: str) -> dict[str, int | None]:
    """Tokens of a language that its own expert and the dense model read, from the last line of their metrics. Rounds: the last one's."""
    found = {}
    for name, path in ((OWN, run / "experts" / own), ("dense", base / "experts" / "dense")):
        metrics = path / "metrics.jsonl"
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
        trained = [line for line in map(json.loads, lines) if "language_tokens" in line]
        found[name] = trained[-1]["language_tokens"].get(code) if trained else None
    return found


def _rounded(value: Any) -> Any:
    """Six digits: more than the intervals carry, and a file that can be read."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def compact_json(value: Any) -> str:
    """JSON with the innermost objects and lists on a line each: a third of the lines, and a change still shows where it is."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    return re.sub(r"(?<=[\[{])\n *([^\[\]{}]*?)\n *(?=[\]}])", lambda found: re.sub(r"\n *", " ", found[1]), text)


if __name__ == "__main__":
    main()
