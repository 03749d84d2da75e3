"""Typological features of languages (URIEL, by the data files of lang2vec) and the distance of languages by them.

lang2vec is installed for its arrays alone: importing it fails where setuptools has no `pkg_resources`, so its files are
found without an import. URIEL is CC BY-SA 4.0 (Littell et al., EACL 2017) and is never copied into this project.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import re
import zipfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megaxelm.errors import ClusterError

# ISO 639-1 (with the retired codes bh, in, iw, ji, mo) to the ISO 639-3 code that URIEL uses; macrolanguages where it has both.
_THREE_LETTERS = """
aa:aar ab:abk ae:ave af:afr ak:aka am:amh an:arg ar:ara as:asm av:ava ay:aym az:aze ba:bak be:bel bg:bul bh:bho bi:bis bm:bam
bn:ben bo:bod br:bre bs:bos ca:cat ce:che ch:cha co:cos cr:cre cs:ces cu:chu cv:chv cy:cym da:dan de:deu dv:div dz:dzo ee:ewe
el:ell en:eng eo:epo es:spa et:est eu:eus fa:fas ff:ful fi:fin fj:fij fo:fao fr:fra fy:fry ga:gle gd:gla gl:glg gn:grn gu:guj
gv:glv ha:hau he:heb hi:hin ho:hmo hr:hrv ht:hat hu:hun hy:hye hz:her ia:ina id:ind ie:ile ig:ibo ii:iii ik:ipk in:ind io:ido
is:isl it:ita iu:iku iw:heb ja:jpn ji:yid jv:jav ka:kat kg:kon ki:kik kj:kua kk:kaz kl:kal km:khm kn:kan ko:kor kr:kau ks:kas
ku:kur kv:kom kw:cor ky:kir la:lat lb:ltz lg:lug li:lim ln:lin lo:lao lt:lit lu:lub lv:lav mg:mlg mh:mah mi:mri mk:mkd ml:mal
mn:mon mo:ron mr:mar ms:msa mt:mlt my:mya na:nau nb:nob nd:nde ne:nep ng:ndo nl:nld nn:nno no:nor nr:nbl nv:nav ny:nya oc:oci
oj:oji om:orm or:ori os:oss pa:pan pi:pli pl:pol ps:pus pt:por qu:que rm:roh rn:run ro:ron ru:rus rw:kin sa:san sc:srd sd:snd
se:sme sg:sag sh:hbs si:sin sk:slk sl:slv sm:smo sn:sna so:som sq:sqi sr:srp ss:ssw st:sot su:sun sv:swe sw:swa ta:tam te:tel
tg:tgk th:tha ti:tir tk:tuk tl:tgl tn:tsn to:ton tr:tur ts:tso tt:tat tw:twi ty:tah ug:uig uk:ukr ur:urd uz:uzb ve:ven vi:vie
vo:vol wa:wln wo:wol xh:xho yi:yid yo:yor za:zha zh:zho zu:zul
"""
ISO_639_3 = dict(pair.split(":") for pair in _THREE_LETTERS.split())
"""Two-letter language codes to three-letter ones."""

_PREFIXES = {"syntax": "S_", "phonology": "P_", "inventory": "INV_"}
_FILES = {"average": "feature_averages.npz", "knn": "feature_predictions.npz", "fam": "family_features.npz", "geo": "geocoord_features.npz"}
_WHOLE = ("fam", "geo")
"""Sets that are a file of their own: families that a language belongs to, and its distance from places on the globe."""


def iso_639_3(code: str) -> str:
    """Three-letter code of a language as a user writes it: `az`, `aze`, `pt_BR`, `zh-Hans` (the first part counts).

    Raises:
        ClusterError: if the language is not in URIEL; lists codes that look alike.
    """
    base = re.split(r"[-_]", code)[0].lower()
    known = _table("average")[1]
    three = ISO_639_3.get(base, base)
    if len(base) in (2, 3) and three in known:
        return three
    candidates = list(ISO_639_3) if len(base) == 2 else [*ISO_639_3, *known]
    near = difflib.get_close_matches(base, candidates, n=8, cutoff=0.5)
    hint = f"codes that look alike: {', '.join(near)}" if near else "codes are those of ISO 639-1 or 639-3, such as sw or swa"
    raise ClusterError(
        f"language {code!r}: not a language code of URIEL (lang2vec); {hint}. For a language without typological data use "
        "clusters.partitioner: language or tfidf"
    )


def feature_values(languages: Sequence[str], features: str = "syntax_average") -> NDArray[np.float64]:
    """URIEL values, [languages, features], 0..1, with NaN where a value is missing.

    `features` is named as in lang2vec: `syntax`, `phonology` or `inventory`, `_`, then `average`, `knn` or a source (`wals`); or `fam`,
    the families that a language belongs to, or `geo`, where it is spoken.

    Raises:
        ClusterError: for an unknown set or language, a language without any value, or where lang2vec is not installed.
    """
    group, _, source = features.partition("_")
    three = [iso_639_3(code) for code in languages]
    if features not in _WHOLE and (group not in _PREFIXES or not source or source in _WHOLE):
        raise ClusterError(
            f"clusters.typology.features = {features!r}: unknown; a set is named {', '.join(_PREFIXES)} + _ + average, knn or a source, "
            f"e.g. syntax_average, or is {' or '.join(_WHOLE)}"
        )
    data, rows, names = _table(features if features in _WHOLE else source)
    columns = [index for index, name in enumerate(names) if name.startswith(_PREFIXES.get(group, ""))]
    values = data[np.ix_([rows[code] for code in three], columns)].astype(np.float64)
    values[values < 0] = np.nan
    empty = [code for code, row in zip(languages, values, strict=True) if np.isnan(row).all()]
    if empty:
        raise ClusterError(
            f"clusters.typology.features = {features!r}: URIEL has no value of this set for {', '.join(empty)}; use syntax_knn (predicted "
            "values), write the code of the macrolanguage (aze, not azj), or use clusters.partitioner: language or tfidf"
        )
    return values


def distances(languages: Sequence[str], features: str = "syntax_average") -> NDArray[np.float64]:
    """Distance of each pair of languages, [languages, languages], symmetric, zero on the diagonal.

    Features that are the same for all the languages are dropped (missing counts as a value of its own; 97 of 103 stay for the 16 of
    the published runs). Then distance = 1 - sum(x * y) / sqrt(sum x^2 * sum y^2), the product over features that both have, each norm
    over those its language has. Where one has only zeros left, nothing is shared and the distance is 1.

    Raises:
        ClusterError: as `feature_values`, and if two languages share no feature that both have.
    """
    values = feature_values(languages, features)
    present = ~np.isnan(values)
    filled = np.where(present, values, -1.0)
    overlap = present.astype(np.int64) @ present.T.astype(np.int64)
    for a, b in zip(*np.nonzero(np.triu(overlap == 0)), strict=True):
        raise ClusterError(
            f"clusters.typology.features = {features!r}: {languages[a]} and {languages[b]} have no feature in common in URIEL, so no "
            "distance; use syntax_knn (predicted values), or leave one of them out (corpus.languages)"
        )
    varying = (filled != filled[:1]).any(axis=0)
    x = np.where(present, values, 0.0)[:, varying]
    norms = np.sqrt((x * x).sum(axis=1))
    scale = np.outer(norms, norms)
    similarity = np.divide(x @ x.T, scale, out=np.zeros_like(scale), where=scale > 0)
    result = 1.0 - similarity
    # The same features, e.g. of zh and zh-Hant, are distance 0 even where nothing varies.
    same = (filled[:, None, :] == filled[None, :, :]).all(axis=-1)
    result[same] = 0.0
    return np.clip((result + result.T) / 2, 0.0, None)


@lru_cache(maxsize=4)
def _table(source: str) -> tuple[NDArray[np.floating], dict[str, int], list[str]]:
    """Values [languages, features] of one source, row of each ISO 639-3 code, feature names."""
    path = _data_folder() / _FILES.get(source, "features.npz")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            langs, names, sources = arrays["langs"], arrays["feats"], [str(name).lower() for name in arrays["sources"]]
            if source in _FILES:
                layer = 0
            else:
                wanted = "ethno" if source == "ethnologue" else source.lower()
                if wanted not in sources:
                    known = ", ".join(sorted("ethnologue" if name == "ethno" else name for name in sources))
                    raise ClusterError(f"clusters.typology.features: unknown source {source!r}; URIEL has average, knn, {known}")
                layer = sources.index(wanted)
            data = np.ascontiguousarray(arrays["data"][:, :, layer])
    except FileNotFoundError:
        raise ClusterError(f"{path}: no such file; lang2vec is not whole, install it again: pip install lang2vec==1.1.2") from None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ClusterError(f"{path}: damaged ({error}); install it again: pip install --force-reinstall lang2vec==1.1.2") from None
    return data, {str(code): row for row, code in enumerate(langs)}, [str(name) for name in names]


def _data_folder() -> Path:
    # Not by find_spec: the package also installs a script `lang2vec.py` beside the interpreter, and the folder of a running script comes
    # first on the path.
    try:
        return Path(str(importlib.metadata.distribution("lang2vec").locate_file("lang2vec/data")))
    except importlib.metadata.PackageNotFoundError:
        raise ClusterError("clusters.partitioner = typology needs the data of lang2vec: pip install lang2vec==1.1.2") from None
