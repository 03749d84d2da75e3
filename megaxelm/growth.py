"""What was grown and dropped in a run: `growth.json`, and where the parts of a grown expert lie.

    growth.json          {"grown": [{"name", "languages", "donor", "kind", "donor_weights"}], "dropped": {"languages", "experts"}}
    grown/<expert>/      a run directory of its own; its model is grown/<expert>/experts/<expert>/export

A grown expert stands in this file once it is trained. Every part of the program may read the file, so nothing but files and errors is
imported here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from megaxelm.errors import StageError
from megaxelm.files import hash_value, read_json, write_json

FILE = "growth.json"
FOLDER = "grown"
Kind = Literal["expert", "lapt"]
_WAY_OUT = "put back a copy of it, or remove it and grow the languages again (what is trained stays): megaxelm grow"

Clusters = dict[str, dict[str, dict[str, int]]]
"""Expert -> language -> counts of its training text (`documents`, `tokens`, `bytes`)."""


@dataclass(frozen=True)
class Grown:
    """One model that was grown. `kind` lapt: a comparison, never in the ensemble."""

    name: str
    languages: tuple[str, ...]
    """Those it was grown for and that no other expert of the ensemble was grown for since."""
    donor: str
    """Name of the model that it branched from."""
    kind: Kind
    donor_weights: str
    """Hash of the donor's weights when it branched."""


