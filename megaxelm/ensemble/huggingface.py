"""A mixture of experts as a transformers model.

    import megaxelm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("<run>/ensemble")
    tokenizer = AutoTokenizer.from_pretrained("<run>/ensemble", padding_side="left")
    print(tokenizer.decode(model.generate(**tokenizer("Habari", return_tensors="pt"), max_new_tokens=20)[0]))

`logits` are the mixture's log-probabilities, so transformers' own greedy search, sampling and beam search work on them. The forward pass
is a function of the tokens alone: with a cache or without, in one piece or in many, alone or beside other rows. A router that learns from
the experts' predictions therefore has all experts read every token; other routers let only experts with weight read. For inference only:
there are no gradients.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from megaxelm.ensemble.choice import choose_combine, choose_router
from megaxelm.ensemble.folder import Ensemble, load_ensemble, save_ensemble
from megaxelm.ensemble.huggingface_cache import RouterRows, XelmCache
from megaxelm.ensemble.huggingface_config import XelmConfig
from megaxelm.ensemble.routers import NO_TOKEN
from megaxelm.ensemble.side_by_side import combined_logits
from megaxelm.ensemble.weights import top_m as keep_top_m
from megaxelm.errors import RoutingError

# Arguments of transformers' from_pretrained that mean nothing here and are passed on by its Auto classes.
_PASSED_ON = {"trust_remote_code", "adapter_kwargs", "_from_auto", "low_cpu_mem_usage", "use_safetensors", "weights_only"}
_HUB = {"cache_dir", "force_download", "local_files_only", "revision", "token"}


class XelmForCausalLM(PreTrainedModel, GenerationMixin):
    """The ensemble of a folder as a causal language model. `ensemble` and its decoders are the same objects as `experts`.

    Raises:
        RoutingError: made without an ensemble; use `from_pretrained`.
    """

    config_class = XelmConfig
    base_model_prefix = ""
    main_input_name = "input_ids"

    def __init__(self, config: XelmConfig, ensemble: Ensemble | None = None) -> None:
        if ensemble is None:
            raise RoutingError("XelmForCausalLM is not made from a configuration: load an ensemble folder with from_pretrained(folder)")
        super().__init__(config)
        self.ensemble = ensemble
        self.experts = nn.ModuleList(ensemble.decoder(expert) for expert in range(len(ensemble.experts)))
        self.requires_grad_(False)
        self._languages: list[str | None] = [None]
        self.set_router()
        first = ensemble.decoder(0).config
        config.vocab_size, config.hidden_size, config.num_hidden_layers = first.vocab_size, first.hidden_size, first.num_layers
        config.max_position_embeddings = min(decoder.config.max_positions for decoder in self._decoders)
        tokenizer = ensemble.tokenizer
        pad = first.extra.get("pad_token_id")
        self.generation_config = GenerationConfig(
            bos_token_id=tokenizer.start_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.eos_id if pad is None else pad
        )
        self.eval()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *model_args: Any,
        config: XelmConfig | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: str | torch.device | None = None,
        **kwargs: Any,
    ) -> XelmForCausalLM:
        """Load an ensemble folder, or one of the Hugging Face hub.

        Args:
            dtype: of the weights; None is fp32, `auto` what the experts are stored in.
            device_map: one device for all experts, or `auto`: CUDA where there is one.

        Raises:
            RoutingError: not an ensemble folder, damaged, or an argument that is not known here.
        """
        hub = {name: kwargs.pop(name) for name in list(kwargs) if name in _HUB}
        foreign = sorted(name for name, value in kwargs.items() if name not in _PASSED_ON and value is not None)
        if foreign or model_args:
            raise RoutingError(f"from_pretrained: {', '.join(foreign) or 'a further argument'}: not known for an ensemble; leave it out")
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            try:
                folder = Path(snapshot_download(str(pretrained_model_name_or_path), **hub))
            except Exception as error:  # the client raises many kinds: no network, no such name, no access
                reason = f"{type(error).__name__}: {error}"
                raise RoutingError(f"{pretrained_model_name_or_path}: neither an ensemble folder nor on the hub ({reason})") from None
        if device_map == "auto":
            device_map = "cuda" if torch.cuda.is_available() else "cpu"
        if device_map is not None and not isinstance(device_map, str | torch.device | int):
            raise RoutingError(f"device_map = {device_map!r}: give one device for all experts, or auto")
        ensemble = load_ensemble(folder, _dtype(dtype if dtype is not None else torch_dtype, folder), device_map or "cpu")
        return cls(config or XelmConfig.from_pretrained(folder), ensemble)

    @property
    def _decoders(self) -> list[Any]:
        return list(self.experts)

    def set_router(
        self,
        name: str | None = None,
        *,
        top_m: int | None = None,
        expert: str | None = None,
        combine: str | None = None,
        **overrides: Any,
    ) -> None:
        """Choose who speaks from now on; what is left out is the ensemble's own.

        Args:
            name: language, tfidf, posterior, uniform or fixed. expert: this one alone, instead of a router.
            overrides: fields of the router's data: temperature, fixed_weights, posterior_decay, ...

        Raises:
            RoutingError: an unknown router or expert, or a value out of range.
        """
        chosen = None if name is None and not overrides else self.ensemble.router(name, **overrides)
        self.router, self.top_m = choose_router(self.ensemble, chosen, top_m, expert)
        self.combine = choose_combine(self.ensemble, combine)
        self._overrides = overrides
        self._expert = expert

    def set_languages(self, languages: str | Sequence[str | None] | None) -> None:
        """Languages of the rows of the next texts, for the language router: one for all rows, or one a text; None: not known."""
        self._languages = [languages] if languages is None or isinstance(languages, str) else list(languages)

    @torch.no_grad()
    def generate(self, *args: Any, language: str | Sequence[str | None] | None = None, **kwargs: Any) -> Any:
        """transformers' `generate`; `language`: of all texts, or one a text, for this call."""
        before = self._languages
        if language is not None:
            self.set_languages(language)
        try:
            parent: Any = super()
            return parent.generate(*args, **kwargs)
        finally:
            self._languages = before

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """No: `forward` makes a cache of its own kind."""
        return False

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: XelmCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: XelmCache | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Log-probabilities of the next token at each place.

        Args:
            input_ids: [batch, new] with the start token in front, as the ensemble's tokenizer gives them.
            attention_mask: [batch, past + new] or [batch, new]: 0 for padding, which is passed over wherever it stands.
            labels: [batch, new]; the loss is the mean of -log p over those that are not -100, shifted by one as transformers does.
            logits_to_keep: of so many of the last places only; 0: of all.
            past_key_values: what this model returned for the tokens before. cache: its name since transformers 5.24; give one of both.

        Returns:
            `logits` [batch, kept, vocab] fp32, normalised; those of padding are 0 and mean nothing.

        Raises:
            RoutingError: an argument that a mixture does not have, shapes that do not fit, a text that is too long, or as the router.
        """
        if input_ids is None or inputs_embeds is not None:
            raise RoutingError("inputs_embeds: a mixture reads tokens, since experts have embeddings of their own; give input_ids")
        if output_attentions or output_hidden_states:
            raise RoutingError("output_attentions, output_hidden_states: a mixture has none; ask an expert (experts/<name> is a model)")
        if not isinstance(logits_to_keep, int) or logits_to_keep < 0:
            raise RoutingError(f"logits_to_keep = {logits_to_keep!r}: choose 0 (all places) or a number of last places")
        if labels is not None and (logits_to_keep or labels.shape != input_ids.shape):
            raise RoutingError(f"labels {tuple(labels.shape)}: one for each of input_ids {tuple(input_ids.shape)}, without logits_to_keep")
        if past_key_values is not None and cache is not None:
            raise RoutingError("past_key_values and cache are two names of one thing; give one of them")
        given = past_key_values if cache is None else cache
        cache = self._cache(given, input_ids.shape[0])
        valid = _valid(attention_mask, input_ids, cache.columns)
        kept = min(logits_to_keep or input_ids.shape[1], input_ids.shape[1])
        fresh = [ids[mask].tolist() for ids, mask in zip(input_ids.cpu(), valid, strict=True)]
        shown = valid[:, valid.shape[1] - kept :]
        logprobs = self._read(cache, fresh, shown.sum(1).tolist())
        cache.columns += input_ids.shape[1]
        logits = logprobs.new_zeros(*shown.shape, logprobs.shape[-1])
        logits[shown.to(logits.device)] = logprobs
        loss = None if labels is None else _loss(logits, labels.to(logits.device))
        past = cache if use_cache or (use_cache is None and given is not None) else None
        output = CausalLMOutputWithPast(loss, logits, past)  # by place: the third field is named past_key_values or cache, by version
        return output if return_dict is None or return_dict else output.to_tuple()

    def _cache(self, given: Any, batch: int) -> XelmCache:
        if given is None:
            languages = self._languages
            if batch % len(languages):
                raise RoutingError(
                    f"{len(languages)} languages for {batch} rows: give one a text, or one for all (set_languages, generate(language=...))"
                )
            # As transformers repeats the rows of a text, for its beams.
            rows = [language for language in languages for _ in range(batch // len(languages))]
            data = self.ensemble.data
            routers = RouterRows(self.router, rows, [self.ensemble.tokenizer, data.space, self.router])
            return XelmCache(self._decoders, self.ensemble.experts, routers)
        if not isinstance(given, XelmCache):
            raise RoutingError(f"past_key_values is a {type(given).__name__}: give the one that this model returned, or none")
        if given.batch_size != batch:
            raise RoutingError(f"past_key_values has {given.batch_size} rows, input_ids {batch}")
        return given

    def _read(self, cache: XelmCache, fresh: Sequence[list[int]], keep: Sequence[int]) -> Tensor:
        """Let router and experts read the new tokens of each row; the mixture [sum of keep, vocab] after the last `keep` of each."""
        first = [not history for history in cache.histories]
        for history, tokens in zip(cache.histories, fresh, strict=True):
            history += tokens
        start, learns = self.ensemble.tokenizer.start_id, cache.routers.router.needs_expert_logprobs
        hidden: list[dict[int, Tensor]] = []
        told: list[Tensor | None] = [None] * len(fresh)
        if learns:
            new = {row: len(tokens) for row, tokens in enumerate(fresh) if tokens}
            hidden = [expert.advance(cache.histories, new) for expert in cache.experts]
            told = [*_token_logprobs(cache, hidden, fresh)]
        weights = []
        for row, tokens in enumerate(fresh):
            # A start token is no text; and without one the first token has been predicted by nobody.
            opens = first[row] and bool(tokens) and (learns or tokens[0] == start)
            heard = [NO_TOKEN, *tokens[1:]] if opens else tokens
            weights.append(cache.routers.advance(row, heard, told[row], keep[row]))
        dense = torch.cat(weights)
        if len(dense):
            dense = keep_top_m(dense, self.top_m).dense(len(cache.experts))
        parts = dense.split(list(keep))
        if not learns:
            for number, expert in enumerate(cache.experts):
                asked = {row: keep[row] for row, part in enumerate(parts) if bool((part[:, number] > -torch.inf).any())}
                hidden.append(expert.advance(cache.histories, asked))
        states = [_flat(found, keep) for found in hidden]
        loaders = [lambda decoder=expert.decoder: decoder for expert in cache.experts]
        return combined_logits(loaders, states, dense, self.combine)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Write the ensemble folder with the experts as they are now and the router that was set.

        Raises:
            RoutingError: an argument that is not known here, or one expert alone was set.
        """
        foreign = sorted(name for name, value in kwargs.items() if value and name not in ("safe_serialization", "max_shard_size"))
        if foreign:
            raise RoutingError(f"save_pretrained: {', '.join(foreign)}: not known for an ensemble; leave it out")
        if self._expert is not None:
            raise RoutingError(f"save_pretrained: the expert {self._expert} alone was set; it is a model by itself: experts/{self._expert}")
        from megaxelm.model.hub import save_pretrained as save_expert

        out, ensemble = Path(save_directory), self.ensemble
        out.mkdir(parents=True, exist_ok=True)
        data = replace(ensemble.data, **self._overrides) if self._overrides else ensemble.data
        top_m = None if self.top_m == len(ensemble.experts) else self.top_m
        settings = replace(ensemble.settings, router=self.router.name, top_m=top_m, combine=self.combine)
        # On the same disk, so that the files are linked and not copied.
        with tempfile.TemporaryDirectory(dir=out, prefix=".saving-") as aside:
            exports = {name: Path(aside) / name for name in ensemble.experts}
            for name, decoder in zip(ensemble.experts, self._decoders, strict=True):
                save_expert(decoder, exports[name], dtype=decoder.dtype, tokenizer_folder=ensemble.tokenizer.folder)
            save_ensemble(out, exports, ensemble.tokenizer.folder, data, settings, ensemble.languages)


