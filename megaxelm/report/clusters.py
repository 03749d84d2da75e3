"""The page of the clusters, `clusters/report.html`, made from `clusters/report.json` alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from megaxelm.errors import StageError
from megaxelm.report.data import Cluster, Clusters

if TYPE_CHECKING:
    from megaxelm.report.svg import Drawing

PAGE_FILE = "report.html"
_REPORT_FILE = "report.json"
_UNITS = ("documents", "bytes", "tokens")


class _Part(BaseModel):
    """What the page reads of an object of the report; other keys are for other readers."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Size(_Part):
    """Text of one language in one cluster, over the whole corpus."""

    documents: int
    bytes: int
    tokens: int


class NamedCluster(_Part):
    """One cluster and its languages."""

    name: str
    languages: dict[str, Size]
    forced: bool = False

    def total(self, unit: str) -> int:
        """Documents, bytes or tokens of all languages."""
        return sum(getattr(size, unit) for size in self.languages.values())


class Balance(_Part):
    """How even the clusters are; None where the corpus has nothing of the unit."""

    total: int
    largest_to_mean: float | None
    smallest_to_mean: float | None
    entropy_bits: float | None
    effective_clusters: float | None


class Agreement(_Part):
    """Clusters against languages or domains; see `megaxelm/cluster/diagnostics.py`."""

    documents: int
    classes: int
    purity: float | None
    purity_of_one_cluster: float | None
    nmi: float | None
    explained: float | None
    chance: float | None = None


class Agreements(_Part):
    """The three comparisons; those of the sample are None where no document names a domain."""

    language: Agreement
    domain: Agreement | None
    language_in_sample: Agreement | None
    language_and_domain: float | None
    domain_field: str
    domain_reason: str | None = None
    sample: int


class Domains(_Part):
    """Documents of the sample by cluster and domain, [clusters][names]."""

    names: list[str]
    documents: list[list[int]]
    other_names: int
    other_documents: list[int]


class Stability(_Part):
    """Adjusted Rand index of every two fits, [seeds][seeds]; None with a reason where seeds change nothing."""

    reason: str | None
    seeds: list[int]
    adjusted_rand: list[list[float]] | None
    mean: float | None
    least: float | None


class Term(_Part):
    """A typical term: shares of documents that have it."""

    term: str
    share: float
    expected: float
    z: float


class Terms(_Part):
    """Typical terms, [clusters][terms]."""

    documents: int
    characters: int
    overall: list[list[Term]]
    within_languages: list[list[Term]]


class TypicalDocument(_Part):
    """The beginning of a document near the middle of its cluster."""

    id: str
    language: str
    domain: str | None
    distance: float
    text: str


class Picture(_Part):
    """Documents on a plane."""

    method: Literal["t-SNE", "PCA"]
    documents: int
    sample: int
    x: list[float]
    y: list[float]
    cluster: list[int]
    languages: list[str]
    language: list[int]

    @model_validator(mode="after")
    def _one_entry_a_document(self) -> Picture:
        if {len(self.x), len(self.y), len(self.cluster), len(self.language)} != {self.documents}:
            raise ValueError(f"x, y, cluster and language must have one entry for each of the {self.documents} documents")
        if max(self.language, default=0) >= len(self.languages) or min(self.language, default=0) < 0:
            raise ValueError(f"language {max(self.language)} of a document is not one of the {len(self.languages)} languages")
        return self


