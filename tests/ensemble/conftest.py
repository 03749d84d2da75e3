"""Small random experts over bytes, and a tokenizer of bytes, for the tests of the ensemble."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from byte_ensemble import VOCABULARY, byte_decoder

from megaxelm.ensemble.folder import Ensemble, EnsembleSettings
from megaxelm.ensemble.routers import RouterData
from megaxelm.model.decoder import Decoder


class ByteTokenizer:
    """Ids are UTF-8 bytes + 4; BOS 1, EOS 2."""

    start_id, bos_id, eos_id, vocab_size = 1, 1, 2, VOCABULARY

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[byte + 4 for byte in text.encode()] for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token - 4 for token in ids if token >= 4).decode("utf-8", "replace")


class CharSpace:
    """A vector space with one axis a byte; the text so far is the normalised count."""

    reads_text = False

    def start(self) -> torch.Tensor:
        return torch.zeros(VOCABULARY, dtype=torch.float64)

    def push(self, state: torch.Tensor, token_ids: Sequence[int]) -> None:
        for token in token_ids:
            state[token] += 1

    def vector(self, state: torch.Tensor):  # type: ignore[no-untyped-def]
        return (state / state.norm().clamp_min(1e-30)).float().numpy()

    def prefixes(self, state: torch.Tensor, token_ids: Sequence[int]):  # type: ignore[no-untyped-def]
        state, found = state.clone(), []
        for token in token_ids:
            found.append(self.vector(state))
            self.push(state, [token])
        return np.stack(found)


def random_decoder(seed: int, max_positions: int = 128) -> Decoder:
    """One of the experts."""
    return byte_decoder(seed, max_positions)


@pytest.fixture(scope="session")
def make_decoder() -> Callable[..., Decoder]:
    return random_decoder


@pytest.fixture(scope="session")
def decoders() -> list[Decoder]:
    """Four different experts."""
    return [random_decoder(seed) for seed in range(4)]


@pytest.fixture
def make_ensemble() -> Callable[..., Ensemble]:
    """An ensemble in memory with every router; `runs` counts the tokens that each expert was asked to read."""

    def make(decoders: Sequence[Decoder], **settings: object) -> Ensemble:
        names = [f"e{number}" for number in range(len(decoders))]
        generator = torch.Generator().manual_seed(0)
        centres = torch.rand(len(decoders), VOCABULARY, generator=generator)
        data = RouterData(
            experts=names,
            language_expert={f"l{number}": name for number, name in enumerate(names)},
            fixed_weights={names[0]: 0.25, names[-1]: 0.75},
            space=CharSpace(),
            centres=centres / centres.norm(dim=-1, keepdim=True),
        )
        loaders = [lambda decoder=decoder: decoder for decoder in decoders]
        return Ensemble(names, loaders, ByteTokenizer(), data, EnsembleSettings(**settings))  # type: ignore[arg-type]

    return make
