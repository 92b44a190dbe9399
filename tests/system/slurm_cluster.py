"""A real SLURM of several nodes on one Debian machine, for the tests: `with Cluster(folder, nodes=2) as cluster: ...`.

Every node is a slurmd with its own host name, address (network namespace) and /etc/hosts; they share this machine's
files, as a cluster shares its network file system. Needs root and the packages that tests/run.sh installs, neither
systemd nor cgroups. `stop` (or leaving the `with`) ends every process and takes the namespaces away.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

PROGRAMS = ("munged", "slurmctld", "slurmd", "slurmdbd", "mariadbd", "mariadb-install-db", "mariadb", "ip", "nsenter",
            "unshare", "sbatch", "sacct")  # fmt: skip
PORT, SUBNET = 17800, "10.231.9"
HEAD = f"{SUBNET}.254"
MARK = "MEDTRAIN_TEST_NODE"
PATH = "/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/bin"


def why_not() -> str:
    """Why this machine can not hold such a cluster; "" where it can."""
    if os.geteuid() != 0:
        return "a real SLURM needs root"
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if missing:
        return f"a real SLURM needs {missing[0]} (tests/run.sh installs it on Debian)"
    if subprocess.run(["ip", "netns", "add", "medtry"], capture_output=True, check=False).returncode:
        return "a real SLURM needs network namespaces, which are not allowed here"
    subprocess.run(["ip", "netns", "del", "medtry"], check=False)
    return ""


class Cluster:
    """`cpus`, `memory_mb` and `gpus` are what each node claims to have; the GPUs are devices that do nothing."""

    def __init__(self, folder: Path, nodes: int = 2, cpus: int = 4, memory_mb: int = 16000, gpus: int = 2,
                 max_array: int = 1001):  # fmt: skip
        self.folder, self.cpus, self.memory_mb, self.gpus, self.max_array = folder, cpus, memory_mb, gpus, max_array
        self.nodes = [f"node{n}" for n in range(1, nodes + 1)]
        self.conf = folder / "slurm.conf"
        self.environment = {"PATH": PATH, "HOME": "/root", "LC_ALL": "C.UTF-8", "SLURM_CONF": str(self.conf)}

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- starting -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Write the configuration and start everything; returns when all nodes are idle."""
        self.stop()
        for name in ("state", "log", "spool", "munge", "dev"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._write_configuration()
        self._network()
        self._munge()
        self.start_accounting()
        self.start_controller()
        for name in self.nodes:
            self.start_node(name)
        self.wait(
            lambda: self.output("sinfo", "-h", "-N", "-p", "main", "-o", "%t").split() == ["idle"] * len(self.nodes)
        )

    def _write_configuration(self) -> None:
        lines = [
            "ClusterName=medtest", f"SlurmctldHost=localhost({HEAD})", f"SlurmctldPort={PORT}", "SlurmUser=root",
            "AuthType=auth/munge", f"AuthInfo=socket={self.folder}/munge/socket,cred_expire=5", "CredType=cred/munge",
            f"SlurmctldPidFile={self.folder}/slurmctld.pid", f"SlurmdPidFile={self.folder}/%n.pid",
            f"SlurmdSpoolDir={self.folder}/spool/%n", f"StateSaveLocation={self.folder}/state",
            f"SlurmctldLogFile={self.folder}/log/slurmctld.log", f"SlurmdLogFile={self.folder}/log/%n.log",
            "ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none", "SlurmdParameters=config_overrides",
            "MpiDefault=none", "SwitchType=switch/none", "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core_Memory", "DefMemPerCPU=500", "GresTypes=gpu", "ReturnToService=2",
            "SlurmdTimeout=10", "KillWait=5", "MinJobAge=3600", "JobRequeue=1", "EnforcePartLimits=ALL",
            f"MaxArraySize={self.max_array}", "MaxJobCount=20000",
            "SchedulerParameters=bf_interval=1,bf_continue,sched_interval=1,batch_sched_delay=1",
            "PreemptType=preempt/partition_prio", "PreemptMode=REQUEUE",
            "SlurmctldParameters=preempt_send_user_signal",
            "AccountingStorageType=accounting_storage/slurmdbd", f"AccountingStorageHost={HEAD}",
            f"AccountingStoragePort={PORT + 1}", f"AccountingStoragePass={self.folder}/munge/socket",
            "AccountingStorageEnforce=associations", "JobAcctGatherType=jobacct_gather/linux",
            "JobAcctGatherFrequency=2", "JobAcctGatherParams=OverMemoryKill",
        ]  # fmt: skip
        gres = []
        for number, name in enumerate(self.nodes, 1):
            lines.append(f"NodeName={name} NodeAddr={SUBNET}.{number} Port={PORT + 10 + number} CPUs={self.cpus} "
                         f"RealMemory={self.memory_mb} Gres=gpu:{self.gpus} State=UNKNOWN")  # fmt: skip
            gres.append(f"NodeName={name} AutoDetect=off Name=gpu File={self.folder}/dev/nvidia[0-{self.gpus - 1}]")
        common = "Nodes=ALL State=UP DefaultTime=60"
        lines += [
            f"PartitionName=main {common} Default=YES MaxTime=INFINITE PriorityTier=10 PreemptMode=REQUEUE",
            f"PartitionName=short {common} MaxTime=20 PriorityTier=10 PreemptMode=REQUEUE",
            f"PartitionName=high {common} MaxTime=INFINITE PriorityTier=100 PreemptMode=OFF",
            f"PartitionName=scavenge {common} MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=30",
        ]
        self.conf.write_text("\n".join(lines) + "\n")
        (self.folder / "gres.conf").write_text("\n".join(gres) + "\n")
        for number in range(self.gpus):
            device = self.folder / "dev" / f"nvidia{number}"
            if not device.exists():  # slurmd takes nothing but a character device; this is another /dev/null
                os.mknod(device, 0o666 | 0o020000, os.makedev(1, 3))
        database = self.folder / "slurmdbd.conf"
        database.write_text("\n".join([
            "AuthType=auth/munge", f"AuthInfo=socket={self.folder}/munge/socket", "DbdHost=localhost",
            f"DbdAddr={HEAD}", f"DbdPort={PORT + 1}", "SlurmUser=root", f"PidFile={self.folder}/slurmdbd.pid",
            f"LogFile={self.folder}/log/slurmdbd.log", "StorageType=accounting_storage/mysql",
            "StorageHost=127.0.0.1", f"StoragePort={PORT + 2}", "StorageUser=slurm", "StoragePass=slurm",
            "StorageLoc=slurm_acct",
        ]) + "\n")  # fmt: skip
        database.chmod(0o600)
        hosts = ["127.0.0.1 localhost", f"{HEAD} {os.uname().nodename}"]
        for number, name in enumerate(self.nodes, 1):
            hosts += [f"{SUBNET}.{number} {name}", f"::ffff:{SUBNET}.{number} {name}.cluster"]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        (self.folder / "resolv.conf").write_text("# no name server\n")

    def _network(self) -> None:
        """A bridge in a namespace of its own, one leg here, one in each node."""
        run("ip", "netns", "add", "medsw")
        run("ip", "-n", "medsw", "link", "add", "br0", "type", "bridge")
        run("ip", "-n", "medsw", "link", "set", "br0", "up")
        run("ip", "link", "add", "medhead", "type", "veth", "peer", "name", "head", "netns", "medsw")
        run("ip", "-n", "medsw", "link", "set", "head", "master", "br0", "up")
        run("ip", "addr", "add", f"{HEAD}/24", "dev", "medhead")
        run("ip", "link", "set", "medhead", "up")
        for number, name in enumerate(self.nodes, 1):
            space = f"med{name}"
            run("ip", "netns", "add", space)
            run("ip", "-n", space, "link", "set", "lo", "up")
            run("ip", "-n", space, "link", "add", "eth0", "type", "veth", "peer", "name", name, "netns", "medsw")
            run("ip", "-n", "medsw", "link", "set", name, "master", "br0", "up")
            run("ip", "-n", space, "addr", "add", f"{SUBNET}.{number}/24", "dev", "eth0")
            run("ip", "-n", space, "link", "set", "eth0", "up")

    def _munge(self) -> None:
        place = self.folder / "munge"
        (place / "key").write_bytes(os.urandom(1024))
        (place / "key").chmod(0o600)
        self._daemon("munged", f"--key-file={place}/key", f"--socket={place}/socket", f"--pid-file={place}/pid",
                     f"--log-file={place}/log", f"--seed-file={place}/seed")  # fmt: skip

    def start_accounting(self) -> None:
        """MariaDB and slurmdbd, with this cluster and an account of root's in it."""
        data, socket = self.folder / "mariadb", self.folder / "mariadb.sock"
        if not (data / "mysql").is_dir():
            run("mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={data}", "--skip-test-db",
                "--auth-root-authentication-method=normal")  # fmt: skip
        if not socket.exists():
            log = open(self.folder / "log" / "mariadb.log", "ab")  # noqa: SIM115
            subprocess.Popen(
                ["mariadbd", "--no-defaults", "--user=root", f"--datadir={data}", f"--socket={socket}",
                 "--bind-address=127.0.0.1", f"--port={PORT + 2}", f"--pid-file={self.folder}/mariadb.pid",
                 "--innodb-buffer-pool-size=64M", "--innodb-flush-log-at-trx-commit=0", "--skip-name-resolve",
                 "--innodb-lock-wait-timeout=900"],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, env={**self.environment, MARK: "db"},
                start_new_session=True,
            )  # fmt: skip
            sql = ["mariadb", "--no-defaults", "-u", "root", "-S", str(socket), "-e"]
            self.wait(lambda: subprocess.run([*sql, "select 1"], capture_output=True, check=False).returncode == 0)
            user = "slurm@'127.0.0.1'"
            run(*sql, f"create database if not exists slurm_acct; create user if not exists {user} identified by "
                      f"'slurm'; grant all on slurm_acct.* to {user};")  # fmt: skip
        self._daemon("slurmdbd")
        self.wait(lambda: self.command("sacctmgr", "-n", "list", "cluster").returncode == 0)
        self.command("sacctmgr", "-i", "add", "cluster", "medtest")

    def start_controller(self) -> None:
        """slurmctld; it takes up what it left."""
        self._daemon("slurmctld")
        self.wait(lambda: self.command("sinfo", "-h").returncode == 0)

    def start_node(self, name: str) -> None:
        """A slurmd in its own namespaces; brings a dead node back."""
        enter = ["nsenter", f"--net=/run/netns/med{name}", "unshare", "--mount", "--uts", "sh", "-c",
                 'mount --bind "$1/hosts" /etc/hosts; mount --bind "$1/resolv.conf" /etc/resolv.conf; hostname "$2"; '
                 'shift 2; exec "$@"', "sh", str(self.folder), name]  # fmt: skip
        self._daemon(*enter, "slurmd", "-N", name, mark=name)

    def _daemon(self, *words: str, mark: str = "head") -> None:
        # no inherited descriptor: a daemon that holds a pipe of the caller's would keep it open for ever
        log = self.folder / "log" / f"start-{mark}.log"
        with open(log, "ab") as file:
            done = subprocess.run(words, stdout=file, stderr=file, stdin=subprocess.DEVNULL, close_fds=True,
                                  env={**self.environment, MARK: mark}, check=False)  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{words[0]} did not start: {log.read_text(errors='replace')[-2000:]}")

    # -- stopping -----------------------------------------------------------------------------------------------

    def kill_node(self, name: str) -> None:
        """A power cut: slurmd and everything that runs on the node."""
        self._kill(lambda pid: self._of_node(pid, name))

    def kill_job(self, raw: str, node: str) -> None:
        """End the processes of a job on a node at once, as a kernel short of memory does."""
        self._kill(lambda pid: self._of_node(pid, node) and environment(pid).get("SLURM_JOB_ID") == raw
                   and environment(pid).get("SLURM_PROCID") is not None)  # fmt: skip

    def warn_job(self, raw: str) -> None:
        """Send the processes of one job what SLURM sends before it ends them."""
        for pid in pids():
            told = environment(pid)
            if told.get("SLURM_JOB_ID") == raw and told.get("SLURM_CONF") == str(self.conf) and "SLURM_PROCID" in told:
                os.kill(pid, signal.SIGUSR2)

    def hide(self, folder: Path) -> None:
        """Put an empty read-only file system over a folder on every node, as where it is not shared."""
        for name in self.nodes:
            pid = (self.folder / f"{name}.pid").read_text().strip()
            run("nsenter", "--mount", "-t", pid, "mount", "-t", "tmpfs", "-o", "ro", "none", str(folder))

    def left(self) -> list[int]:
        """Processes of the cluster that still live."""
        return [pid for pid in pids() if alive(pid) and environment(pid).get("SLURM_CONF") == str(self.conf)
                and pid != os.getpid()]  # fmt: skip

    def stop_accounting(self) -> None:
        """End slurmdbd."""
        self._end("slurmdbd.pid")

    def stop_controller(self) -> None:
        """End slurmctld; jobs run on."""
        self._end("slurmctld.pid")

    def _end(self, file: str) -> None:
        path = self.folder / file
        if not path.exists():
            return
        pid = int(path.read_text())
        os.kill(pid, signal.SIGTERM)
        self.wait(lambda: not alive(pid), 30)
        path.unlink(missing_ok=True)

    def stop(self) -> None:
        """End every process of the cluster, and take away its network."""
        self._kill(lambda pid: any(self._of_node(pid, name) for name in self.nodes))
        self._kill(lambda pid: environment(pid).get("SLURM_CONF") == str(self.conf) and MARK in environment(pid))
        spaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
        for space in [line.split()[0] for line in spaces.splitlines() if line.startswith(("mednode", "medsw"))]:
            subprocess.run(["ip", "netns", "del", space], check=False)
        subprocess.run(["ip", "link", "del", "medhead"], capture_output=True, check=False)
        (self.folder / "mariadb.sock").unlink(missing_ok=True)

    def _of_node(self, pid: int, name: str) -> bool:
        """Whether a process belongs to a node: by its network, or by the environment that its slurmd gave it."""
        space = Path(f"/run/netns/med{name}")
        try:
            if space.exists() and os.stat(f"/proc/{pid}/ns/net").st_ino == space.stat().st_ino:
                return True
        except OSError:
            return False
        told = environment(pid)
        return told.get("SLURM_CONF") == str(self.conf) and name in (told.get("SLURMD_NODENAME"), told.get(MARK))

    def _kill(self, wanted: Callable[[int], bool]) -> None:
        for _ in range(100):
            found = [pid for pid in pids() if pid != os.getpid() and alive(pid) and wanted(pid)]
            if not found:
                return
            for pid in found:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.1)
        raise RuntimeError(f"processes {found} do not end")

    # -- asking -------------------------------------------------------------------------------------------------

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run one of SLURM's programs against this cluster."""
        return subprocess.run(words, capture_output=True, text=True, env=self.environment, timeout=60, check=False)

    def output(self, *words: str) -> str:
        """What it prints; "" where it fails."""
        done = self.command(*words)
        return done.stdout if done.returncode == 0 else ""

    def wait(self, ready: Callable[[], bool], seconds: float = 60) -> None:
        """Wait until something holds; raises TimeoutError with the controller's last lines."""
        end = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > end:
                log = self.folder / "log" / "slurmctld.log"
                tail = log.read_text(errors="replace")[-3000:] if log.exists() else ""
                raise TimeoutError(f"not within {seconds:.0f} s; slurmctld: {tail}")
            time.sleep(0.25)


def run(*words: str) -> None:
    """Run a program that must succeed."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr[-1000:]}")


def pids() -> Sequence[int]:
    """Every process."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def alive(pid: int) -> bool:
    """Whether a process lives; zombies do not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (OSError, IndexError):
        return False


def environment(pid: int) -> dict[str, str]:
    """A process's environment; empty where it is gone."""
    try:
        parts = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    return dict(part.decode("utf-8", "replace").split("=", 1) for part in parts if b"=" in part)


if __name__ == "__main__":
    # `python tests/system/slurm_cluster.py FOLDER [NODES]`: a cluster to play with until Enter is pressed
    if why_not():
        sys.exit(why_not())
    with Cluster(Path(sys.argv[1]).absolute(), nodes=int(sys.argv[2]) if len(sys.argv) > 2 else 2) as made:
        input(f"export SLURM_CONF={made.conf}\nPress Enter to end it.\n")