class ClusterReport(_Part):
    """`clusters/report.json` as far as the page reads it."""

    partitioner: str
    method: str
    names: list[str]
    clusters: list[NamedCluster]
    languages: list[str]
    linkage: list[tuple[float, float, float, float]] | None
    language_distances_reason: str = "the report has none"
    notes: list[str]
    balance: dict[Literal["documents", "bytes", "tokens"], Balance]
    agreement: Agreements
    kind: Literal["languages", "topics", "mixed", "neither", "unknown"]
    sentence: str
    domains: Domains | None
    stability: Stability
    typical_terms: Terms
    typical_documents: list[list[TypicalDocument]] | None
    picture: Picture | None

    @model_validator(mode="after")
    def _fits_together(self) -> ClusterReport:
        k = len(self.clusters)
        lists: dict[str, list[Any] | None] = {
            "names": self.names,
            "typical_terms.overall": self.typical_terms.overall,
            "typical_terms.within_languages": self.typical_terms.within_languages,
            "typical_documents": self.typical_documents,
            "domains.documents": self.domains.documents if self.domains else None,
            "domains.other_documents": self.domains.other_documents if self.domains else None,
        }
        for name, items in lists.items():
            if items is not None and len(items) != k:
                raise ValueError(f"`{name}` has {len(items)} entries for {k} clusters")
        if self.linkage is not None and len(self.linkage) != len(self.languages) - 1:
            raise ValueError(f"`linkage` has {len(self.linkage)} rows for {len(self.languages)} languages")
        if self.picture and not 0 <= min(self.picture.cluster, default=0) <= max(self.picture.cluster, default=0) < k:
            raise ValueError(f"`picture` has a document in cluster {max(self.picture.cluster)}, but there are {k} clusters")
        missing = [unit for unit in _UNITS if unit not in self.balance]
        if missing:
            raise ValueError(f"`balance` lacks {', '.join(missing)}")
        return self

    def table(self, unit: str) -> NDArray[np.int64]:
        """Documents, bytes or tokens, [languages, clusters]."""
        rows = [[getattr(cluster.languages.get(code), unit, 0) for cluster in self.clusters] for code in self.languages]
        return np.array(rows, dtype=np.int64).reshape(len(self.languages), len(self.clusters))


def write_cluster_page(clusters_folder: Path) -> Path:
    """Write `report.html` beside `report.json` and return its path. One file, nothing is loaded from elsewhere.

    Raises:
        StageError: `report.json` is absent or broken; the text names the file and the place in it.
    """
    report = read_cluster_report(clusters_folder / _REPORT_FILE)
    # matplotlib takes a second to import, and readers of the report alone need no figures.
    from markupsafe import Markup

    from megaxelm.report.page import page_environment

    drawings = _draw(report)
    page = (
        page_environment()
        .get_template("clusters.html.j2")
        .render(
            report=report,
            rows=[_row(report, number) for number in range(len(report.clusters))],
            tables={unit: report.table(unit).tolist() for unit in _UNITS},
            domain_rows=_domain_rows(report.domains),
            figures={name: {"svg": Markup(item.svg), "caption": item.caption} for name, item in drawings.items()},
        )
    )
    target = clusters_folder / PAGE_FILE
    target.write_text(page, encoding="utf-8")
    return target


def read_cluster_report(path: Path) -> ClusterReport:
    """What the page needs of `report.json`.

    Raises:
        StageError: the file is absent, not JSON, lacks a key or has a value of another kind; the text names the place.
    """
    again = "make it again: megaxelm run RECIPE --only clusters"
    try:
        return ClusterReport.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise StageError(f"{path}: no such file, and the page of the clusters is made from it; {again}") from None
    except OSError as error:
        raise StageError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise StageError(f"{path}: {place}: {first['msg']}; {again}") from None


def _row(report: ClusterReport, number: int) -> dict[str, Any]:
    """A cluster for the table and its own section: its size, the languages that make it up, what is typical."""
    cluster = report.clusters[number]
    # Languages are weighed by tokens, which is what an expert trains on.
    total = cluster.total("tokens")
    largest = sorted(cluster.languages.items(), key=lambda item: (-item[1].tokens, item[0]))
    most = max((other.total("tokens") for other in report.clusters), default=0) or 1
    return {
        "name": cluster.name,
        "forced": cluster.forced,
        **{unit: cluster.total(unit) for unit in _UNITS},
        "bar": 100 * total / most,
        "share": total / (report.balance["tokens"].total or 1),
        "languages": [(code, size.tokens / total) for code, size in largest if total and size.tokens >= 0.01 * total],
        "strays": sum(size.tokens < 0.01 * total for _, size in largest),
        "terms": report.typical_terms.overall[number],
        "within": report.typical_terms.within_languages[number],
        "documents_shown": report.typical_documents[number] if report.typical_documents is not None else None,
    }


