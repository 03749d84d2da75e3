"""A Slurm of two nodes on this machine, started for the tests and stopped after them."""

import os
import shutil
import socket
from collections.abc import Iterator

import pytest
from slurm_daemons import Slurm, nodes_are_idle, wait_for

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
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A Slurm with the nodes n1 and n2, which sbatch in this process's environment reaches."""
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
AuthInfo=socket={munge}/socket,cred_expire=5
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
SlurmdTimeout=10
KillWait=10
SchedulerParameters=sched_interval=1
MinJobAge=20
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs={os.cpu_count()}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs={os.cpu_count()}
PartitionName=main Nodes=n1,n2 Default=YES State=UP MaxTime=INFINITE
"""
    )
    slurm = Slurm(folder)
    os.environ |= slurm.environment
    try:
        slurm.start("munged", ["munged", "-F", "--force", *(f"--{key}={munge}/{name}" for key, name in _MUNGE.items())])
        wait_for((munge / "socket").exists, folder)
        slurm.start("slurmctld", ["slurmctld", "-D", "-f", str(config)])
        for node in ("n1", "n2"):
            slurm.start_node(node)
        wait_for(nodes_are_idle, folder)
        yield slurm
    finally:
        del os.environ["SLURM_CONF"]
        slurm.stop()


_MUNGE = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
