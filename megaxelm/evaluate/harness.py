"""lm-evaluation-harness on a mixture: the model `xelm`, and what `megaxelm evaluate RUN --tasks ...` calls.

The harness loads no plugins by itself: whoever imports this module has registered the model. Log-likelihoods come from one number a token
of each expert; the arg max of the mixture is taken only on the rows of a continuation. The start token of the ensemble's tokenizer stands
in front of every text, as in training.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megaxelm.ensemble.choice import choose_combine, choose_router
from megaxelm.ensemble.continuations import Pair, score_continuations
from megaxelm.ensemble.folder import Ensemble, load_ensemble
from megaxelm.ensemble.generation import generate
from megaxelm.ensemble.scoring import score_documents
from megaxelm.ensemble.windows import Windows
from megaxelm.errors import RoutingError, StageError
from megaxelm.evaluate.rungs import MIXTURE, open_rung

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise StageError(f"--tasks needs the lm-evaluation-harness ({error}): pip install 'megaxelm[eval]'") from None

_BATCH = 64
_MAX_GEN_TOKS = 256


@register_model("xelm")
class XelmLM(TemplateLM):
    """A mixture of experts as a model of the harness.

    Args:
        pretrained: an ensemble, or its folder.
        router, top_m, combine: None takes the ensemble's own. expert: this one alone. language: of all texts, for the language router.
        batch_size: texts whose hidden states are held at one time, and texts that are written on together; `auto`: 64.
        max_gen_toks: tokens that are written where a task does not say.

    Raises:
        RoutingError: as `choose_router`, or a batch size that is no number.
    """

    def __init__(
        self,
        pretrained: Ensemble | str | Path,
        router: str | None = None,
        top_m: int | None = None,
        expert: str | None = None,
        combine: str | None = None,
        language: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_gen_toks: int = _MAX_GEN_TOKS,
    ) -> None:
        super().__init__()
        if not isinstance(pretrained, Ensemble):
            pretrained = load_ensemble(pretrained, device=device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.ensemble = pretrained
        self.router_name, self.expert, self.language = router, expert, language
        self.router, self.top_m = choose_router(pretrained, router, top_m, expert)
        self.combine = choose_combine(pretrained, combine)
        self.batch_size = _positive("batch_size", _BATCH if batch_size in (None, "auto") else batch_size)
        self.max_gen_toks = _positive("max_gen_toks", max_gen_toks)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self.ensemble.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands in front of every text."""
        return self.ensemble.tokenizer.start_id

    @property
    def max_length(self) -> int:
        """Tokens that every expert which may be asked can read."""
        names = self.ensemble.experts if self.expert is None else [self.expert]
        return min(self.ensemble.decoder(self.ensemble.experts.index(name)).config.max_positions for name in names)

    @property
    def tokenizer_name(self) -> str:
        """Tells requests that are cached with another tokenizer apart."""
        return self.ensemble.tokenizer.fingerprint

    def get_model_info(self) -> dict[str, Any]:
        """What stands in the results beside the harness's own settings."""
        return {
            "model": "xelm",
            "experts": self.ensemble.experts,
            "router": None if self.expert else self.router.name,
            "expert": self.expert,
            "top_m": self.top_m,
            "combine": self.combine,
            "language": self.language,
            "batch_size": self.batch_size,
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text, never with special tokens: the start token is put in front when the text is read."""
        return self.ensemble.tokenizer.encode([string])[0]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        start = self.prefix_token_id
        # The harness gives an empty context as the start token, which is put in front here anyway.
        pairs = [Pair([] if list(context) == [start] else context, continuation, self.language) for _, context, continuation in requests]
        with tqdm(total=len(pairs), desc="loglikelihood", unit="text", file=sys.stderr, mininterval=0.5, disable=disable_tqdm) as bar:
            scores = score_continuations(
                self.ensemble.decoders, pairs, start, self.router, self.top_m, self.combine, self.batch_size, on_pairs=bar.update
            )
        for (key, _, _), score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", key, tuple(score))
        return [tuple(score) for score in scores]  # type: ignore[misc]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows without overlap but for one token, as the harness cuts them for every model."""
        texts = [request.args[0] for request in requests]
        documents = self.ensemble.tokenizer.encode(texts)
        languages = [self.language] * len(documents)
        found: list[float] = []
        with tqdm(total=len(texts), desc="rolling", unit="text", file=sys.stderr, mininterval=0.5, disable=disable_tqdm) as bar:
            for begin in range(0, len(documents), self.batch_size):
                part = slice(begin, begin + self.batch_size)
                scores = score_documents(
                    self.ensemble.decoders,
                    documents[part],
                    self.prefix_token_id,
                    self.router,
                    languages[part],
                    self.top_m,
                    windows=Windows(min_context=1),
                    combine=self.combine,
                )
                found += [float(score.sum()) for score in scores]
                bar.update(len(scores))
        for text, value in zip(texts, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), value)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Write on from each context until a stop string, EOS, or `max_gen_toks`; a context that is too long loses its front."""
        found = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(index)
        with tqdm(total=len(requests), desc="generate", unit="text", file=sys.stderr, mininterval=0.5, disable=disable_tqdm) as bar:
            for indexes in groups.values():
                options = _generation_options(requests[indexes[0]].args[1], self.max_gen_toks)
                until, options = options.pop("until"), options
                indexes = sorted(indexes, key=lambda index: -len(requests[index].args[0]))
                for begin in range(0, len(indexes), self.batch_size):
                    part = indexes[begin : begin + self.batch_size]
                    prompts = [self._fitting(requests[index].args[0], options["max_new_tokens"]) for index in part]
                    results = generate(
                        self.ensemble,
                        prompts,
                        [self.language] * len(part),
                        top_m=None if self.expert else self.top_m,
                        router=None if self.expert else self.router,
                        expert=self.expert,
                        combine=self.combine,
                        stop=[stop for stop in until if stop],
                        max_batch=self.batch_size,
                        **options,
                    )
                    for index, result in zip(part, results, strict=True):
                        found[index] = result.text
                        self.cache_hook.add_partial("generate_until", requests[index].args, found[index])
                    bar.update(len(part))
        return found

    def _fitting(self, context: str, max_new_tokens: int) -> str:
        """The end of a context that leaves room for what is written."""
        room = self.max_length - max_new_tokens
        if room < 1:
            raise RoutingError(
                f"max_gen_toks = {max_new_tokens}: the experts have {self.max_length} positions, which leaves no room for a context; "
                "lower it in the task's generation_kwargs"
            )
        ids = self.tok_encode(context)
        keep = room
        # The text of the last ids may be cut into more ids than it was made of.
        while len(ids) > room:
            context = self.ensemble.tokenizer.decode(ids[len(ids) - keep :])
            ids, keep = self.tok_encode(context), keep - 1
        return context


def run_tasks(
    ensemble: Ensemble,
    tasks: Sequence[str],
    include_path: str | Path | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Results of harness tasks, as `lm_eval.simple_evaluate` gives them, without the samples.

    Args:
        include_path: folder of further task files (YAML). limit: documents a task; below 1: a share. options: as `XelmLM`.

    Raises:
        StageError: an unknown task. RoutingError: as `XelmLM`.
    """
    import lm_eval

    if include_path is not None and not Path(include_path).is_dir():
        raise StageError(f"--include_path {include_path}: no such folder; it holds the YAML files of further tasks")
    model = XelmLM(ensemble, **options)
    about = model.get_model_info()
    who = f"expert {model.expert}" if model.expert else f"router {about['router']}, {model.top_m} of {len(ensemble.experts)} experts"
    print(f"xelm: {who}, {model.combine}, batches of {model.batch_size}", file=sys.stderr)
    manager = _task_manager(tasks, include_path)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise StageError(
            f"--tasks {', '.join(unknown)}: lm-evaluation-harness knows no such task; `lm-eval ls tasks` lists its own, and --include_path "
            "adds a folder of task files"
        )
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        batch_size=model.batch_size,
        limit=limit,
        log_samples=False,
        task_manager=manager,
    )
    assert found is not None  # one process
    return dict(found)


