"""The tokenizer: a SentencePiece Unigram model trained on the sample, or a loaded one, always as a Hugging Face folder.

A tokenizer trained here keeps every character: no normalisation, no space added in front, newline a piece of its own, unknown characters in
UTF-8 bytes. Two things are ours on top of SentencePiece, so that any text comes back: U+2581, which SentencePiece uses for the
space, travels as the noncharacter U+FDD0; and pieces such as `<0x41>` or `</s>` never match where a text spells them.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import xxhash
from tqdm import tqdm

from megaxelm.corpus.prepare import load_manifest, read_documents
from megaxelm.errors import StageError, TokenizerError
from megaxelm.files import read_json
from megaxelm.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SPECIAL = {"unk": "<unk>", "bos": "<s>", "eos": "</s>", "pad": "<pad>"}
_SETTINGS = "megaxelm_tokenizer.json"
_SPACE, _SPACE_ESCAPE = "\u2581", "\ufdd0"
# Below any sum of the pieces that spell such a name, so that Viterbi never takes it from text
_NEVER = -1000.0
# Characters of `<0x00>`..`<0xFF>` and of the special tokens: with pieces of their own the names can always be spelt
_REQUIRED = "<>/0123456789ABCDEFxsunkpad"
_SENTENCE_CHARACTERS = 1000
_PART_CHARACTERS = 1000
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
# The model depends on the number of threads (sums in another order), so it is the same on every machine
_THREADS = 4


class Tokenizer:
    """A tokenizer of a run, for documents: nothing is added to the text but what `document` adds.

    `bos_id` is None for a loaded tokenizer without one. `hf` is the Hugging Face tokenizer, whose own call adds `start_id` in front.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.trained: bool = settings["trained"]
        self.name: str = settings["name"]
        self.begin_of_document: bool = settings["begin_of_document"]
        self.bos_id: int | None = settings["bos_id"]
        self.eos_id: int = settings["eos_id"]
        self.vocab_size: int = settings["vocab_size"]
        self.fingerprint: str = settings["fingerprint"]

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Open a folder that `build_tokenizer` wrote, or a copy of it.

        Raises:
            TokenizerError: files are missing, or have been changed since.
        """
        folder = Path(folder)
        try:
            settings = read_json(
                folder / _SETTINGS, begin_of_document=bool, eos_id=int, vocab_size=int, fingerprint=str, trained=bool, name=str
            )
        except StageError as error:
            raise TokenizerError(f"{error} (--from tokenizer)") from None
        if not (folder / "tokenizer.json").is_file():
            raise TokenizerError(f"{folder}: tokenizer.json is missing; make the tokenizer again (--from tokenizer)")
        found = _fingerprint(folder)
        if found != settings["fingerprint"]:
            raise TokenizerError(
                f"{folder}: tokenizer.json was changed after it was made (fingerprint {found}, made as {settings['fingerprint']}); "
                "the token index and the models depend on it: make the tokenizer again (--from tokenizer)"
            )
        return cls(folder, settings)

    @cached_property
    def hf(self) -> PreTrainedTokenizerFast:
        """The Hugging Face tokenizer."""
        return _load_fast(self.folder)

    @property
    def start_id(self) -> int:
        """What stands in front of the text at evaluation and generation: BOS, or EOS for runs without BOS."""
        return self.bos_id if self.begin_of_document and self.bos_id is not None else self.eos_id

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens.

        A tokenizer trained here is run by SentencePiece itself, which is several times faster than `tokenizers`. The two may differ
        where segmentations have the same score but for rounding (`....` as `.` + `...`), about once in 5000 documents.
        """
        if self._sentencepiece is None:
            return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        parts: list[str] = []
        counts: list[int] = []
        for text in texts:
            before = len(parts)
            parts += _pieces(text.replace(_SPACE, _SPACE_ESCAPE))
            counts.append(len(parts) - before)
        found = iter(self._sentencepiece.encode(parts, num_threads=1))
        return [[token for _ in range(count) for token in next(found)] for count in counts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens are left out."""
        return str(self._backend.decode(list(ids), skip_special_tokens=True))

    def document(self, ids: Sequence[int]) -> list[int]:
        """The token ids of a document as the index holds it: BOS (with `begin_of_document`), text, EOS."""
        front = [self.bos_id] if self.begin_of_document and self.bos_id is not None else []
        return [*front, *ids, self.eos_id]

    def cut(self, text: str, max_tokens: int) -> tuple[list[int], int]:
        """At most `max_tokens` ids from the front of the text, and the UTF-8 bytes of exactly the text that they spell.

        A cut inside a character (byte pieces) goes back to the character's beginning, so fewer ids may come, or none.
        """
        encoding = self._backend.encode(text, add_special_tokens=False)
        ids, offsets, pieces = encoding.ids, encoding.offsets, encoding.tokens
        if len(ids) <= max_tokens:
            return ids, len(text.encode("utf-8"))
        for end in range(max_tokens, 0, -1):
            if offsets[end - 1][1] <= offsets[end][0]:
                return ids[:end], len(text[: offsets[end - 1][1]].encode("utf-8"))
            # neighbouring unknown characters share one span; inside of it only their bytes tell where a character begins
            if offsets[end - 1] == offsets[end] and _is_lead_byte(pieces[end]):
                first = offsets.index(offsets[end])
                if all(_BYTE_PIECE.fullmatch(piece) for piece in pieces[first:end]):
                    return ids[:end], len(text[: offsets[end][0]].encode("utf-8")) + end - first
        return [], 0

    @cached_property
    def _sentencepiece(self) -> Any:
        """SentencePiece's own encoder, for a tokenizer that was trained here."""
        path = self.folder / "tokenizer.model"
        if not self.trained or not path.is_file():
            return None
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_file=str(path))

    @cached_property
    def _backend(self) -> Any:
        # Own copy: text that spells a special token is text in a corpus, but `hf` keeps the habits of its library
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_file(str(self.folder / "tokenizer.json"))
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        return backend


