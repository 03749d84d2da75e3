"""Compile Triton kernels for GPUs that are not there, and read from the machine code what they use.

    python tests/kernels/compile_only.py tests/kernels/compile_cases/norms.py 80 90 100

A file of cases has a list `CASES`. Prints one JSON line for each case and architecture. A process of its own: a kernel is either
interpreted or compiled, which is settled when Triton is imported.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TENSOR_CORES = {"80": "HMMA", "90": "HGMMA", "100": "UTCHMMA"}  # instructions of mma.sync, wgmma and tcgen05


@dataclass(frozen=True)
class Case:
    """A kernel as it is launched for a real shape.

    `signature`: type of each argument as Triton writes it (`*bf16`, `i32`, `fp32`); what is not named there is in `constants`.
    `divisible`: arguments that are multiples of 16, which Triton would find at the launch.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    divisible: tuple[str, ...] = ()
    tensor_cores: bool = False
    architectures: tuple[str, ...] = field(default=("80", "90", "100"))


def compile_case(case: Case, architecture: str) -> dict[str, Any]:
    """Registers a thread, stack and shared bytes, and whether the tensor cores are used, from the cubin."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible}
    source = ASTSource(case.kernel, signature, {(names.index(name),): value for name, value in case.constants.items()}, attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", int(architecture), 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        machine_code = _tool("nvdisasm", file.name) if case.tensor_cores else ""
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "case": case.name,
        "architecture": architecture,
        "triton": triton.__version__,
        "registers": found["REG"],
        "stack": found["STACK"],
        "local": found["LOCAL"],
        "shared": compiled.metadata.shared,  # dynamic shared memory is not in the cubin
        "tensor_cores": TENSOR_CORES[architecture] in machine_code if case.tensor_cores else None,
    }


def _tool(name: str, *arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def main() -> None:
    path, architectures = Path(sys.argv[1]), sys.argv[2:]
    sys.modules["compile_only"] = sys.modules["__main__"]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for case in module.CASES:
        for architecture in architectures:
            if architecture in case.architectures:
                print(json.dumps(compile_case(case, architecture)), flush=True)


if __name__ == "__main__":
    main()
