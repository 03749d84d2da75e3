"""`docs/recipe.md`: the reference of all fields, made from the schema's docstrings."""

from __future__ import annotations

import typing
from typing import Any, Literal

import yaml

from megaxelm.recipe.corpus import CatalogSource, CorpusConfig, FileSource, HuggingFaceSource, Source
from megaxelm.recipe.rounds import RoundConfig
from megaxelm.recipe.schema import Recipe
from megaxelm.recipe.section import Section


def recipe_docs() -> str:
    """`docs/recipe.md`: every field with type, default and meaning, made from the docstrings."""
    lines = [
        "# Recipe reference",
        "",
        "Made by `megaxelm recipe docs` from the docstrings in `megaxelm/recipe/`; do not edit. A field marked *no effect on",
        "results* can change without anything being made again. Any field can be set on the command line: `--set section.field=value`.",
        "",
    ]
    for title, section in _sections(Recipe, "recipe"):
        lines += [
            f"## `{title}`",
            "",
            (section.__doc__ or "").strip().splitlines()[0],
            "",
            "| field | type | default | meaning |",
            "|---|---|---|---|",
        ]
        for name, field in section.model_fields.items():
            extra = field.json_schema_extra
            free = isinstance(extra, dict) and extra.get("affects_result") is False
            meaning = (field.description or "").replace("\n", " ").replace("|", "\\|") + (" *No effect on results.*" if free else "")
            lines.append(f"| `{name}` | {_type_name(field.annotation)} | {_default_name(field)} | {meaning} |")
        lines.append("")
    return "\n".join(lines)


def _sections(section: type[Section], title: str) -> list[tuple[str, type[Section]]]:
    found: list[tuple[str, type[Section]]] = [(title, section)]
    prefix = "" if title == "recipe" else f"{title}."
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found += _sections(field.annotation, f"{prefix}{name}")
        elif name == "train" and section is CorpusConfig:
            kinds: list[type[Section]] = [FileSource, HuggingFaceSource, CatalogSource]
            found += [(f"corpus.train[]: {next(iter(kind.model_fields))}", kind) for kind in kinds]
        elif field.annotation == list[RoundConfig]:
            found.append((f"{name}[]", RoundConfig))
    return found


def _type_name(annotation: Any) -> str:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    if typing.get_origin(annotation) is Literal:
        return " \\| ".join(f"`{value}`" for value in typing.get_args(annotation))
    if isinstance(annotation, type) and typing.get_origin(annotation) is None:
        return annotation.__name__
    if annotation == list[Source]:
        return "list of sources"
    if annotation == list[RoundConfig]:
        return "list of rounds"
    inner = [_type_name(item) for item in typing.get_args(annotation)]
    if typing.get_origin(annotation) is list:
        return f"list of {inner[0]}"
    if typing.get_origin(annotation) is dict:
        return f"mapping of {inner[0]} to {inner[1]}"
    return " \\| ".join("null" if name == "NoneType" else name for name in inner)


def _default_name(field: Any) -> str:
    if field.is_required():
        return "required"
    if isinstance(field.default, Section):
        return ""
    return f"`{yaml.safe_dump(field.default, default_flow_style=True).removesuffix('...' + chr(10)).strip()}`"
