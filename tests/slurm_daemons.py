"""The daemons of a Slurm of two nodes on this machine, for the tests marked `slurm`."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Slurm:
    """The running daemons. `environment` is what sbatch reaches them by; a node can be lost and brought back."""

    folder: Path
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def start(self, name: str, command: list[str]) -> None:
        with open(self.folder / f"{name}.out", "ab") as out:
            self.daemons[name] = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | self.environment)

    def start_node(self, node: str) -> None:
        self.start(node, ["slurmd", "-D", "-N", node, "-f", str(self.folder / "slurm.conf")])

    def lose_node(self, node: str, job: str) -> None:
        """Kill the slurmd of a node, the slurmstepds of a job on it, and what these had started, by process id."""
        steps = self._steps(job)
        assert steps, f"job {job} has no steps"
        lost = [*steps, *(child for step in steps for child in _descendants(step))]
        self.daemons[node].kill()
        self.daemons[node].wait()
        for pid in lost:
            os.kill(pid, signal.SIGKILL)

    def _steps(self, job: str) -> list[int]:
        """Process ids of the slurmstepds of a job of this Slurm; another one may run on this machine with the same numbers."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                command, environment = (path / "cmdline").read_bytes().decode(), (path / "environ").read_bytes().decode()
            except (OSError, UnicodeDecodeError):
                continue
            if command.startswith(f"slurmstepd: [{job}.") and self.environment["SLURM_CONF"] in environment:
                found.append(int(path.name))
        return found

    def stop(self) -> None:
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _descendants(pid: int) -> list[int]:
    children = [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    return children + [below for child in children for below in _descendants(child)]


def nodes_are_idle() -> bool:
    done = subprocess.run(["sinfo", "-h", "-o", "%t %D"], capture_output=True, text=True)
    return done.stdout.strip() == "idle 2"


def wait_for(ready: Callable[[], bool], folder: Path) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        if time.monotonic() > deadline:
            logs = "\n".join(f"{path.name}: {path.read_text(errors='replace')[-800:]}" for path in folder.glob("*.log"))
            raise AssertionError(f"Slurm did not start\n{logs}")
        time.sleep(0.2)
