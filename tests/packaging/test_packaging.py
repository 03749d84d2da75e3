import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import REPOSITORY

import megaxelm


def run(*command: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=dict(os.environ) | variables, timeout=120)


def test_the_folder_kernels_does_not_shadow_the_package_kernels(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("NAME = 'the package of Hugging Face'\n")
    done = run(sys.executable, "-c", "import kernels; print(kernels.NAME)", cwd=REPOSITORY, PYTHONPATH=str(tmp_path))
    assert done.stdout.strip() == "the package of Hugging Face", done.stderr
    assert not (REPOSITORY / "kernels" / "__init__.py").exists()


def test_setup_has_no_side_effects(tmp_path: Path) -> None:
    for name in ("setup.py", "README.md", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    done = run(sys.executable, "setup.py", "--version", cwd=tmp_path)
    assert done.stdout.strip().splitlines()[-1] == megaxelm.__version__
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "pyproject.toml", "setup.py"]


def test_the_command_line_starts_without_torch() -> None:
    heavy = ("torch", "transformers", "deepspeed", "sklearn", "matplotlib", "fastapi", "uvicorn")
    code = f"import sys, megaxelm.cli; print([name for name in {heavy} if name in sys.modules])"
    done = run(sys.executable, "-c", code, cwd=REPOSITORY, PYTHONPATH="kernels")
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.slow
def test_a_model_trains_and_scores_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None  # an import of it fails
import torch
from megaxelm.errors import ModelError
from megaxelm.model.config import config_from_recipe
from megaxelm.model.decoder import Decoder
from megaxelm.recipe import ModelConfig

model = Decoder(config_from_recipe(ModelConfig(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32), 50, 0, 1, 2))
model.initialise(0)
tokens, ends = torch.arange(3, 9), torch.tensor([0, 6])
loss = model(tokens, torch.arange(6), ends, labels=tokens, kernels="auto").loss_sum
loss.backward()
assert model.head.weight.grad.abs().sum() > 0
try:
    model(tokens, torch.arange(6), ends, kernels="triton")
except ModelError as error:
    print(error)
"""
    done = run(sys.executable, "-c", code, cwd=REPOSITORY, PYTHONPATH="kernels")
    assert "kernels = triton: it does not import" in done.stdout and "choose auto or torch" in done.stdout, done.stderr


# Where each stage folder may look besides itself and the modules at the top (errors, files, growth, recipe, run, console).
ALLOWED = {
    "recipe": set(),
    "corpus": set(),
    "cluster": {"corpus"},
    "model": set(),
    "train": {"corpus", "model", "stages"},  # stages: its entry program alone, see below
    "plan": {"model", "train"},
    "ensemble": {"corpus", "cluster", "model"},
    "evaluate": {"corpus", "ensemble", "model"},
    "merge": {"cluster", "corpus", "ensemble", "evaluate", "model", "train"},
    "serve": {"ensemble"},
    "grow": {"cluster", "corpus", "ensemble", "evaluate", "lineage", "loaded", "model", "stages", "train"},
    "report": set(),
}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("folder", sorted(ALLOWED))
def test_arrows_between_the_folders_go_one_way(folder: str) -> None:
    for path in (REPOSITORY / "megaxelm" / folder).rglob("*.py"):
        for module in imports(path):
            if not module.startswith("megaxelm."):
                continue
            target = module.split(".")[1]
            allowed = ALLOWED[folder] | {folder, "errors", "files", "growth", "recipe", "run", "console"}
            assert target in allowed, f"{path.relative_to(REPOSITORY)} imports {module}"
            assert target != "stages" or path.name == "__main__.py" or folder == "grow", f"{path.relative_to(REPOSITORY)} imports {module}"


def test_the_record_of_what_was_grown_leads_nowhere() -> None:
    found = imports(REPOSITORY / "megaxelm" / "growth.py")
    assert {module for module in found if module.startswith("megaxelm")} == {"megaxelm.errors", "megaxelm.files"}


def test_kernels_know_nothing_of_megaxelm() -> None:
    for path in (REPOSITORY / "kernels").rglob("*.py"):
        assert not any(module == "megaxelm" or module.startswith("megaxelm.") for module in imports(path)), path
