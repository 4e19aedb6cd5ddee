"""Start and stop Slurm on this machine alone: one controller, one node, no accounting. Needs root and its packages."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

PACKAGES = "slurmctld slurmd slurm-client munge"  # of Debian
MUNGE = Path("/run/munge")

CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
AuthType=auth/munge
AuthInfo=cred_expire=10
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={place}/controller
SlurmdSpoolDir={place}/node
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
ReturnToService=2
MpiDefault=none
KillWait=5
SlurmdParameters=config_overrides
NodeName=one NodeAddr=127.0.0.1 CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Return why Slurm cannot be started here; None if it can."""
    if os.geteuid() != 0:
        return "Slurm is started by root only"
    if not all(map(shutil.which, ("slurmctld", "slurmd", "sbatch", "munged"))):
        return f"Slurm is not installed: apt-get install {PACKAGES}"
    if find_spec("submitit") is None:
        return "submitit is not installed: pip install -e '.[slurm]'"
    return None


@contextmanager
def running(place: Path) -> Iterator[Path]:
    """Keep Slurm running, with its files in `place`; yield the path of slurm.conf."""
    conf = place / "slurm.conf"
    for name in ("controller", "node"):
        (place / name).mkdir()
    controller, node = _free_ports(2)
    host = socket.gethostname().split(".")[0]
    conf.write_text(CONF.format(host=host, place=place, controller=controller, node=node))
    (place / "cgroup.conf").write_text(f"CgroupAutomount=no\nCgroupMountpoint={place}/cgroup\nCgroupPlugin=cgroup/v1\n")
    started = [] if (MUNGE / "munge.socket.2").exists() else [_start_munge()]
    environment = os.environ | {"SLURM_CONF": str(conf)}
    try:
        for command in (["slurmctld", "-D", "-c"], ["slurmd", "-D", "-N", "one"]):
            with (place / f"{command[0]}.out").open("w") as out:
                started.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out))
        deadline = time.monotonic() + 60
        while "idle" not in subprocess.run(["sinfo", "-h"], env=environment, capture_output=True, text=True).stdout:
            assert time.monotonic() < deadline, [path.read_text() for path in place.glob("*.log")]
            time.sleep(0.5)
        yield conf
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait()


def _start_munge() -> subprocess.Popen[bytes]:
    MUNGE.mkdir(exist_ok=True)
    shutil.chown(MUNGE, "munge", "munge")
    MUNGE.chmod(0o755)
    process = subprocess.Popen(["munged", "--foreground"], user="munge", group="munge", extra_groups=[])
    while not (MUNGE / "munge.socket.2").exists():
        assert process.poll() is None
        time.sleep(0.1)
    return process


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
