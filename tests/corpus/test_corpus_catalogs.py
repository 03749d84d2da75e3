"""Message catalogs of installed packages."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest
from reading import Report, read_source

from megaxelm.corpus.catalogs import catalog_sources, choose_locales, num_letters
from megaxelm.corpus.document import Document
from megaxelm.corpus.inputs import source_fingerprint
from megaxelm.errors import CorpusError
from megaxelm.recipe import CatalogSource, FieldNames

LANGUAGES = ["ar", "bg", "de", "el", "en", "es", "fr", "hi", "ja", "ko", "ru", "sw", "tr", "ur", "vi", "zh"]


def mo(messages: dict[str, str]) -> bytes:
    """A .mo file: header, two tables of (length, offset), strings."""
    pairs = sorted({"": "Content-Type: text/plain; charset=UTF-8\n", **messages}.items())
    strings = b""
    tables: list[list[int]] = [[], []]
    start = 28 + 16 * len(pairs)
    for side in (0, 1):
        for pair in pairs:
            data = pair[side].encode()
            tables[side] += [len(data), start + len(strings)]
            strings += data + b"\0"
    head = struct.pack("<7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, 0)
    return head + struct.pack(f"<{4 * len(pairs)}I", *tables[0], *tables[1]) + strings


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "catalog_fixture"
    catalogs = {
        "app/locale/sw": {"A message that is long enough to be kept": "Ujumbe ulio mrefu wa kutosha kubaki", "ctx\x04Too short": "Mfupi"},
        "app/locale/sw_KE": {"A message that is long enough to be kept": "Hii haisomwi kwa sababu ya lugha kuu"},
        "app/locale/hi": {
            "A message that is long enough to be kept": "यह संदेश रखने के लिए काफ़ी लंबा है",
            "Another one that nobody has translated yet": "Another one that nobody has translated yet",
        },
        "other/locale/sw": {"The same translation under another message": "Ujumbe  ulio mrefu\nwa kutosha kubaki"},
    }
    for name, messages in catalogs.items():
        path = folder / name / "LC_MESSAGES" / "django.mo"
        path.parent.mkdir(parents=True)
        path.write_bytes(mo(messages))
    (folder / "__init__.py").write_text("raise RuntimeError('catalogs are read without importing the package')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def read(*packages: str, share: float = 0.0, **kwargs: int) -> tuple[list[Document], Report]:
    return read_source(CatalogSource(catalogs=list(packages), **kwargs), FieldNames(), share)


def test_catalogs_are_read_without_importing_the_package(package: Path) -> None:
    documents, _ = read("catalog_fixture", min_letters=20)
    assert "catalog_fixture" not in sys.modules
    assert [(document.id, document.language) for document in documents] == [
        ("catalog_fixture/app/hi/0000", "hi"),
        ("catalog_fixture/app/sw/0000", "sw"),
        ("catalog_fixture/app/en/0000", "en"),
        ("catalog_fixture/other/en/0000", "en"),
    ]
    texts = [document.text for document in documents]
    assert "nobody has translated" not in texts[0]
    assert texts[1] == "Ujumbe ulio mrefu wa kutosha kubaki"
    assert texts[2].split("\n") == ["A message that is long enough to be kept", "Another one that nobody has translated yet"]


def test_messages_are_joined_into_documents(package: Path) -> None:
    documents, _ = read("catalog_fixture", min_letters=1, messages_per_document=1)
    assert [document.id for document in documents if document.language == "sw"] == [
        "catalog_fixture/app/sw/0000",
        "catalog_fixture/app/sw/0001",
    ]


def test_vowel_signs_are_letters() -> None:
    assert num_letters("\u0939\u093f\u0928\u094d\u0926\u0940 1, 2!") == 6


def test_which_locale_speaks_for_a_language() -> None:
    names = [
        "ar",
        "ar_EG",
        "pt_BR",
        "pt_PT",
        "de_AT",
        "de_DE",
        "en_GB",
        "en",
        "zh_Hant",
        "zh",
        "zh_CN",
        "zh-hans",
        "es_MX",
        "es_AR",
        "README",
    ]
    assert choose_locales(names) == {"ar": "ar", "de": "de_DE", "es": "es_AR", "pt": "pt_PT", "zh": "zh-hans"}
    assert choose_locales(["zh", "zh_CN"]) == {"zh": "zh_CN"}
    assert choose_locales(["zh", "zh_TW"]) == {"zh": "zh"}
    assert choose_locales(["zh_TW", "zh_Hant_HK", "pt_BR"]) == {"pt": "pt_BR"}


def test_a_package_that_is_not_installed_says_how_to_get_it() -> None:
    with pytest.raises(CorpusError, match="pip install not_a_package"):
        read("not_a_package")
    with pytest.raises(CorpusError, match="no message catalogs"):
        read("hypothesis")


def test_a_broken_catalog_is_counted(package: Path) -> None:
    (package / "app/locale/hi/LC_MESSAGES/django.mo").write_bytes(b"\xde\x12\x04\x95 cut")
    documents, report = read("catalog_fixture", share=0.9)
    assert report.broken == 1
    assert report.examples[0].startswith("message catalogs of catalog_fixture, catalog_fixture/app/hi: not a message catalog")
    with pytest.raises(CorpusError, match="message catalogs of catalog_fixture: 1 of"):
        read("catalog_fixture", share=0.1)


def test_the_source_is_named_with_version_and_licence() -> None:
    pytest.importorskip("django")
    [django] = catalog_sources(CatalogSource(catalogs=["django"]))
    assert django.distribution.lower() == "django"
    assert "BSD" in django.licence
    assert django.version[0].isdigit()


def test_the_fingerprint_sees_another_catalog(package: Path) -> None:
    source = CatalogSource(catalogs=["catalog_fixture"])
    before = source_fingerprint([source])
    (package / "app/locale/hi/LC_MESSAGES/django.mo").unlink()
    assert source_fingerprint([source]) != before


def test_django_brings_ten_languages_in_four_scripts() -> None:
    pytest.importorskip("django")
    documents, report = read("django")
    assert report.broken == 0
    kilobytes: dict[str, float] = {}
    for document in documents:
        kilobytes[document.language] = kilobytes.get(document.language, 0) + document.num_bytes / 1000
    assert min(kilobytes[language] for language in LANGUAGES) > 7
    assert len({document.id for document in documents}) == len(documents)
