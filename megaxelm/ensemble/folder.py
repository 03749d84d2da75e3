"""The ensemble folder: experts, tokenizer and routers in one place, with relative paths only, so it moves and loads elsewhere.

```
ensemble/
  config.json        model_type "xelm": experts in order (the fallback expert last), their languages, default router, top_m, combine
  tokenizer/         Hugging Face tokenizer files; again beside config.json, where transformers looks for them
  router/            router.json, and for `tfidf` centres.safetensors and the vector space
  experts/<name>/    Hugging Face checkpoint folder; hard links to the exports where the disk allows, else copies
  base/              what experts that are low-rank deltas (adapters in peft's format) share, where no expert is that model itself
```
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch

from megaxelm.ensemble.routers import ROUTER_NAMES, Router, RouterData, make_router
from megaxelm.errors import MegaxelmError, RoutingError
from megaxelm.files import is_model_folder, read_json, write_json
from megaxelm_kernels.mixture import COMBINE, TEMPERATURE_ON

if TYPE_CHECKING:
    from megaxelm.corpus.tokenizer import Tokenizer
    from megaxelm.model.decoder import Decoder
    from megaxelm.model.source import WeightSource
    from megaxelm.model.stacked import StackedDecoder

MODEL_TYPE = "xelm"
FORMAT = 2
SPACE_NAME = "space"


@dataclass(frozen=True)
class EnsembleSettings:
    """How the ensemble speaks when the caller does not say."""

    router: str = "posterior"
    top_m: int | None = None
    combine: str = "mixture"
    temperature_on: str = "mixture"
    devices: int = 1

    def check(self, num_experts: int, where: str) -> None:
        """Raises RoutingError for a value out of range, naming `where` it stands; `num_experts` are the trained ones."""
        if self.router not in ROUTER_NAMES:
            raise RoutingError(f"{where}: router = {self.router!r}: choose one of {', '.join(ROUTER_NAMES)}")
        if self.combine not in COMBINE:
            raise RoutingError(f"{where}: combine = {self.combine!r}: choose one of {', '.join(COMBINE)}")
        if self.temperature_on not in TEMPERATURE_ON:
            raise RoutingError(f"{where}: temperature_on = {self.temperature_on!r}: choose one of {', '.join(TEMPERATURE_ON)}")
        if self.top_m is not None and not (isinstance(self.top_m, int) and 1 <= self.top_m <= num_experts):
            raise RoutingError(f"{where}: top_m = {self.top_m}: choose 1 to {num_experts}, the number of experts in this ensemble")


@dataclass
class Ensemble:
    """Experts, tokenizer and routers. A decoder is loaded when it is first asked for, and kept.

    `experts` are the trained ones, in the order of the weights, and behind them the fallback expert where there is one.
    """

    experts: list[str]
    loaders: Sequence[Callable[[], Decoder]]
    tokenizer: Tokenizer
    data: RouterData
    settings: EnsembleSettings = EnsembleSettings()
    languages: dict[str, dict[str, int]] = field(default_factory=dict)  # expert -> language -> training tokens
    sources: Sequence[Callable[[], WeightSource]] | None = None
    """Weights that are read one tensor at a time; None: those of the decoders."""
    dtype: torch.dtype = torch.float32
    device: str | torch.device = "cpu"
    _decoders: dict[int, Decoder] = field(default_factory=dict, repr=False)
    _stack: tuple[Any, StackedDecoder] | None = field(default=None, repr=False)

    @property
    def trained(self) -> list[str]:
        """The experts without the fallback: those that `top_m` counts."""
        return self.data.trained

    @property
    def fallback(self) -> str | None:
        """Name of the fallback expert."""
        return self.data.fallback

    def decoder(self, expert: int) -> Decoder:
        """The decoder of expert number `expert`, in evaluation mode.

        Raises:
            ModelError, RoutingError: its folder is missing, damaged, or does not fit the tokenizer.
        """
        if expert not in self._decoders:
            self._decoders[expert] = self.load_decoder(expert)
        return self._decoders[expert]

    def load_decoder(self, expert: int) -> Decoder:
        """As `decoder`, but one that is not held yet is not kept, so that its memory is free when the caller lets it go."""
        if expert in self._decoders:
            return self._decoders[expert]
        decoder = self.loaders[expert]()
        self._check_vocabulary(expert, decoder.config.vocab_size)
        return decoder.eval()

    def stack(self, experts: Sequence[int] | None = None, resident: int | None = None, kernels: str = "auto") -> StackedDecoder:
        """Some experts (None: all) as one model, in this order; kept until another one is asked for.

        Raises:
            ModelError: as `load_stack`. RoutingError: an expert that does not fit the tokenizer.
        """
        from megaxelm.model.source import decoder_source
        from megaxelm.model.stacked import load_stack

        chosen = list(range(len(self.experts)) if experts is None else experts)
        key = (chosen, resident, kernels)
        if self._stack is not None and self._stack[0] == key:
            return self._stack[1]
        self._stack = None
        given = [self.sources[expert]() if self.sources is not None else decoder_source(self.decoder(expert)) for expert in chosen]
        for expert, source in zip(chosen, given, strict=True):
            self._check_vocabulary(expert, source.config.vocab_size)
        stack = load_stack(given, self.dtype, self.device, resident=resident, kernels=kernels)
        self._stack = key, stack
        return stack

    def _check_vocabulary(self, expert: int, vocab_size: int) -> None:
        if vocab_size < self.tokenizer.vocab_size:
            raise RoutingError(
                f"expert {self.experts[expert]}: its vocabulary has {vocab_size} pieces, the ensemble's tokenizer "
                f"{self.tokenizer.vocab_size}; all experts must come from the seed that the tokenizer belongs to"
            )

    @property
    def decoders(self) -> list[Callable[[], Decoder]]:
        """One function a expert, as `scoring` takes them."""
        return [lambda expert=expert: self.decoder(expert) for expert in range(len(self.experts))]  # type: ignore[misc]

    @property
    def passing_decoders(self) -> list[Callable[[], Decoder]]:
        """As `decoders`, of which only those that are held already stay in memory."""
        return [lambda expert=expert: self.load_decoder(expert) for expert in range(len(self.experts))]  # type: ignore[misc]

    def router(self, name: str | None = None, **overrides: Any) -> Router:
        """A router of this ensemble; None is its default one. `overrides` as in `make_router`."""
        return make_router(name or self.settings.router, self.data, **overrides)


def save_ensemble(
    out: Path,
    experts: Mapping[str, Path],
    tokenizer_folder: Path,
    data: RouterData,
    settings: EnsembleSettings | None = None,
    languages: Mapping[str, Mapping[str, int]] | None = None,
) -> None:
    """Write an ensemble folder into `out`.

    Args:
        experts: name -> export folder (Hugging Face checkpoint), in the order of the weights; the fallback expert last.
        data: what the routers are made from; `data.experts` must be the same names in the same order, `data.fallback` the last or None.
        languages: expert -> language -> training tokens, for `config.json`.

    Raises:
        RoutingError: an export is missing, or names do not agree.
    """
    from megaxelm.model.hub import copy_tokenizer

    settings = settings or EnsembleSettings()
    if list(experts) != list(data.experts) or not experts:
        raise RoutingError(
            f"ensemble: experts {', '.join(experts) or 'none'} do not agree with those of the routers: {', '.join(data.experts)}"
        )
    if data.fallback not in (None, data.experts[-1]) or not data.trained:
        raise RoutingError(f"ensemble: the fallback {data.fallback} must be the last expert, behind at least one trained one")
    settings.check(len(data.trained), "ensemble")
    out.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    for name, folder in experts.items():
        if not is_model_folder(folder):
            raise RoutingError(f"expert {name}: no export in {folder} (config.json is missing); train or export it first")
        target = out / "experts" / name
        _link_folder(folder, target)
        found = dict((languages or {}).get(name, {}))
        entries.append({"name": name, "folder": f"experts/{name}", "languages": found, "fallback": name == data.fallback})
    _link_bases(out, experts, entries)
    if not tokenizer_folder.is_dir():
        raise RoutingError(f"ensemble: no tokenizer in {tokenizer_folder}; run the tokenizer stage first")
    shutil.copytree(tokenizer_folder, out / "tokenizer", dirs_exist_ok=True, ignore=shutil.ignore_patterns("stage.json"))
    copy_tokenizer(out / "tokenizer", out)
    _save_routers(out / "router", data)
    config = {"model_type": MODEL_TYPE, "architectures": ["XelmForCausalLM"], "format": FORMAT, "experts": entries}
    write_json(out / "config.json", config | asdict(settings))


def load_ensemble(folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Ensemble:
    """Read an ensemble folder; decoders are loaded later, when one is needed.

    Raises:
        RoutingError: not an ensemble folder, or something of it is missing or damaged. TokenizerError, ClusterError: those parts.
    """
    folder = Path(folder)
    config = _read(folder / "config.json", folder)
    if config.get("model_type") != MODEL_TYPE:
        raise RoutingError(
            f"{folder / 'config.json'}: model_type = {config.get('model_type')!r}, expected {MODEL_TYPE!r}: not an ensemble folder"
        )
    if config.get("format") != FORMAT:
        raise RoutingError(
            f"{folder / 'config.json'}: format = {config.get('format')!r}, this program reads {FORMAT}; build the ensemble again"
        )
    names, loaders, sources, languages, fallbacks = [], [], [], {}, []
    try:
        for entry in config["experts"]:
            path = folder / _inside(entry["folder"], folder)
            if not is_model_folder(path):
                raise RoutingError(
                    f"ensemble {folder}: the expert {entry['name']} is missing ({entry['folder']}/config.json); build it again"
                )
            base = entry.get("base")  # of an adapter alone
            if base is not None and not (folder / _inside(base, folder) / "config.json").is_file():
                raise RoutingError(
                    f"ensemble {folder}: the base of the expert {entry['name']} is missing ({base}/config.json); build it again"
                )
            names.append(entry["name"])
            loaders.append(_loader(path, dtype, device))
            sources.append(partial(_source, path))
            languages[entry["name"]] = dict(entry["languages"])
            fallbacks += [entry["name"]] if entry["fallback"] else []
        settings = EnsembleSettings(config["router"], config["top_m"], config["combine"], config["temperature_on"], config["devices"])
    except (KeyError, TypeError, AttributeError) as error:
        raise RoutingError(f"{folder / 'config.json'}: damaged ({type(error).__name__}: {error}); build the ensemble again") from None
    if not names:
        raise RoutingError(f"{folder / 'config.json'}: names no expert; build the ensemble again")
    if fallbacks and (fallbacks != names[-1:] or len(names) == 1):
        raise RoutingError(
            f"{folder / 'config.json'}: the fallback {', '.join(fallbacks)} is not the last expert; build the ensemble again"
        )
    settings.check(len(names) - len(fallbacks), str(folder / "config.json"))

    from megaxelm.corpus.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder / "tokenizer")
    data = _load_routers(folder / "router", names, fallbacks[0] if fallbacks else None, tokenizer)
    return Ensemble(names, loaders, tokenizer, data, settings, languages, sources, dtype, device)


def read_devices(folder: Path) -> int:
    """Devices that the experts of an ensemble folder are to be spread over."""
    return int(_read(folder / "config.json", folder).get("devices", 1))


def _loader(path: Path, dtype: torch.dtype, device: str | torch.device) -> Callable[[], Decoder]:
    def load() -> Decoder:
        from megaxelm.model.hub import load_pretrained

        return load_pretrained(path, dtype=dtype).to(device)

    return load


def _source(path: Path) -> WeightSource:
    from megaxelm.model.hub import open_pretrained

    return open_pretrained(path)


def _inside(relative: str, folder: Path) -> PurePosixPath:
    path = PurePosixPath(relative)
    if path.is_absolute() or ".." in path.parts:
        raise RoutingError(f"{folder / 'config.json'}: folder = {relative!r} leads out of the ensemble folder; build it again")
    return path


def _read(path: Path, folder: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RoutingError(
            f"{folder}: not an ensemble folder ({path.relative_to(folder)} is missing); `megaxelm run RECIPE` builds <run>/ensemble"
        )
    try:
        return read_json(path)
    except MegaxelmError as error:
        raise RoutingError(str(error)) from None


def _link_bases(out: Path, experts: Mapping[str, Path], entries: list[dict[str, Any]]) -> None:
    """Bring the bases of adapters into the folder, each once, and let the adapters and their `entries` name them there."""
    from megaxelm.model.adapter_files import base_folder, is_adapter, rebase

    places = {folder.resolve(): out / "experts" / name for name, folder in experts.items() if not is_adapter(folder)}
    made = 0
    for entry, (name, folder) in zip(entries, experts.items(), strict=True):
        if not is_adapter(folder):
            continue
        base = base_folder(folder)
        if isinstance(base, str):
            raise RoutingError(f"expert {name}: its base is {base}, a name on the hub: download it, and name its folder in {folder}")
        if base.resolve() not in places:
            made += 1
            places[base.resolve()] = out / ("base" if made == 1 else f"base-{made}")
            _link_folder(base, places[base.resolve()])
        rebase(out / "experts" / name, places[base.resolve()])
        entry["base"] = places[base.resolve()].relative_to(out).as_posix()


def _link_folder(source: Path, target: Path) -> None:
    """Hard links cost no disk; another file system or one without links gets copies, which are equal."""
    for path in sorted(source.rglob("*")):
        copy = target / path.relative_to(source)
        if path.is_dir():
            copy.mkdir(parents=True, exist_ok=True)
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path.resolve(), copy)
        except OSError:
            shutil.copy2(path, copy)


_PLAIN: dict[str, tuple[type, ...]] = {
    "language_expert": (dict,),
    "detect_language": (bool,),
    "fixed_weights": (dict,),
    "temperature": (int, float),
    "distance_power": (int,),
    "posterior_prior": (list, type(None)),
    "posterior_decay": (int, float),
    "posterior_reads": (str,),
    "refresh": (str,),
    "refresh_tokens": (int,),
    "fallback_weight": (int, float),
    "fallback_distance": (list, type(None)),
}


def _save_routers(folder: Path, data: RouterData) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    has_space = data.space is not None and data.centres is not None
    if has_space:
        data.space.save(folder, SPACE_NAME)
        tensors = {"centres": data.centres.to(torch.float32).contiguous()}  # type: ignore[union-attr]
        if data.centre_experts is not None:
            tensors["experts"] = torch.tensor(data.centre_experts)
        save_file(tensors, folder / "centres.safetensors")
    write_json(folder / "router.json", {name: getattr(data, name) for name in _PLAIN} | {"tfidf": has_space})


def _is_a(value: Any, kinds: tuple[type, ...]) -> bool:
    # A bool is an int to Python, and a mistake here.
    return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def _load_routers(folder: Path, names: list[str], fallback: str | None, tokenizer: Tokenizer) -> RouterData:
    values = _read(folder / "router.json", folder.parent)
    missing = [name for name in (*_PLAIN, "tfidf") if name not in values]
    if missing:
        raise RoutingError(f"{folder / 'router.json'}: {', '.join(missing)} missing; build the ensemble again")
    wrong = [name for name, kinds in _PLAIN.items() if not _is_a(values[name], kinds)]
    if not wrong and len(values["fallback_distance"] or (0, 0)) != 2:
        wrong = ["fallback_distance"]
    if wrong:
        raise RoutingError(f"{folder / 'router.json'}: {wrong[0]} = {values[wrong[0]]!r} is damaged; build the ensemble again")
    data = RouterData(names, **{name: values[name] for name in _PLAIN}, fallback=fallback, decode=tokenizer.decode)
    if values["tfidf"]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from megaxelm.cluster.space import TfidfSpace

        path = folder / "centres.safetensors"
        try:
            tensors = load_file(path)
            data.centres = tensors["centres"]
        except (OSError, SafetensorError, KeyError) as error:
            raise RoutingError(f"{path}: missing or damaged ({error}); build the ensemble again") from None
        if "experts" in tensors:
            data.centre_experts = tensors["experts"].tolist()
        owners = list(range(len(data.centres))) if data.centre_experts is None else data.centre_experts
        if len(owners) != len(data.centres) or sorted(set(owners)) != list(range(len(data.trained))):
            raise RoutingError(
                f"{path}: {len(data.centres)} centres for {len(set(owners))} of {len(data.trained)} experts; build the ensemble again"
            )
        data.space = TfidfSpace.load(folder, SPACE_NAME, tokenizer)
    return data
