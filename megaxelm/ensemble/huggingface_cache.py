"""What a mixture remembers of the rows of a batch between two calls of `XelmForCausalLM.forward`.

Of each row: the tokens so far, the router's state, and of each expert that was asked its KV cache. An expert reads a row's tokens when it
first gets weight there, and what it has missed when it gets weight again.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from megaxelm.ensemble.routers import NO_TOKEN, Request, Router
from megaxelm.errors import RoutingError

if TYPE_CHECKING:
    from megaxelm.model.decoder import Decoder, KVCache

_CACHE_STEP = 256
"""Caches grow by so many tokens, so that a long text is not copied for every token."""


class RouterRows:
    """The state of a router for each row by itself, so that rows can be copied and put in another order.

    Args:
        shared: what states refer to and do not own (tokenizer, vector space); it is not copied with them.
    """

    def __init__(self, router: Router, languages: Sequence[str | None], shared: Sequence[object]) -> None:
        self.router, self.languages, self.shared = router, list(languages), shared
        self.states: list[Any] = [None] * len(self.languages)  # None: no token has come yet

    def advance(self, row: int, tokens: Sequence[int], logprobs: Tensor | None, keep: int) -> Tensor:
        """Tell one row's router of `tokens`; its log weights [keep, experts] after each of the last `keep` of them.

        Args:
            tokens: `NO_TOKEN` for a start token. logprobs: [tokens, experts], for a router that learns from them.
        """
        if not tokens:
            return torch.empty(0, self.router.num_experts, dtype=torch.float64)
        told = 0
        if self.states[row] is None:
            if not self.router.needs_expert_logprobs:
                # A prompt is read in one go: all of it where weights never change, else up to the first weights that are wanted.
                told = len(tokens) if self.router.constant else min(len(tokens), len(tokens) - keep + 1)
            prompt = [token for token in tokens[:told] if token != NO_TOKEN]
            self.states[row] = self.router.start([Request(prompt, self.languages[row])])
        if self.router.constant:
            return self.router.weights(self.states[row])[0].expand(keep, -1)
        state, found = self.states[row], []
        for position in range(max(told - 1, 0), len(tokens)):
            if position >= told:
                given = None if logprobs is None else logprobs[position].unsqueeze(0)
                self.router.update(state, torch.tensor([tokens[position]]), given)
            if position >= len(tokens) - keep:
                found.append(self.router.weights(state)[0].clone())
        return torch.stack(found) if found else torch.empty(0, self.router.num_experts, dtype=torch.float64)

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row may occur more than once."""
        used: set[int] = set()
        states = []
        for row in rows:
            states.append(self._copy(self.states[row]) if row in used else self.states[row])
            used.add(row)
        self.states = states
        self.languages = [self.languages[row] for row in rows]

    def _copy(self, state: Any) -> Any:
        return copy.deepcopy(state, {id(thing): thing for thing in self.shared})