def _valid(attention_mask: Tensor | None, input_ids: Tensor, past: int) -> Tensor:
    """[batch, new] on the CPU: which of `input_ids` are text."""
    batch, new = input_ids.shape
    if attention_mask is None:
        return torch.ones(batch, new, dtype=torch.bool)
    if attention_mask.shape not in ((batch, new), (batch, past + new)):
        raise RoutingError(f"attention_mask {tuple(attention_mask.shape)}: expected [{batch}, {new}] or [{batch}, {past + new}]")
    return attention_mask[:, attention_mask.shape[1] - new :].bool().cpu()


def _token_logprobs(cache: XelmCache, hidden: Sequence[dict[int, Tensor]], fresh: Sequence[Sequence[int]]) -> list[Tensor | None]:
    """Log-probability [tokens, experts] fp64 of each new token of a row under each expert; 0 for the first of a text."""
    found: list[Tensor | None] = [torch.zeros(len(tokens), len(cache.experts), dtype=torch.float64) for tokens in fresh]
    for number, (expert, states) in enumerate(zip(cache.experts, hidden, strict=True)):
        before: list[Tensor] = []
        labels: list[int] = []
        places: list[tuple[int, int]] = []
        for row, own in states.items():
            has_past = row in expert.last
            before += [expert.last[row].unsqueeze(0)] if has_past else []
            before.append(own[:-1])
            labels += fresh[row] if has_past else fresh[row][1:]
            places += [(row, place) for place in range(0 if has_past else 1, len(fresh[row]))]
            expert.last[row] = own[-1]
        if not labels:
            continue
        scores = expert.decoder.score_hidden(torch.cat(before), torch.tensor(labels, device=before[0].device)).target_logprob
        for (row, place), value in zip(places, scores.double().tolist(), strict=True):
            found[row][place, number] = value  # type: ignore[index]
    return found


