"""What a run depends on of a tokenizer or model that it loads: the hashes of their files."""

from __future__ import annotations

from pathlib import Path

from megaxelm.files import hash_file

_MODEL = ("config.json", "*.safetensors", "*.bin")


def tokenizer_sources(path: Path) -> dict[str, str]:
    """Name -> hash of the files of a tokenizer's folder; nothing for a name on the hub, which is in the settings."""
    return _hashes(path, ("tokenizer.json", "tokenizer_config.json", "*.model"))


def model_sources(path: Path) -> dict[str, str]:
    """Name -> hash of the files of a model's folder, of an adapter those of its base too; nothing for a name on the hub."""
    if not (path / "adapter_config.json").is_file() or (path / "config.json").is_file():
        return _hashes(path, _MODEL)
    from megaxelm.model.adapter_files import base_folder

    base = {f"base/{name}": value for name, value in model_sources(Path(base_folder(path))).items()}
    return _hashes(path, ("adapter_config.json", "*.safetensors")) | base


def _hashes(path: Path, patterns: tuple[str, ...]) -> dict[str, str]:
    if not path.is_dir():
        return {}
    found = sorted({file for pattern in patterns for file in path.glob(pattern)})
    return {file.name: hash_file(file) for file in found}