class ExpertRows:
    """What one expert has read of the rows of a batch."""

    def __init__(self, decoder: Decoder, name: str) -> None:
        self.decoder, self.name = decoder, name
        self.rows: list[int] = []  # the batch's row in each row of the cache
        self.read: list[int] = []  # tokens read of it
        self.cache: KVCache | None = None
        self.last: dict[int, Tensor] = {}  # hidden state [hidden] after the last token of a row, for routers that learn

    def advance(self, histories: Sequence[Sequence[int]], keep: Mapping[int, int]) -> dict[int, Tensor]:
        """Read what it lacks of the rows in `keep`; hidden states [keep, hidden] after the last tokens of each.

        Raises:
            RoutingError: a row is longer than the expert has positions.
        """
        if not keep:
            return {}
        longest = max(len(histories[row]) for row in keep)
        if longest > self.decoder.config.max_positions:
            raise RoutingError(
                f"a text of {longest} tokens is longer than the {self.decoder.config.max_positions} positions of expert {self.name}: "
                "shorten the prompt or lower max_new_tokens"
            )
        for row in keep:
            if row not in self.rows:
                self.rows.append(row)
                self.read.append(0)
        cache = self._reserve(longest)
        new = [list(histories[row][read:]) if row in keep else [] for row, read in zip(self.rows, self.read, strict=True)]
        width = max(map(len, new))
        device = self.decoder.device
        tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in new], dtype=torch.int64, device=device)
        lengths = torch.tensor([len(row) for row in new], dtype=torch.int64, device=device)
        only_last = all(count <= 1 for count in keep.values())
        hidden = self.decoder.decode(tokens, lengths, cache, all_positions=not only_last)
        found = {}
        for index, row in enumerate(self.rows):
            self.read[index] += len(new[index])
            if row in keep:
                end = len(new[index])
                found[row] = hidden[index : index + 1][: keep[row]] if only_last else hidden[index, end - keep[row] : end]
        return found

    def _reserve(self, length: int) -> KVCache:
        """The cache with room for all rows of so many tokens."""
        old = self.cache
        if old is not None and old.lengths.shape[0] == len(self.rows) and old.max_length >= length:
            return old
        positions = self.decoder.config.max_positions
        room = max(-(-length // _CACHE_STEP) * _CACHE_STEP, 0 if old is None else old.max_length)
        cache = self.decoder.new_cache(len(self.rows), min(room, positions))
        if old is not None:
            rows, filled = old.lengths.shape[0], min(old.longest, old.max_length)
            for target, source in zip([*cache.keys, *cache.values], [*old.keys, *old.values], strict=True):
                target[:rows, :, :filled] = source[:, :, :filled]
            cache.lengths[:rows] = old.lengths
            cache.longest = old.longest
        self.cache = cache
        return cache

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows of the batch, in this order; a row may occur more than once."""
        where = {row: index for index, row in enumerate(self.rows)}
        taken = [(row, where[old]) for row, old in enumerate(rows) if old in where]
        places = torch.tensor([index for _, index in taken], dtype=torch.int64, device=self.decoder.device)
        self.cache = self.cache.select(places) if self.cache is not None and taken else None
        self.read = [self.read[index] for _, index in taken]
        self.rows = [row for row, _ in taken]
        self.last = {row: self.last[old] for row, old in enumerate(rows) if old in self.last}


class XelmCache(Cache):
    """`past_key_values` of a mixture: caches of its experts, the router's state, and the tokens of each row.

    Made by the model; `reorder_cache`, `batch_select_indices` and `batch_repeat_interleave` act in place, as transformers wants.
    """

    def __init__(self, decoders: Sequence[Decoder], names: Sequence[str], routers: RouterRows) -> None:
        super().__init__(layers=[])
        self.experts = [ExpertRows(decoder, name) for decoder, name in zip(decoders, names, strict=True)]
        self.routers = routers
        self.histories: list[list[int]] = [[] for _ in routers.states]
        self.columns = 0

    def __len__(self) -> int:
        return len(self.experts)

    @property
    def batch_size(self) -> int:
        """Rows."""
        return len(self.histories)

    @property
    def is_initialized(self) -> bool:
        """Whether anything has been read."""
        return self.columns > 0

    @property
    def is_croppable(self) -> bool:
        """No: a router cannot forget tokens."""
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of `input_ids` that have been read, padding counted."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Positions of the experts."""
        return min(expert.decoder.config.max_positions for expert in self.experts)

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row may occur more than once."""
        self.histories = [list(self.histories[row]) for row in rows]
        self.routers.select(rows)
        for expert in self.experts:
            expert.select(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i goes on with what was row beam_idx[i]."""
        self.select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.select(torch.arange(self.batch_size)[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times, one after the other."""
        self.select([row for row in range(self.batch_size) for _ in range(repeats)])

    def reset(self) -> None:
        """Forget all rows' texts."""
        shared = self.routers
        self.__init__(  # type: ignore[misc]
            [expert.decoder for expert in self.experts],
            [expert.name for expert in self.experts],
            RouterRows(shared.router, shared.languages, shared.shared),
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Raises RoutingError, unless nothing is to be removed."""
        if tokens_to_remove:
            raise RoutingError("a mixture's cache cannot take tokens back: assisted and prompt-lookup decoding are not possible with it")

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Raises RoutingError: the experts fill their caches themselves."""
        raise RoutingError("a mixture's cache is filled by XelmForCausalLM only; give it to no other model")