def _flat(found: dict[int, Tensor], keep: Sequence[int]) -> Tensor | None:
    """Hidden states [sum of keep, hidden] of all rows; zeros where the expert was not asked, None if it was nowhere."""
    if not found:
        return None
    some = next(iter(found.values()))
    parts = [
        found[row][found[row].shape[0] - count :] if row in found else some.new_zeros(count, some.shape[1])
        for row, count in enumerate(keep)
    ]
    return torch.cat(parts)


def _loss(logprobs: Tensor, labels: Tensor) -> Tensor:
    """Mean of -log p(label) over the labels that are not -100, each predicted from the place before it."""
    targets = labels[:, 1:]
    counted = targets != -100
    picked = logprobs[:, :-1].gather(-1, targets.masked_fill(~counted, 0).unsqueeze(-1)).squeeze(-1)
    return -(picked * counted).sum() / counted.sum()


def _dtype(given: torch.dtype | str | None, folder: Path) -> torch.dtype:
    if given is None:
        return torch.float32
    if given == "auto":
        from megaxelm.files import read_json

        experts = sorted([*folder.glob("experts/*/config.json"), *folder.glob("base*/config.json")])
        stored = read_json(experts[0]) if experts else {}
        given = stored.get("dtype") or stored.get("torch_dtype") or "float32"
    found = given if isinstance(given, torch.dtype) else getattr(torch, str(given).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise RoutingError(f"dtype = {given!r}: choose float32, bfloat16, or auto")
    return found
