"""transformers' Auto classes know an ensemble folder (`model_type: xelm`) once megaxelm is imported, before or after transformers.

`import megaxelm` must stay light, so transformers is not imported for it. If transformers' list of configurations is loaded already, ours
is added at once. Else it is added when that module has been loaded: `register_with_transformers` leaves a finder in `sys.meta_path` that
answers for this one module, takes itself away, and lets the module load as it would have. The model's class, which needs torch, is added
when the first `XelmConfig` is made, which `AutoModelForCausalLM.from_pretrained` does before it looks for a class.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_CONFIGURATIONS = "transformers.models.auto.configuration_auto"


class _AfterImport:
    """Finder that registers the configuration after `_CONFIGURATIONS` has been loaded by whoever else finds it."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _CONFIGURATIONS:
            return None
        sys.meta_path.remove(self)
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader.exec_module = _then_register(spec.loader.exec_module)  # type: ignore[method-assign,assignment]
                return spec
        return None


def _then_register(load: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    def load_and_register(module: ModuleType) -> None:
        load(module)
        _register_configuration()

    return load_and_register


def register_with_transformers() -> None:
    """Add `xelm` to transformers' Auto classes now, or as soon as they are loaded."""
    if hasattr(sys.modules.get(_CONFIGURATIONS), "CONFIG_MAPPING"):
        _register_configuration()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register_configuration() -> None:
    from transformers import AutoConfig

    from megaxelm.ensemble.huggingface_config import XelmConfig

    AutoConfig.register(XelmConfig.model_type, XelmConfig, exist_ok=True)
