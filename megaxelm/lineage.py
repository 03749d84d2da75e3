"""The lineage of a run, `lineage.json`: who branched from whom, on what, and with which weights; and what was done to the run since.

    {"experts": {name: {"parent", "kind", "round", "languages", "data", "tokens", "tokens_seen", "steps", "weights", "parent_weights",
                        "folder"}},
     "history": [{"what", "when", "before", "after", "new", "changed", "gone"}]}

`kind` is seed, dense, expert, grown (added by `megaxelm grow`) or lapt (a comparison, never in the ensemble). `round` is 0 for the seed and
one more with each branch. `data` is a fingerprint of the text that it was trained on. `tokens` are its own, `tokens_seen` also those of its
ancestors. `weights` is the hash of its export, `parent_weights` that of its parent's when it branched; null where that is not known. An
expert that was left out of the ensemble later also has `dropped`: true.

The experts follow from the markers of their folders and can be written anew at any time. The history cannot: each event holds the hashes of
all exports before and after, which is the proof that growing a run touched nothing that was there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from megaxelm.errors import ModelError, StageError
from megaxelm.files import hash_value, is_model_folder, read_json, write_if_changed, write_json
from megaxelm.growth import read_growth
from megaxelm.run import RunFolder

if TYPE_CHECKING:
    from rich.tree import Tree

    from megaxelm.train.members import Member

LINEAGE = "lineage.json"
Entry = dict[str, Any]


def lineage_entries(run: RunFolder, members: Mapping[str, Member], languages_of: Callable[[Member], list[str] | None]) -> dict[str, Entry]:
    """Every trained model by its name, parents before children; the grown ones last.

    Args:
        languages_of: languages that a member trains on, None where its clusters cut through languages.

    Raises:
        StageError: a damaged marker, or a damaged lineage.json.
    """
    known = _read(run.path)["experts"]
    entries: dict[str, Entry] = {}
    for name, member in members.items():
        marker = run.marker(f"experts/{name}")
        if marker is None:
            continue
        trained = marker["settings"].get("member", {})
        parent = trained.get("parent", member.parent)
        branched = known.get(name, {}).get("parent_weights") if known.get(name, {}).get("weights") == marker["weights"] else None
        entries[name] = {
            "parent": parent,
            "kind": member.kind,
            "round": trained.get("round", min(member.round, 1)),
            "languages": marker["settings"].get("languages") or languages_of(member) or "by document",
            "data": _data(marker) if trained else None,
            **_size(trained),
            "weights": marker["weights"],
            "parent_weights": None if parent is None else branched or _parent_weights(run, marker, parent),
            "folder": f"experts/{name}",
        }
    growth = read_growth(run.path).to_json()
    for grown in growth["grown"]:
        entry = _grown_entry(run, grown, entries)
        if entry is not None:
            entries[grown["name"]] = entry
    for name in growth["dropped"]["experts"]:
        if name in entries:
            entries[name]["dropped"] = True
    for name, entry in entries.items():
        line = _line(entries, members, name)
        entry["tokens_seen"] = sum(entries[at]["tokens"] if at in entries else members[at].tokens for at in line)
    return entries


def write_lineage(run: RunFolder, entries: Mapping[str, Entry]) -> None:
    """Write the experts of lineage.json where they would change; the history stays as it is."""
    write_if_changed(run.path / LINEAGE, {"experts": dict(entries), "history": _read(run.path)["history"]})


def read_history(run_folder: Path) -> list[dict[str, Any]]:
    """The events of a run, oldest first; none where nothing was recorded.

    Raises:
        StageError: lineage.json is damaged.
    """
    return list(_read(run_folder)["history"])


def record_event(run_folder: Path, what: str, before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, Any]:
    """Add an event to the history of a run, with the hashes of all exports before and after it.

    Args:
        what: the event in words, e.g. "grow az from tr". before, after: hashes (`model.hub.weights_hash`) by name.

    Returns:
        The event; `changed` names the models whose weights are not what they were, and is empty when nothing was touched.
    """
    event: dict[str, Any] = {
        "what": what,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "before": dict(before),
        "after": dict(after),
        "new": sorted(after.keys() - before.keys()),
        "changed": sorted(name for name in before.keys() & after.keys() if before[name] != after[name]),
        "gone": sorted(before.keys() - after.keys()),
    }
    record = _read(run_folder)
    write_json(run_folder / LINEAGE, record | {"history": [*record["history"], event]})
    return event


def check_lineage(run_folder: Path, entries: Mapping[str, Entry]) -> dict[str, str]:
    """Hash the weights of every export anew and compare them with the record. Returns what is wrong, in words, by name.

    Args:
        entries: of the run as its markers have it now; what only lineage.json knows is looked for too.
    """
    from megaxelm.model.hub import weights_hash

    recorded = _read(run_folder)["experts"] | dict(entries)
    wrong: dict[str, str] = {}
    for name, folder in _with_bar({name: run_folder / entry["folder"] / "export" for name, entry in recorded.items()}):
        entry = recorded[name]
        if not is_model_folder(folder):
            wrong[name] = f"its export is missing ({folder})"
            continue
        try:
            found = weights_hash(folder)
        except ModelError as error:
            wrong[name] = str(error)
            continue
        if found != entry["weights"]:
            wrong[name] = f"its weights are {found[:10]}, and those that were trained {entry['weights'][:10]} ({folder})"
    for name, entry in recorded.items():
        parent = recorded.get(entry["parent"])
        branched = entry.get("parent_weights")
        if name not in wrong and parent is not None and branched is not None and branched != parent["weights"]:
            wrong[name] = f"it branched from weights {branched[:10]} of {entry['parent']}, whose weights are {parent['weights'][:10]} now"
    return wrong


def lineage_tree(title: str, entries: Mapping[str, Entry]) -> Tree:
    """The lineage as a tree for the console."""
    from rich.markup import escape
    from rich.tree import Tree

    tree = Tree(escape(title), guide_style="dim")
    nodes: dict[str, Tree] = {}
    # Parents before children, whatever the order of the entries; a parent that is not there makes a root.
    waiting = dict(entries)
    while waiting:
        ready = [name for name, entry in waiting.items() if entry["parent"] not in waiting or entry["parent"] == name]
        for name in ready or list(waiting):
            entry = waiting.pop(name)
            under = nodes.get(entry["parent"], tree)
            lost = "" if entry["parent"] in nodes or entry["parent"] is None else f"; its parent {entry['parent']} is not in this run"
            nodes[name] = under.add(f"[bold]{escape(name)}[/bold]  {escape(_words(name, entry) + lost)}", highlight=False)
    return tree


def _words(name: str, entry: Entry) -> str:
    languages = entry["languages"] if isinstance(entry["languages"], str) else " ".join(entry["languages"])
    kind = "" if entry["kind"] == name else f"{entry['kind']}, "
    tokens = f"{entry['tokens']:,} tokens" + (f", {entry['tokens_seen']:,} seen" if entry["tokens_seen"] != entry["tokens"] else "")
    return (
        f"{kind}round {entry['round']}; {languages}; {tokens}; weights {entry['weights'][:10]}{'; dropped' if entry.get('dropped') else ''}"
    )


def _read(run_folder: Path) -> dict[str, Any]:
    path = run_folder / LINEAGE
    if not path.exists():
        return {"experts": {}, "history": []}
    try:
        record = read_json(path, experts=dict)
    except StageError as error:
        raise StageError(f"{str(error).split(';')[0]}; mend it, or remove it and lose the history of the run in it") from None
    return record | {"history": record.get("history", [])}


def _grown_entry(run: RunFolder, grown: Mapping[str, Any], entries: Mapping[str, Entry]) -> Entry | None:
    """A grown expert lies in a run of its own, whose seed is the donor."""
    name = grown["name"]
    marker = RunFolder(run.path / "grown" / name).marker(f"experts/{name}")
    if marker is None:
        return None
    parent = entries.get(grown["donor"])
    return {
        "parent": grown["donor"],
        "kind": "lapt" if grown.get("kind") == "lapt" else "grown",
        "round": 1 + (parent["round"] if parent else 0),
        "languages": list(grown["languages"]),
        "data": _data(marker),
        **_size(marker["settings"].get("member", {})),
        "weights": marker["weights"],
        "parent_weights": grown["donor_weights"],
        "folder": f"grown/{name}/experts/{name}",
    }


def _size(trained: Mapping[str, Any]) -> dict[str, int]:
    """Tokens and steps of a training, from its marker; a loaded seed has none."""
    steps, sequences, length = (int(trained.get(key, 0)) for key in ("steps", "batch_sequences", "sequence_length"))
    return {"tokens": steps * sequences * length, "tokens_seen": 0, "steps": steps}


def _data(marker: Mapping[str, Any]) -> str:
    """Fingerprint of what a model was trained on: the token index, or corpus, tokenizer and languages."""
    inputs = {unit: value for unit, value in marker["inputs"].items() if not unit.startswith("experts/")}
    return hash_value([inputs, marker["settings"].get("languages")])


def _parent_weights(run: RunFolder, marker: Mapping[str, Any], parent: str) -> str | None:
    """The hash of the parent's weights when this model branched, if the parent is still what it was."""
    found = run.marker(f"experts/{parent}")
    if found is None or hash_value([found["fingerprint"], found["weights"]]) != marker["inputs"].get(f"experts/{parent}"):
        return None
    return str(found["weights"])


def _line(entries: Mapping[str, Entry], members: Mapping[str, Member], name: str) -> list[str]:
    """A model and its ancestors, as far as they are known."""
    line: list[str] = []
    at: str | None = name
    while at is not None and at not in line and (at in entries or at in members):
        line.append(at)
        at = entries[at]["parent"] if at in entries else members[at].parent
    return line


def _with_bar(folders: Mapping[str, Path]) -> Iterator[tuple[str, Path]]:
    with tqdm(folders.items(), desc="hashing weights", unit="model", file=sys.stderr, disable=None) as bar:
        yield from bar
