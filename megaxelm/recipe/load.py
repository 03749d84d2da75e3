"""Recipes from YAML: dotted overrides, validation, and errors that name field, value, rule and way out."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megaxelm.errors import RecipeError
from megaxelm.recipe.corpus import SOURCE_KINDS, CatalogSource, FileSource, HuggingFaceSource
from megaxelm.recipe.schema import Recipe
from megaxelm.recipe.section import Section


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply dotted overrides such as `train.lr=2e-3`.

    Raises:
        RecipeError: missing file, broken YAML, unknown key, or a value out of range; all problems in one text.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"recipe {path}: no such file; recipes that come with the project lie in recipes/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path}: cannot be read as UTF-8 text ({error})") from None
    try:
        tree = yaml.load(text, Loader=_RecipeLoader)
    except (yaml.YAMLError, TypeError, RecursionError) as error:
        raise RecipeError(f"recipe {path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"recipe {path}: expected a mapping of sections (name, corpus, clusters, ...), found {type(tree).__name__}")
    return parse_recipe(override_tree(tree, overrides), str(path))


def override_tree(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Nested dictionaries of a recipe with dotted overrides such as `train.lr=2e-3` applied in place.

    Raises:
        RecipeError: an override that is no KEY=VALUE, or whose key leads through something that is no section.
    """
    for override in overrides:
        _apply_override(tree, override)
    return tree


def parse_recipe(tree: dict[str, Any], where: str = "recipe") -> Recipe:
    """Validate a recipe given as nested dictionaries.

    Raises:
        RecipeError: with one line for each problem.
    """
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(problem, tree) for problem in error.errors()]
        raise RecipeError(f"{where}:\n" + "\n".join(f"  {line}" for line in lines)) from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out; `load_recipe` reads it back to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


class _RecipeLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice and reads 1e-3 as a number (YAML 1.1 would make it text)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key `{key}` is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _install_resolvers() -> None:
    _RecipeLoader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
        list("-+0123456789."),
    )
    # `no` is a language (Norwegian) before it is a boolean: only true and false are booleans here.
    _RecipeLoader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in _RecipeLoader.yaml_implicit_resolvers.items()
    }
    _RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))


_install_resolvers()


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise RecipeError(f"--set {override}: expected KEY=VALUE with a dotted key, e.g. --set train.lr=2e-3")
    try:
        value = yaml.load(text, Loader=_RecipeLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override}: the value is not valid YAML: {error}") from None
    node: Any = tree
    for depth, part in enumerate(parts[:-1]):
        child = node.get(part)
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise RecipeError(f"--set {override}: `{'.'.join(parts[: depth + 1])}` is not a section, it is {child!r}")
        node = child
    node[parts[-1]] = value


def _explain(problem: Any, tree: dict[str, Any]) -> str:
    """One pydantic error as: field, value, rule, way out."""
    # Behind the number of a source pydantic puts the kind it took the source for, which is no key of the recipe.
    where = problem["loc"]
    location = [part for place, part in enumerate(where) if part not in SOURCE_KINDS or not isinstance(where[place - 1], int)]
    dotted = ".".join(str(part) for part in location) or "recipe"
    if problem["type"] == "extra_forbidden":
        known = _known_keys(problem["loc"][:-1])
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"known keys here: {', '.join(known)}"
        return f"{dotted}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"{dotted}: missing; every recipe needs it (see docs/recipe.md)"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return message
    value = problem.get("input")
    shown = repr(value) if not isinstance(value, dict | list) else type(value).__name__
    return f"{dotted} = {shown}: {message[0].lower()}{message[1:]}"


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    section: Any = Recipe
    for part in location:
        if isinstance(part, int):
            continue
        if part in SOURCE_KINDS:
            section = {"files": FileSource, "huggingface": HuggingFaceSource, "catalogs": CatalogSource}[str(part)]
            continue
        annotation = section.model_fields[part].annotation
        inner = [item for item in (annotation, *typing.get_args(annotation)) if isinstance(item, type) and issubclass(item, Section)]
        section = inner[0] if inner else section
    return list(section.model_fields)
