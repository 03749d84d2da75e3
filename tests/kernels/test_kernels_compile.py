"""Every Triton kernel, at the shapes it is made for, compiled for sm_80, sm_90 and sm_100: nothing spills, everything fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

FOLDER = Path(__file__).parent
CASES = sorted(path.stem for path in (FOLDER / "compile_cases").glob("*.py"))
SHARED_LIMIT = {"80": 163 * 1024, "90": 227 * 1024, "100": 227 * 1024}  # CUDA C++ Programming Guide, technical specifications


def compiled(cases: Path, *, extra_path: str = "") -> list[dict]:
    path = os.pathsep.join(filter(None, [extra_path, str(FOLDER.parents[1] / "kernels"), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, str(FOLDER / "compile_only.py"), str(cases), *SHARED_LIMIT],
        env=os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(found: dict) -> None:
    assert found["local"] == 0 and found["stack"] == 0, f"registers spill: {found}"
    assert found["registers"] <= 255, found
    assert found["shared"] <= SHARED_LIMIT[found["architecture"]], found
    assert found["tensor_cores"] is not False, f"the tensor cores are not used: {found}"


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_kernels_compile_for_three_generations(name: str) -> None:
    rows = compiled(FOLDER / "compile_cases" / f"{name}.py")
    assert {row["architecture"] for row in rows} == set(SHARED_LIMIT)
    for row in rows:
        check(row)


@pytest.fixture(scope="module")
def oldest_triton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triton")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), "triton==3.6.0"]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"triton 3.6.0 cannot be fetched: {done.stderr[-200:]}")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_kernels_compile_by_the_oldest_triton_that_is_supported(name: str, oldest_triton: Path) -> None:
    rows = compiled(FOLDER / "compile_cases" / f"{name}.py", extra_path=str(oldest_triton))
    assert {row["architecture"] for row in rows} == set(SHARED_LIMIT) and {row["triton"] for row in rows} == {"3.6.0"}
    for row in rows:
        check(row)
