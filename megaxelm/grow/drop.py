"""`megaxelm drop`: languages and experts that leave ensemble, routers and evaluation, and come back with `--undo`. No file is removed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from megaxelm.errors import GrowError, MegaxelmError
from megaxelm.growth import FOLDER, Growth, export_folder, grown_folder, held_clusters, index_clusters, read_growth, write_growth
from megaxelm.recipe import Recipe
from megaxelm.run import RunFolder

Say = Callable[[str], None]


def drop(
    folder: RunFolder,
    recipe: Recipe,
    languages: Sequence[str] = (),
    experts: Sequence[str] = (),
    undo: bool = False,
    say: Say = lambda text: print(text, flush=True),
) -> bool:
    """Drop languages or experts, or bring them back, and make ensemble, evaluation and report again.

    An expert all of whose languages are dropped is dropped with them; one that keeps others stays, and with it what it learned of the
    dropped language. An expert that is dropped takes along the languages that no other expert holds.

    Returns:
        Whether anything changed.

    Raises:
        GrowError: an unknown name, something that is dropped already (or, with `undo`, is not), or nothing would be left.
    """
    from megaxelm.stages import Stages

    if bool(languages) == bool(experts):
        raise GrowError("give --languages or --experts, one of them, e.g. --languages az")
    with folder.lock(FOLDER):
        old = read_growth(folder.path)
        texts = _texts(folder)
        new, lines = (_undo if undo else _drop)(old, texts, _held(folder, old), languages, experts)
        if new == old:
            say("nothing changes")
            return False
        write_growth(folder.path, new)
        try:
            for line in lines:
                say(line)
            Stages(folder, recipe, say, check_sources=False).make_one("ensemble")
        except MegaxelmError:
            # What the recipe asks of the ensemble does not go with it: nothing is dropped then.
            write_growth(folder.path, old)
            raise
    if not undo:
        say(_how_to_undo(folder, old, new, languages, experts))
    for stage in ("evaluation", "report"):
        Stages(folder, recipe, say, check_sources=False).make_one(stage)
    return True


def _texts(folder: RunFolder) -> dict[str, list[str]]:
    """Every model that can be dropped -> languages that it stands for by its text."""
    growth = read_growth(folder.path)
    found = {name: list(text) for name, text in index_clusters(folder.path).items()}
    return found | {item.name: list(item.languages) for item in growth.grown}


def _held(folder: RunFolder, growth: Growth) -> dict[str, list[str]]:
    """Expert of the ensemble -> languages that it holds and that are not dropped."""
    return {name: list(text) for name, text in held_clusters(folder.path, growth).items()}


def _drop(
    old: Growth, texts: Mapping[str, list[str]], held: Mapping[str, list[str]], languages: Sequence[str], experts: Sequence[str]
) -> tuple[Growth, list[str]]:
    _check_names(old, texts, held, languages, experts)
    gone = set(languages)
    out = [name for name in experts]
    if languages:
        out += [name for name, codes in held.items() if codes and not set(codes) - gone]
    kept = {name: codes for name, codes in held.items() if name not in out}
    for name in experts:
        gone |= {code for code in held.get(name, []) if not any(code in codes for codes in kept.values())}
    if not kept:
        raise GrowError(f"nothing would be left: {', '.join(out)} would be the last to go; keep at least one expert")
    lines = []
    for name, codes in kept.items():
        still = sorted(gone & set(codes))
        if still:
            lines.append(
                f"{', '.join(still)}: the expert `{name}` stays for {', '.join(code for code in codes if code not in gone)}, so what it "
                f"learned of {', '.join(still)} is still in its weights; the language leaves the router and the evaluation alone"
            )
    lines += [f"`{name}` leaves ensemble, routers and evaluation" for name in out]
    new = Growth(old.grown, _joined(old.dropped_languages, sorted(gone)), _joined(old.dropped_experts, out))
    return new, lines


def _undo(
    old: Growth, texts: Mapping[str, list[str]], held: Mapping[str, list[str]], languages: Sequence[str], experts: Sequence[str]
) -> tuple[Growth, list[str]]:
    for name, dropped in (("language", old.dropped_languages), ("expert", old.dropped_experts)):
        unknown = [item for item in (languages if name == "language" else experts) if item not in dropped]
        if unknown:
            raise GrowError(f"--undo: the {name} {', '.join(unknown)} is not dropped; dropped are {', '.join(dropped) or 'none'}")
    back = _joined(experts, [name for code in languages for name in _who_left_with(code, old, texts)])
    grown = [item for item in old.grown if item.kind == "expert" and item.name in back]
    holders = {code: name for name, codes in held.items() for code in codes}
    for item in grown:
        taken = sorted({holders[code] for code in item.languages if code in holders})
        if taken:
            raise GrowError(f"--undo: `{item.name}` cannot come back: its languages are held by {', '.join(taken)} now; drop that first")
        holders |= dict.fromkeys(item.languages, item.name)
    comparisons = {item.name for item in old.grown if item.kind == "lapt"}
    codes = {code for name in experts if name not in comparisons for code in texts[name]} | set(languages)
    new = Growth(
        old.grown,
        tuple(code for code in old.dropped_languages if code not in codes),
        tuple(name for name in old.dropped_experts if name not in back),
    )
    for item in grown:
        new = new.handed_over(item.name, item.languages)
    return new, [f"`{name}` is back" for name in back] + [f"{code} is back" for code in old.dropped_languages if code in codes]


def _who_left_with(code: str, old: Growth, texts: Mapping[str, list[str]]) -> list[str]:
    """The experts that come back with a dropped language: the grown one that held it last, or else the run's own with its text.

    Where the grown one stayed for other languages nobody does. Comparisons leave by name alone, so they come back by name alone.
    """
    grown = [item.name for item in old.grown if item.kind == "expert" and code in item.languages]
    if any(name not in old.dropped_experts for name in grown):
        return []
    if grown:
        return [max(grown, key=old.dropped_experts.index)]
    return [name for name in old.dropped_experts if old.find(name) is None and code in texts.get(name, [])]


def _check_names(
    old: Growth, texts: Mapping[str, list[str]], held: Mapping[str, list[str]], languages: Sequence[str], experts: Sequence[str]
) -> None:
    known = sorted({code for codes in held.values() for code in codes})
    for code in languages:
        if code in old.dropped_languages:
            raise GrowError(f"--languages {code}: dropped already; --undo brings it back")
        if code not in known:
            raise GrowError(f"--languages {code}: no expert holds it; the languages of this run are {', '.join(known)}")
    for name in experts:
        if name in old.dropped_experts:
            raise GrowError(f"--experts {name}: dropped already; --undo brings it back")
        if name not in texts:
            raise GrowError(f"--experts {name}: this run has {', '.join(item for item in texts if item not in old.dropped_experts)}")


def _joined(first: Sequence[str], second: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys([*first, *second]))


def _how_to_undo(folder: RunFolder, old: Growth, new: Growth, languages: Sequence[str], experts: Sequence[str]) -> str:
    which = f"--languages {','.join(languages)}" if languages else f"--experts {','.join(experts)}"
    kept = [
        str(grown_folder(folder.path, name) if old.find(name) else export_folder(folder.path, name, old).parent)
        for name in new.dropped_experts
        if name not in old.dropped_experts
    ]
    files = f" (its files stay in {', '.join(kept)})" if kept else ""
    return f"to get it back{files}: megaxelm drop {folder.path} {which} --undo"
