"""A Slurm of two nodes on this machine, started for the tests and stopped after them."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "squeue", "sinfo")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for item in sockets:
        item.bind(("127.0.0.1", 0))
    ports = [int(item.getsockname()[1]) for item in sockets]
    for item in sockets:
        item.close()
    return ports


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment variables under which sbatch reaches a Slurm with the nodes n1 and n2."""
    os.environ["PATH"] += os.pathsep + "/usr/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"Slurm is not installed ({', '.join(missing)} missing): apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("the daemons of Slurm start jobs for users, which takes root")
    folder = tmp_path_factory.mktemp("slurm")
    munge = folder / "munge"
    munge.mkdir(mode=0o700)
    (munge / "key").write_bytes(os.urandom(128))
    (munge / "key").chmod(0o400)
    host = socket.gethostname().split(".")[0]
    controller, first, second = _free_ports(3)
    config = folder / "slurm.conf"
    for name in ("state", "spool.n1", "spool.n2"):
        (folder / name).mkdir()
    config.write_text(
        f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
AuthType=auth/munge
AuthInfo=socket={munge}/socket
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=1
MinJobAge=20
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs={os.cpu_count()}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs={os.cpu_count()}
PartitionName=main Nodes=n1,n2 Default=YES State=UP MaxTime=INFINITE
"""
    )
    os.environ["SLURM_CONF"] = str(config)
    commands = [
        ["munged", "-F", "--force", *(f"--{key}={munge}/{name}" for key, name in _MUNGE.items())],
        ["slurmctld", "-D", "-f", str(config)],
        ["slurmd", "-D", "-N", "n1", "-f", str(config)],
        ["slurmd", "-D", "-N", "n2", "-f", str(config)],
    ]
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            with open(folder / f"{command[0]}.{len(daemons)}.out", "wb") as out:
                daemons.append(subprocess.Popen(command, stdout=out, stderr=out))
            if command[0] == "munged":
                _wait(lambda: (munge / "socket").exists(), folder)
        _wait(_is_idle, folder)
        yield {"SLURM_CONF": str(config)}
    finally:
        del os.environ["SLURM_CONF"]
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


_MUNGE = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}


def _is_idle() -> bool:
    done = subprocess.run(["sinfo", "-h", "-o", "%t %D"], capture_output=True, text=True)
    return done.stdout.strip() == "idle 2"


def _wait(ready: object, folder: Path) -> None:
    assert callable(ready)
    deadline = time.monotonic() + 60
    while not ready():
        if time.monotonic() > deadline:
            logs = "\n".join(f"{path.name}: {path.read_text(errors='replace')[-800:]}" for path in folder.glob("*.log"))
            raise AssertionError(f"Slurm did not start\n{logs}")
        time.sleep(0.2)