@dataclass(frozen=True)
class Growth:
    """All that was grown, in order, and all that is left out of ensemble and evaluation."""

    grown: tuple[Grown, ...] = ()
    dropped_languages: tuple[str, ...] = ()
    dropped_experts: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """Names of everything that was grown."""
        return [item.name for item in self.grown]

    @property
    def experts(self) -> list[Grown]:
        """The grown experts of the ensemble, in the order of growing."""
        return [item for item in self.grown if item.kind == "expert" and item.name not in self.dropped_experts]

    @property
    def comparisons(self) -> list[Grown]:
        """The models of kind lapt that are evaluated: those with a language that is not dropped."""
        return [
            item
            for item in self.grown
            if item.kind == "lapt" and item.name not in self.dropped_experts and set(item.languages) - set(self.dropped_languages)
        ]

    def find(self, name: str) -> Grown | None:
        """What was grown under a name, or None."""
        return next((item for item in self.grown if item.name == name), None)

    def kept(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that are not dropped."""
        return [name for name in names if name not in self.dropped_experts]

    def handed_over(self, name: str, languages: Iterable[str]) -> Growth:
        """The same where, of the experts of the ensemble, `name` alone stands for `languages`: each language has one grown expert."""
        taken = set(languages)

        def left(item: Grown) -> Grown:
            if item.name == name or item not in self.experts or not taken & set(item.languages):
                return item
            return replace(item, languages=tuple(code for code in item.languages if code not in taken))

        return replace(self, grown=tuple(left(item) for item in self.grown))

    def settings(self) -> dict[str, Any]:
        """For the marker of what is made from it; empty for a run that never grew."""
        found: dict[str, Any] = {}
        if self.experts:
            found["grown"] = [[item.name, *item.languages] for item in self.experts]
        if self.dropped_languages or self.dropped_experts:
            found["dropped"] = {"languages": list(self.dropped_languages), "experts": list(self.dropped_experts)}
        return found

    def to_json(self) -> dict[str, Any]:
        grown = [asdict(item) | {"languages": list(item.languages)} for item in self.grown]
        return {"grown": grown, "dropped": {"languages": list(self.dropped_languages), "experts": list(self.dropped_experts)}}


def read_growth(run_folder: Path) -> Growth:
    """What was grown and dropped in a run; empty where there is no `growth.json`.

    Raises:
        StageError: the file is damaged.
    """
    path = run_folder / FILE
    if not path.exists():
        return Growth()
    value = read_json(path, grown=list, dropped=dict)
    try:
        grown = tuple(
            Grown(_text(item["name"]), _texts(item["languages"]), _text(item["donor"]), _kind(item["kind"]), _text(item["donor_weights"]))
            for item in value["grown"]
        )
        return Growth(grown, _texts(value["dropped"]["languages"]), _texts(value["dropped"]["experts"]))
    except (KeyError, TypeError, ValueError) as error:
        raise StageError(f"{path}: damaged ({type(error).__name__}: {error}); {_WAY_OUT} {run_folder}") from None


def write_growth(run_folder: Path, growth: Growth) -> None:
    """Write `growth.json`; for an empty one, remove it."""
    if growth == Growth():
        (run_folder / FILE).unlink(missing_ok=True)
    else:
        write_json(run_folder / FILE, growth.to_json())


def grown_folder(run_folder: Path, name: str) -> Path:
    """The run directory of something grown."""
    return run_folder / FOLDER / name


def export_folder(run_folder: Path, name: str, growth: Growth) -> Path:
    """The export of a model by its name: a grown one lies in its own run directory."""
    home = grown_folder(run_folder, name) if growth.find(name) else run_folder
    return home / "experts" / name / "export"


def grown_fingerprint(run_folder: Path, name: str) -> str:
    """What depends on a grown model depends on this: its training, its weights, and the text that its language is measured on.

    Raises:
        StageError: it is not finished.
    """
    folder = grown_folder(run_folder, name)
    trained, corpus = folder / "experts" / name / "stage.json", folder / "corpus" / "stage.json"
    if not (trained.is_file() and corpus.is_file()):
        raise StageError(f"{folder} is not finished; go on with it: megaxelm grow {run_folder} with the same languages and settings")
    model = read_json(trained, fingerprint=str, weights=str)
    return hash_value([model["fingerprint"], model["weights"], read_json(corpus, fingerprint=str)["fingerprint"]])


def index_clusters(run_folder: Path) -> Clusters:
    """Expert -> language -> counts in the token index of a run directory.

    Raises:
        StageError: there is no index.
    """
    found: Clusters = read_json(run_folder / "index" / "manifest.json", clusters=dict)["clusters"]
    return found


def held_clusters(run_folder: Path, growth: Growth) -> Clusters:
    """Expert -> language -> counts of the text it stands for, over the experts of the ensemble in order.

    A grown expert stands for the languages it was grown for, and nobody else then stands for them; for its replay text its donor does.
    """
    of_grown = {language for item in growth.experts for language in item.languages}
    gone = of_grown | set(growth.dropped_languages)
    own = index_clusters(run_folder)
    found = {name: {code: own[name][code] for code in own[name] if code not in gone} for name in growth.kept(own)}
    for item in growth.experts:
        text = index_clusters(grown_folder(run_folder, item.name))[item.name]
        found[item.name] = {code: text[code] for code in item.languages if code not in growth.dropped_languages}
    return found


def evaluated_languages(run_folder: Path, growth: Growth) -> dict[str, Path]:
    """Language -> folder with its held-out text `<language>.jsonl`, for every language that is evaluated, sorted."""
    of_grown = {code: grown_folder(run_folder, item.name) for item in growth.experts for code in item.languages}
    languages = {code for text in held_clusters(run_folder, growth).values() for code in text}
    return {code: of_grown.get(code, run_folder) / "corpus" / "valid" for code in sorted(languages)}


def language_owners(owners: Mapping[str, str], growth: Growth) -> dict[str, str]:
    """Language -> expert, where `owners` holds it for the run's own experts: without what is dropped, with what is grown behind."""
    found = {code: name for code, name in owners.items() if code not in growth.dropped_languages}
    found |= {code: item.name for item in growth.experts for code in item.languages if code not in growth.dropped_languages}
    return found


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no name")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{value!r} is no list of names")
    return tuple(_text(item) for item in value)


def _kind(value: Any) -> Kind:
    if value not in get_args(Kind):
        raise ValueError(f"kind = {value!r}")
    kind: Kind = value
    return kind