def build_tokenizer(recipe: Recipe, corpus_folder: Path, out: Path) -> None:
    """Stage `tokenizer`: train on the sample, or copy the one that `tokenizer.load` names, into `out`.

    Raises:
        TokenizerError: not enough text for `tokenizer.vocab_size`, or nothing usable at `tokenizer.load`.
    """
    settings = recipe.tokenizer
    if settings.load is None:
        _train(recipe, corpus_folder, out)
    else:
        hf = _load_fast(settings.load)
        _check_loaded(recipe, hf)
        hf.save_pretrained(str(out))
        # a SentencePiece model file is kept where the source has one, for programs that read only that
        for path in Path(settings.load).glob("*.model") if Path(settings.load).is_dir() else ():
            shutil.copyfile(path, out / path.name)
    hf = _load_fast(out)
    values = {
        "begin_of_document": settings.begin_of_document,
        "bos_id": hf.bos_token_id,
        "eos_id": hf.eos_token_id,
        "vocab_size": len(hf),
        "fingerprint": _fingerprint(out),
        "trained": settings.load is None,
        "name": settings.load or f"Unigram of {len(hf)} pieces, trained here",
    }
    (out / _SETTINGS).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def sample_sentences(corpus_folder: Path, max_bytes: int) -> Iterator[str]:
    """Lines of the sample for training: equal bytes of every language where there is enough, `max_bytes` over all; long lines in parts."""
    sizes = {code: counts["sample_bytes"] for code, counts in load_manifest(corpus_folder)["languages"].items()}
    for code, quota in equal_shares(sizes, max_bytes).items():
        used = 0
        for document in read_documents(corpus_folder / "sample" / f"{code}.jsonl"):
            if used >= quota:
                break
            for line in document.text.split("\n"):
                for part in _parts(line.replace(_SPACE, _SPACE_ESCAPE)):
                    used += len(part.encode("utf-8")) + 1
                    yield part
                if used >= quota:
                    break