def run_rungs(
    run_folder: Path, rungs: Sequence[str], tasks: Sequence[str], device: torch.device | str = "cpu", **options: Any
) -> dict[str, dict[str, Any]]:
    """Results of harness tasks for several rungs of a run's ladder (`megaxelm.evaluate.rungs`), by rung.

    Args:
        options: as `run_tasks`; router, top_m and combine are those of the mixture.

    Raises:
        StageError, RoutingError: as `run_tasks`.
    """
    of_mixture = ("router", "top_m", "combine")
    found = {}
    for rung in rungs:
        given = {key: value for key, value in options.items() if rung == MIXTURE or key not in of_mixture}
        print(f"rung {rung}:", file=sys.stderr)
        found[rung] = run_tasks(open_rung(run_folder, rung, device), tasks, **given)
    return found


def rungs_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A row a rung, a column a task and metric: value and standard error."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    columns = list(dict.fromkeys(column for found in results.values() for column in _figures(found)))
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("rung", no_wrap=True)
    for task, metric in columns:
        table.add_column(f"{task} {metric}", justify="right")
    for rung, found in results.items():
        figures = _figures(found)
        table.add_row(rung, *(figures.get(column, "-") for column in columns))
    console = Console(width=max(120, 12 + 22 * len(columns)), highlight=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def _figures(results: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """Task and metric -> value and standard error, as they are shown."""
    found = {}
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or isinstance(value, str):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            shown = f"{value:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else "")
            found[task, metric if kind == "none" else f"{metric} ({kind})"] = shown
    return found


def _task_manager(tasks: Sequence[str], include_path: str | Path | None) -> Any:
    """Task files of the folder alone where they are all that is asked for: to look through the harness's own takes many seconds."""
    from lm_eval.tasks import TaskManager

    if include_path is None:
        return TaskManager()
    alone = TaskManager(include_path=str(include_path), include_defaults=False)
    if all(task in alone.all_subtasks for task in tasks):
        return alone
    return TaskManager(include_path=str(include_path))


def results_text(results: Mapping[str, Any]) -> str:
    """The harness's own tables of tasks and, where there are any, groups."""
    from lm_eval.utils import make_table

    tables = [make_table(results)]
    if results.get("groups"):
        tables.append(make_table(results, "groups"))
    return "\n".join(tables)


def results_json(results: Mapping[str, Any]) -> str:
    """Results as JSON; functions and numbers of numpy as the harness writes them."""
    from lm_eval.utils import handle_non_serializable

    return json.dumps(dict(results), indent=1, default=handle_non_serializable, ensure_ascii=False) + "\n"


def _positive(name: str, value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        raise RoutingError(f"{name} = {value!r}: choose a whole number of at least 1")
    return number


_GENERATION = {"do_sample", "max_gen_toks", "until", "temperature", "top_p", "seed"}


def _generation_options(given: Mapping[str, Any], max_gen_toks: int) -> dict[str, Any]:
    """A task's `generation_kwargs` as arguments of `generate`, and `until`.

    Raises:
        RoutingError: a setting that our generation does not have.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    found = dict(normalize_gen_kwargs(dict(given), max_gen_toks))
    foreign = sorted(name for name in found if name not in _GENERATION)
    if foreign:
        raise RoutingError(f"generation_kwargs: {', '.join(foreign)}: not known here; there are {', '.join(sorted(_GENERATION))}")
    if found["do_sample"] and not found.get("temperature"):
        found["temperature"] = 1.0
    return {
        "until": list(found.get("until") or []),
        "max_new_tokens": _positive("max_gen_toks", found["max_gen_toks"]),
        "temperature": float(found["temperature"]) if found["do_sample"] else 0.0,
        "top_p": float(found.get("top_p", 1.0)),
        "seed": int(found.get("seed", 0)),
    }
