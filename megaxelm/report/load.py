"""Reads a run directory for the report: `load_run(run_folder)`.

Only `evaluation/results.json` is required. Any other file may be absent: `RunData.missing` then says in words what the page
lacks. A file that is there but broken is an error, because a page made from half of it would look complete.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megaxelm.errors import StageError
from megaxelm.report.data import Account, Cluster, Clusters, CorpusLanguage, Curve, Language, Member, Model, RunData
from megaxelm.report.measured import Forgetting, RouterRow, Statistics, TextSet, read_part

_MODEL_ORDER = ("seed", "dense", "own")
_CONTINUED = "lapt:"
_STAGE_FOLDERS = ("corpus", "clusters", "index", "evaluation")
_NAMES_SHOWN = 6
_CORPUS_KEYS = ("train_documents", "train_bytes", "valid_documents", "valid_bytes")


def load_run(run_folder: Path) -> RunData:
    """Read what the report needs from `run_folder`.

    Raises:
        StageError: `evaluation/results.json` is absent, or any file that is present is broken; the text names the file.
    """
    results_file = run_folder / "evaluation" / "results.json"
    if not results_file.is_file():
        raise StageError(f"{results_file}: no such file, and the report is made from it; make it: megaxelm run RECIPE --until evaluation")
    missing: list[str] = []
    results = _Reader(results_file)
    rows = results.rows("languages")
    languages, grown = ([_language(row) for row in rows if bool(row.flag("grown")) == added] for added in (False, True))
    if not languages:
        raise results.error("`languages` is empty" if not rows else "`languages` has none that was not grown")
    codes = [language.code for language in [*languages, *grown]]
    models = [_model(key, row, codes) for key, row in results.mappings("models").items()]
    if not models:
        raise results.error("`models` is empty")
    models.sort(key=lambda model: _model_rank(model.key))
    experts = {
        name: {code: _number(value) for code, value in row.values.items()}
        for name, row in results.mappings("experts", optional=True).items()
    }
    members = _load_members(run_folder, missing)
    index_tokens = _load_index_tokens(run_folder, missing)
    corpus, sources = _load_corpus(run_folder, index_tokens, codes, missing)
    recipe_text = _load_text(run_folder / "recipe.yaml", "the recipe", missing)
    return RunData(
        name=run_folder.resolve().name,
        languages=languages,
        models=[model for model in models if not model.key.startswith(_CONTINUED)],
        grown=grown,
        continued=[model for model in models if model.key.startswith(_CONTINUED)],
        experts={name: row for name, row in experts.items() if name not in ("seed", "dense")},
        settings=dict(results.mapping("settings", optional=True).values),
        account=_load_account(run_folder, results, missing),
        members=members,
        curves=_load_curves(run_folder, members, [*members, *experts], missing),
        clusters=_load_clusters(run_folder, missing),
        corpus=corpus,
        sources=sources,
        recipe_text=recipe_text,
        missing=missing,
        **_measured(results, missing),
    )


def _measured(results: _Reader, missing: list[str]) -> dict[str, Any]:
    """Forgetting, routers and statistics; absent from runs that were evaluated before they were made."""
    try:
        found = {
            "forgetting": read_part(results.values, "forgetting", Forgetting),
            "routers": read_part(results.values, "routers", dict[str, RouterRow]),
            "statistics": read_part(results.values, "statistics", Statistics),
        }
        texts = read_part(results.values, "texts", dict[str, TextSet]) or {}
    except ValueError as error:
        raise results.error(str(error)) from None
    if None in found.values():
        missing.append("evaluation/results.json: forgetting, router quality and intervals; evaluate again for them")
    return found | {"routers": found["routers"] or {}, "texts": texts}


class _Reader:
    """A JSON object of one file; every complaint names the file and the place in it."""

    def __init__(self, path: Path, values: Mapping[str, Any] | None = None, place: str = "") -> None:
        self.path, self.place = path, place
        self.values: Mapping[str, Any] = _read_object(path) if values is None else values

    def error(self, problem: str) -> StageError:
        return StageError(f"{self.path}: {problem}; {_way_out(self.path)}")

    def _get(self, key: str, kind: type | tuple[type, ...], what: str, optional: bool) -> Any:
        value = self.values.get(key)
        if value is None and optional:
            return None
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            shown = "is missing" if value is None else f"is {type(value).__name__}, expected {what}"
            raise self.error(f"`{self.place}{key}` {shown}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, str, "a string", default is not None)
        return default if value is None and default is not None else str(value)

    def count(self, key: str) -> int | None:
        value = self._get(key, (int, float), "a number", True)
        if value is None:
            return None
        if not math.isfinite(value):
            raise self.error(f"`{self.place}{key}` is {value}, expected a finite number")
        return int(value)

    def flag(self, key: str) -> bool | None:
        value = self._get(key, bool, "true or false", True)
        return None if value is None else bool(value)

    def array(self, key: str, optional: bool = False) -> list[Any]:
        return list(self._get(key, list, "a list", optional) or [])

    def rows(self, key: str, optional: bool = False) -> list[_Reader]:
        return [self._child(f"{key}[{number}]", value) for number, value in enumerate(self.array(key, optional))]

    def mapping(self, key: str, optional: bool = False) -> _Reader:
        return self._child(key, self._get(key, dict, "an object", optional) or {})

    def mappings(self, key: str, optional: bool = False) -> dict[str, _Reader]:
        return {name: self._child(f"{key}.{name}", value) for name, value in self.mapping(key, optional).values.items()}

    def _child(self, place: str, value: Any) -> _Reader:
        if not isinstance(value, dict):
            raise self.error(f"`{self.place}{place}` is {type(value).__name__}, expected an object")
        return _Reader(self.path, value, f"{self.place}{place}.")


def _way_out(path: Path) -> str:
    """How a file of the run directory is made again: it lies in a stage's folder, or beside them."""
    if path.parent.name in _STAGE_FOLDERS:
        return f"make it again: megaxelm run RECIPE --only {path.parent.name}"
    return "remove it and make it again: megaxelm run RECIPE"


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise StageError(f"{path}: not UTF-8 ({error}); {_way_out(path)}") from None
    except OSError as error:
        raise StageError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise StageError(f"{path}: not valid JSON ({error}); {_way_out(path)}") from None
    if not isinstance(value, dict):
        raise StageError(f"{path}: holds {type(value).__name__}, expected an object; {_way_out(path)}")
    return value