def equal_shares(sizes: dict[str, int], total: int) -> dict[str, int]:
    """Bytes to take of each language: the same number of all, and all of those that have less; `total` at most."""
    shares: dict[str, int] = {}
    left = total
    for position, code in enumerate(sorted(sizes, key=lambda code: (sizes[code], code))):
        shares[code] = min(sizes[code], left // (len(sizes) - position))
        left -= shares[code]
    return dict(sorted(shares.items()))


def _parts(line: str) -> Iterator[str]:
    """A line in parts of at most 1000 characters, cut before a space where there is one: long sentences make the training slow."""
    while len(line) > _SENTENCE_CHARACTERS:
        space = line.rfind(" ", _SENTENCE_CHARACTERS // 2, _SENTENCE_CHARACTERS)
        cut = space if space > 0 else _SENTENCE_CHARACTERS
        yield line[:cut]
        line = line[cut:]
    if line and not line.isspace():
        yield line


def _train(recipe: Recipe, corpus_folder: Path, out: Path) -> None:
    import sentencepiece

    settings = recipe.tokenizer
    model = io.BytesIO()
    try:
        with _clock("tokenizer: training SentencePiece"):
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=sample_sentences(corpus_folder, settings.sample_bytes),
                model_writer=model,
                model_type="unigram",
                vocab_size=settings.vocab_size,
                character_coverage=settings.character_coverage,
                byte_fallback=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                split_digits=True,
                required_chars=_REQUIRED,
                user_defined_symbols=["\n"],
                max_sentence_length=1 << 20,
                num_threads=_THREADS,
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=3,
                minloglevel=2,
            )
    except RuntimeError as error:
        raise TokenizerError(_explain(str(error), recipe)) from None
    (out / "tokenizer.model").write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    _write_hugging_face(processor, out, settings.begin_of_document)


@contextmanager
def _clock(title: str) -> Iterator[None]:
    """A bar that shows the time gone by: SentencePiece does not say how far it is."""
    done = threading.Event()
    with tqdm(desc=title, file=sys.stderr, bar_format="{desc} ({elapsed})", leave=False) as bar:

        def tick() -> None:
            while not done.wait(0.5):
                bar.refresh()

        ticking = threading.Thread(target=tick, daemon=True)
        ticking.start()
        try:
            yield
        finally:
            done.set()
            ticking.join()


def _explain(message: str, recipe: Recipe) -> str:
    """What SentencePiece's message means for the recipe."""
    size = recipe.tokenizer.vocab_size
    if match := re.search(r"too high \(\d+\).*?<= (\d+)", message):
        return (
            f"tokenizer.vocab_size = {size} is too large for the sample: set it to {match[1]} or less, or give more text "
            "(corpus.sample_bytes, tokenizer.sample_bytes)"
        )
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"tokenizer.vocab_size = {size} is too small for the characters of the sample: set it above {match[1]}, "
            f"or lower tokenizer.character_coverage = {recipe.tokenizer.character_coverage:g}"
        )
    return (
        f"tokenizer: SentencePiece could not be trained with tokenizer.vocab_size = {size}: {message.strip()}; give more text "
        "or another size"
    )


def _write_hugging_face(processor: Any, out: Path, begin_of_document: bool) -> None:
    """tokenizer.json and tokenizer_config.json that give the same ids as the SentencePiece model."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend

    vocabulary = []
    for i in range(processor.get_piece_size()):
        named = processor.is_byte(i) or processor.is_control(i) or processor.is_unknown(i)
        vocabulary.append((processor.id_to_piece(i), _NEVER if named else processor.get_score(i)))
    backend = Backend(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    backend.normalizer = normalizers.Replace(_SPACE, _SPACE_ESCAPE)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="never", split=True), pre_tokenizers.Split(Regex("\n"), "isolated")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Replace(_SPACE_ESCAPE, _SPACE)]
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL.values()])
    start = _SPECIAL["bos" if begin_of_document else "eos"]
    start_id = backend.token_to_id(start)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", pair=f"{start} $A {start} $B:1", special_tokens=[(start, start_id)]
    )
    backend.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": token for name, token in _SPECIAL.items()},
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _load_fast(place: str | Path) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    try:
        hf = AutoTokenizer.from_pretrained(str(place))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TokenizerError(
            f"tokenizer {place}: cannot be loaded ({reason}); tokenizer.load takes a folder with tokenizer.json or a name on the "
            "Hugging Face hub"
        ) from error
    if not getattr(hf, "is_fast", False):
        raise TokenizerError(
            f"tokenizer {place}: is a slow tokenizer without tokenizer.json; save it once with a fast class and load that folder"
        )
    return cast("PreTrainedTokenizerFast", hf)


def _check_loaded(recipe: Recipe, hf: PreTrainedTokenizerFast) -> None:
    name = recipe.tokenizer.load
    if hf.eos_token_id is None:
        raise TokenizerError(f"tokenizer.load = {name}: it has no EOS token, which ends every document; choose a tokenizer with one")
    if recipe.tokenizer.begin_of_document and hf.bos_token_id is None:
        raise TokenizerError(
            f"tokenizer.load = {name}: it has no BOS token; set tokenizer.begin_of_document = false (and train.document_mask = false), "
            "or choose a tokenizer with one"
        )


def _pieces(text: str) -> list[str]:
    """A text cut before spaces and newlines, which no token crosses. SentencePiece adds scores up in 32 bits, too few for long texts."""
    if len(text) <= _PART_CHARACTERS:
        return [text]
    found = []
    start = 0
    while len(text) - start > _PART_CHARACTERS:
        space, newline = (text.find(mark, start + _PART_CHARACTERS) for mark in (" ", "\n"))
        cut = min((place for place in (space, newline) if place >= 0), default=len(text))
        found.append(text[start:cut])
        start = cut
    if start < len(text):
        found.append(text[start:])
    return found


def _is_lead_byte(piece: str) -> bool:
    """Whether a piece is a byte that begins a character in UTF-8."""
    match = _BYTE_PIECE.fullmatch(piece)
    return match is not None and int(match[1], 16) & 0xC0 != 0x80


def _fingerprint(folder: Path) -> str:
    return xxhash.xxh3_128_hexdigest((folder / "tokenizer.json").read_bytes())
