"""A real SLURM on this machine, and ways to watch its jobs."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

CONFIG = """\
ClusterName=eosin
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmctldPort={ports[0]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
SchedulerParameters=sched_min_interval=100000,sched_interval=1,bf_interval=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1
PartitionName=high Nodes=n1,n2 PriorityTier=2 PreemptMode=OFF
"""


class Slurm:
    """Asks the SLURM of the ``slurm`` fixture about its jobs."""

    def job(self, job_id: str) -> dict[str, str]:
        shown = subprocess.run(["scontrol", "show", "job", job_id], check=True, capture_output=True, text=True)
        return dict(re.findall(r"(\S+?)=(\S*)", shown.stdout))

    def wait(self, job_id: str, *states: str, timeout: float = 240) -> dict[str, str]:
        """Wait until the job is in one of ``states``; a requeued job is started without its two minutes of rest."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            job = self.job(job_id)
            if job["JobState"] in states:
                return job
            if job["JobState"] == "PENDING" and job["Reason"] == "BeginTime":
                time.sleep(2)  # a node refuses the credential of a job that it ended within the same second
                subprocess.run(["scontrol", "update", f"JobId={job_id}", "StartTime=now"], check=False)
            time.sleep(0.1)
        raise TimeoutError(f"job {job_id} is {job['JobState']} after {timeout} s, not {' or '.join(states)}")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Two nodes n1 and n2, both this machine; all state in a temporary folder, all daemons end with the tests."""
    _install()
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "n1", "n2"):
        (folder / name).mkdir()
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(folder=folder, host=socket.gethostname().split(".")[0], ports=_free_ports(3)))
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    munge = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    with pytest.MonkeyPatch.context() as patch, ExitStack() as daemons:
        patch.setenv("SLURM_CONF", str(config))
        for command in (
            ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge],
            ["slurmctld", "-D"],
            ["slurmd", "-D", "-N", "n1"],
            ["slurmd", "-D", "-N", "n2"],
        ):
            daemon = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            daemons.callback(daemon.wait)
            daemons.callback(daemon.terminate)
        _wait_for_nodes(folder)
        yield Slurm()
        subprocess.run(["scancel", "--signal=KILL", "--full", "--user=root"], check=False)


@pytest.fixture
def free_port() -> int:
    """A port that nothing listens on."""
    return _free_ports(1)[0]


def _install() -> None:
    if os.geteuid() != 0:
        pytest.skip("a test SLURM is started by root only, since slurmd must be")
    if not all(map(shutil.which, ("munged", "slurmctld", "slurmd"))):
        if shutil.which("apt-get") is None:
            pytest.skip("SLURM is absent, and so is apt-get to install it with")
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "-y", "--no-install-recommends", "slurm-wlm", "munge"]):
            ran = subprocess.run(["apt-get", *command], env=environment, capture_output=True, text=True, check=False)
            if ran.returncode:
                pytest.skip(f"SLURM cannot be installed: apt-get {command[0]} said {ran.stderr.strip()[-200:]}")


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _wait_for_nodes(folder: Path) -> None:
    for _ in range(200):
        nodes = subprocess.run(["sinfo", "-h", "-p", "low", "-o", "%T %D"], capture_output=True, text=True, check=False)
        if nodes.stdout.strip() == "idle 2":
            return
        time.sleep(0.1)
    logs = "\n".join(f"{log}: {log.read_text()[-500:]}" for log in sorted(folder.glob("*.log")))
    pytest.fail(f"the test SLURM did not start: {nodes.stderr}\n{logs}")