def _load_text(path: Path, what: str, missing: list[str]) -> str | None:
    if not path.is_file():
        missing.append(f"{path.name}: {what} is not shown")
        return None
    return _read_text(path)


def _optional(run_folder: Path, name: str, lacking: str, missing: list[str]) -> _Reader | None:
    path = run_folder / name
    if not path.is_file():
        missing.append(f"{name}: {lacking}")
        return None
    return _Reader(path)


def _number(value: Any) -> float:
    """A score; null and texts such as "NaN" count as not known."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _model_rank(key: str) -> tuple[int, str]:
    if key in _MODEL_ORDER:
        return _MODEL_ORDER.index(key), ""
    return (len(_MODEL_ORDER) + (key == "worst"), key)


def _language(row: _Reader) -> Language:
    return Language(row.text("code"), row.text("own", ""), row.count("documents") or 0, row.count("bytes") or 0, row.count("tokens") or 0)


def _model(key: str, row: _Reader, codes: list[str]) -> Model:
    scores = row.mappings("languages")
    bits = {code: _number(scores[code].values.get("bits_per_byte")) if code in scores else math.nan for code in codes}
    perplexity = {code: _number(scores[code].values.get("perplexity")) if code in scores else math.nan for code in codes}
    known = {code: value for code, value in bits.items() if math.isfinite(value)}
    mean = _number(row.values.get("mean_bits_per_byte"))
    worst = max(known, key=lambda code: known[code]) if known else ""
    return Model(
        key=key,
        label=row.text("label", key),
        bits=bits,
        perplexity=perplexity,
        mean=sum(known.values()) / len(known) if known and not math.isfinite(mean) else mean,
        worst_language=row.text("worst_language", worst),
        worst_bits=known.get(row.text("worst_language", worst), math.nan),
    )


def _load_account(run_folder: Path, results: _Reader, missing: list[str]) -> Account | None:
    path = run_folder / "account.json"
    row = _Reader(path) if path.is_file() else results.mapping("account", optional=True)
    if not row.values:
        missing.append("account.json: whether dense model and experts got equal tokens is not known")
        return None
    experts = row.mapping("expert_tokens", optional=True)
    return Account(
        seed=row.count("seed_tokens"),
        dense=row.count("dense_tokens"),
        experts={name: experts.count(name) or 0 for name in experts.values},
        experts_total=row.count("experts_total"),
        equal=row.flag("equal"),
    )


def _load_members(run_folder: Path, missing: list[str]) -> dict[str, Member]:
    reader = _optional(run_folder, "lineage.json", "who branched from whom is not shown", missing)
    if reader is None:
        return {}
    members = {}
    for name, row in reader.mappings("experts").items():
        members[name] = Member(
            name=name,
            parent=row.text("parent", "") or None,
            kind=row.text("kind", "expert"),
            languages=_plain(row.values.get("languages") or "all"),
            tokens=row.count("tokens"),
            steps=row.count("steps"),
            weights=row.text("weights", "") or None,
            round=row.count("round"),
            tokens_seen=row.count("tokens_seen"),
            folder=row.text("folder", f"experts/{name}"),
        )
    return members


def _load_curves(run_folder: Path, members: dict[str, Member], known: list[str], missing: list[str]) -> dict[str, Curve]:
    found = {path.parent.name: path for path in sorted((run_folder / "experts").glob("*/metrics.jsonl"))}
    elsewhere = {name: run_folder / member.folder / "metrics.jsonl" for name, member in members.items()}
    found |= {name: path for name, path in elsewhere.items() if path.is_file()}
    order = [name for name in dict.fromkeys(known) if name in found] + [name for name in found if name not in known]
    curves = {}
    for name in order:
        curve = _curve(found[name])
        if curve.skipped_lines:
            missing.append(
                f"{found[name].relative_to(run_folder)}: {curve.skipped_lines} unreadable line(s), left by a killed training, are not drawn"
            )
        if curve.steps:
            curves[name] = curve
    without = [name for name in dict.fromkeys(known) if name not in curves]
    if not curves:
        missing.append("experts/*/metrics.jsonl: there are no training curves")
    elif without:
        missing.append(f"experts/*/metrics.jsonl: no training curve of {', '.join(without)}")
    return curves


def _curve(path: Path) -> Curve:
    """Read one metrics file. A resumed training writes some steps twice: the later line wins."""
    by_step: dict[int, dict[str, Any]] = {}
    skipped = 0
    lines = [line for line in _read_text(path).split("\n") if line.strip()]
    for line in lines:
        try:
            row = json.loads(line)
            if row["loss"] is None:
                continue  # all its steps were skipped: there is nothing to draw
            step, _tokens, _loss = int(row["step"]), float(row["tokens"]), float(row["loss"])
        except (ValueError, TypeError, KeyError):
            # A training killed while it wrote leaves half a line, and its successor appends to the file.
            skipped += 1
            continue
        by_step[step] = row
    if lines and not by_step:
        raise StageError(
            f"{path}: not one of its {len(lines)} lines is JSON with step, tokens and loss; remove the file to do without the curve"
        )
    rows = [by_step[step] for step in sorted(by_step)]
    tokens = [float(row["tokens"]) for row in rows]
    speeds = [_number(row.get("tokens_per_second")) for row in rows]
    # The `seconds` of a line start anew with each process, so time is summed from the speeds.
    spans = [(now - before, speed) for before, now, speed in zip([0.0, *tokens], tokens, speeds, strict=False) if speed > 0]
    known = [speed for speed in speeds if math.isfinite(speed)]
    return Curve(
        steps=[int(row["step"]) for row in rows],
        tokens=tokens,
        loss=[float(row["loss"]) for row in rows],
        tokens_per_second=statistics.median(known) if known else None,
        seconds=sum(span / speed for span, speed in spans) if spans else None,
        skipped_lines=skipped,
    )


def _load_clusters(run_folder: Path, missing: list[str]) -> Clusters | None:
    reader = _optional(run_folder, "clusters/report.json", "how the corpus was divided is not shown", missing)
    if reader is None:
        return None
    clusters = []
    for row in reader.rows("clusters"):
        sizes = {code: (size.count("bytes") or 0) for code, size in row.mappings("languages", optional=True).items()}
        clusters.append(Cluster(row.text("name"), sizes, bool(row.flag("forced"))))
    languages = [str(code) for code in reader.array("languages", optional=True)]
    rows = reader.array("linkage", optional=True)
    linkage = None
    if rows:
        if any(not isinstance(row, list) or len(row) != 4 for row in rows) or len(rows) != len(languages) - 1:
            raise reader.error(
                f"`linkage` has {len(rows)} rows; expected {len(languages) - 1} rows of 4 numbers for {len(languages)} languages"
            )
        linkage = [[float(_number(value)) for value in row] for row in rows]
        if not all(math.isfinite(value) for row in linkage for value in row):
            raise reader.error("`linkage` holds something that is not a finite number")
    reason = reader.text("language_distances_reason", "the clusters' report has none")
    notes = [str(note) for note in reader.array("notes", optional=True)]
    return Clusters(reader.text("partitioner", ""), reader.text("method", ""), clusters, languages, linkage, reason, notes)


def _load_index_tokens(run_folder: Path, missing: list[str]) -> dict[str, int]:
    reader = _optional(run_folder, "index/manifest.json", "tokens by language are not shown", missing)
    totals: dict[str, int] = {}
    for cluster in (reader.mappings("clusters") if reader else {}).values():
        for code in cluster.values:
            totals[code] = totals.get(code, 0) + (cluster.mapping(code).count("tokens") or 0)
    return totals


def _load_corpus(
    run_folder: Path, index_tokens: dict[str, int], evaluated: list[str], missing: list[str]
) -> tuple[list[CorpusLanguage], dict[str, list[dict[str, str]]]]:
    reader = _optional(run_folder, "corpus/manifest.json", "bytes of the corpus and its sources are not shown", missing)
    rows = reader.mappings("languages") if reader else {}
    codes = list(dict.fromkeys([*rows, *index_tokens, *(evaluated if rows or index_tokens else [])]))
    corpus = []
    for code in codes:
        counts = {key: rows[code].count(key) if code in rows else None for key in _CORPUS_KEYS}
        corpus.append(CorpusLanguage(code=code, tokens=index_tokens.get(code), **counts))
    given = reader.values.get("sources") if reader else None
    groups = given if isinstance(given, dict) else {"train": given}
    sources = {name: [_source(item) for item in items] for name, items in groups.items() if isinstance(items, list) and items}
    return corpus, sources


def _source(value: Any) -> dict[str, str]:
    """One source of text as words for a table row; whatever keys it has."""
    if not isinstance(value, dict):
        return {"name": str(value)}
    renamed: dict[str, str] = {"license": "licence"}
    return {renamed.get(str(key), str(key)): _plain(_first(item)) for key, item in value.items() if item not in (None, "", [], {})}


def _first(value: Any) -> Any:
    """A corpus may have thousands of files: the first few and the number of the rest will do."""
    if isinstance(value, list) and len(value) > 2 * _NAMES_SHOWN:
        return [*value[:_NAMES_SHOWN], f"and {len(value) - _NAMES_SHOWN:,} more"]
    return value


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_plain(item)}" for key, item in value.items())
    return str(value)