def _domain_rows(domains: Domains | None) -> list[tuple[str, list[int]]]:
    """Rows of the table of domains: name, and documents of the sample by cluster."""
    if domains is None:
        return []
    rows = [(name, [cluster[number] for cluster in domains.documents]) for number, name in enumerate(domains.names)]
    return rows + ([(f"{domains.other_names} others", domains.other_documents)] if domains.other_names else [])


def _draw(report: ClusterReport) -> dict[str, Drawing]:
    """All figures that the report has data for, by name."""
    from megaxelm.report.cluster_plots import draw_shares
    from megaxelm.report.language_plots import draw_language_tree
    from megaxelm.report.svg import figure_style

    drawings: dict[str, Drawing | None] = {}
    with figure_style():
        caption = (
            "Each row is a language, each column a cluster; a cell says how many per cent of the language's tokens the cluster has (a dot: "
            "less than 0.5). One dark cell in a row: the language lies in one cluster. Dark cells under each other: languages share it."
        )
        drawings["shares"] = draw_shares(
            "shares", "Languages by cluster, share of tokens", report.languages, report.names, report.table("tokens"), caption
        )
        rows = _domain_rows(report.domains)
        if rows and report.agreement.domain is not None:
            caption = (
                "Each row is a domain, each column a cluster; a cell says how many per cent of the domain's documents in the sample "
                "the cluster has. Rows spread evenly: the clusters do not follow domains."
            )
            table = np.array([row for _, row in rows], dtype=np.int64)
            drawings["domains"] = draw_shares(
                "domains", "Domains by cluster, share of documents", [name for name, _ in rows], report.names, table, caption
            )
        if report.picture is not None:
            _draw_pictures(report, report.picture, drawings)
        clusters = [
            Cluster(item.name, {code: size.bytes for code, size in item.languages.items()}, item.forced) for item in report.clusters
        ]
        linkage = [list(row) for row in report.linkage] if report.linkage else None
        reason = report.language_distances_reason
        drawings["tree"] = draw_language_tree(
            Clusters(report.partitioner, report.method, clusters, report.languages, linkage, reason, report.notes)
        )
    return {name: drawing for name, drawing in drawings.items() if drawing is not None}


def _draw_pictures(report: ClusterReport, picture: Picture, drawings: dict[str, Drawing | None]) -> None:
    from megaxelm.report.cluster_plots import draw_panels, draw_picture

    values = picture.model_dump()
    drawn = f"{picture.documents:,} of the {picture.sample:,} documents of the sample, drawn at random"
    if picture.documents == picture.sample:
        drawn = f"The {picture.documents:,} documents of the sample"
    means = (
        "Near points are alike; how far apart two groups lie and how large they look says little."
        if picture.method == "t-SNE"
        else "The two directions in which the documents differ most; there are too few documents for t-SNE."
    )
    caption = f"{drawn}, on a plane ({picture.method} of their TF-IDF vectors). {means} Marks and names are those of "
    caption += "the clusters; where one lies in several places, its name stands at each."
    drawings["picture_clusters"] = draw_picture("by-cluster", values, report.names, picture.cluster, "cluster", caption)
    caption = (
        "The same points, marked by language. Where these groups are those of the figure above, clusters are languages; where a language "
        "falls apart into several names above, something else divides it."
    )
    drawings["picture_languages"] = draw_picture("by-language", values, picture.languages, picture.language, "language", caption)
    if len(report.names) > 1:
        caption = "The same points once more, cluster by cluster: its own in colour (their share in brackets), some of the others in grey."
        drawings["picture_panels"] = draw_panels(values, report.names, caption)
