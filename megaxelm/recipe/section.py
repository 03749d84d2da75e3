"""The base of every part of the recipe, and which of its fields a result depends on."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from pydantic.config import JsonDict

NO_EFFECT: JsonDict = {"affects_result": False}
Schedule = Literal["linear", "cosine", "constant", "wsd"]


class Section(BaseModel):
    """Base of every part of the recipe: strict about names, documented by the text under each field."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True, frozen=True, allow_inf_nan=False)


def result_settings(section: Section) -> dict[str, Any]:
    """The fields of a section that what is made depends on: those not marked `affects_result=False`, nested."""
    settings: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("affects_result") is False:
            continue
        value = getattr(section, name)
        settings[name] = result_settings(value) if isinstance(value, Section) else section.model_dump(mode="json", include={name})[name]
    return settings
