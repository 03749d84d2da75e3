"""The language of a document by its text, with py3langid (its model comes with the package)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from megaxelm.errors import CorpusError

_CHARACTERS = 2000


class Detector:
    """Says in which language a text is.

    Args:
        languages: the only answers there are; None: all that the model knows.
        given: those of them that sources name themselves, which the model need not know.

    Raises:
        CorpusError: a language that the model does not know and no source names, or none that it knows.
    """

    def __init__(self, languages: Sequence[str] | None, given: Collection[str] = ()) -> None:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=False)
        known = {str(label) for label in self._identifier.labels}
        answers = None if languages is None else [code for code in languages if code in known]
        unknown = [code for code in languages or [] if code not in known and (code not in given or not answers)]
        if unknown:
            raise CorpusError(
                f"corpus.language = detect: the detector does not know {', '.join(unknown)}; it knows {', '.join(sorted(known))}. "
                "Take them out of corpus.languages, or give their sources a `language:`"
            )
        if answers is not None:
            self._identifier.set_languages(answers)

    def detect(self, text: str) -> str:
        """Code of the most likely language, by the first 2000 characters."""
        return str(self._identifier.classify(text[:_CHARACTERS])[0])
