"""Clusters as users describe them, in a small TOML file, and as a batch job finds the one that it runs on."""

import dataclasses
import difflib
import os
import re
import shlex
import sys
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from medslurm import commands
from medslurm.commands import ClusterError

DEFAULT_FILE = "~/.config/medtrain/clusters.toml"
SITE_FILE = "/etc/medtrain/clusters.toml"
HERE = "here"


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """One table of the file; times are SLURM's, such as 1-12:00:00.

    A member's job gets `gpus_per_node` GPUs at most and `cpus_per_gpu` CPUs for each process; without GPUs (0) that
    many CPUs a process. `mem` is what a job asks for on each of its nodes, whatever its GPUs; `mem_per_gpu` is asked
    for each of them instead. Jobs that need no GPU are described by `without_gpus`.
    `setup` holds lines of shell that run before Python on the node, `srun` further options of srun, as words, `sbatch`
    those of sbatch by name.
    """

    name: str
    partition: str = ""
    cpu_partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    gpus_per_node: int = 1
    gpu_type: str = ""
    gpus_as: Literal["gres", "gpus-per-node"] = "gres"
    cpus_per_gpu: int = 8
    mem: str = ""
    mem_per_gpu: str = ""
    time: str = "24:00:00"
    cpu_time: str = ""
    cpu_qos: str = ""
    cpu_constraint: str = ""
    cpu_mem: str = ""
    throttle: int = 0
    signal_s: int = 120
    modules: tuple[str, ...] = ()
    venv: str = ""
    python: str = ""
    container: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    srun: tuple[str, ...] = ()
    sbatch: dict[str, Any] = field(default_factory=dict)
    file: str = field(default="", compare=False)
    lines: dict[str, int] = field(default_factory=dict, compare=False)

    def where(self, key: str) -> str:
        """The place of a key for an error message: file and line, or the cluster's name."""
        if key in self.lines:
            return f"{self.file}, line {self.lines[key]} ({key} = {_shown(repr(getattr(self, key)))})"
        return f"cluster {self.name}" + (f" of {self.file}" if self.file else "")

    def without_gpus(self) -> "Cluster":
        """As the job that prepares data, and a final job of images, see it: `cpu_…` in place of the others. Quality of
        service and features of the nodes with GPUs are not asked of a `cpu_partition`.
        """
        apart = bool(self.cpu_partition)
        return replace(
            self,
            partition=self.cpu_partition or self.partition,
            time=self.cpu_time or self.time,
            qos=self.cpu_qos or ("" if apart else self.qos),
            constraint=self.cpu_constraint or ("" if apart else self.constraint),
            mem=self.cpu_mem or self.mem,
            mem_per_gpu="",
        )

    def memory(self, gpus: int) -> str:
        """What sbatch is told of a node's memory for a job with so many GPUs on each; "" for the site's own."""
        if not (gpus and self.mem_per_gpu):
            return self.mem
        number = self.mem_per_gpu.rstrip("KMGTBkmgtb")
        return f"{int(number) * gpus}{self.mem_per_gpu[len(number) :]}"

    def python_command(self) -> str:
        """The shell words that start Python on a node."""
        own = f"{_home(self.venv)}/bin/python" if self.venv else sys.executable
        return shlex.join([*self.container, _home(self.python) or ("python" if self.container else own)])

    def setup_lines(self) -> list[str]:
        """Shell lines before Python starts."""
        needed = [f"module load {shlex.quote(module)}" for module in self.modules]
        if self.venv and not self.container:
            needed.append(f". {shlex.quote(_home(self.venv) + '/bin/activate')}")
        # submitted from another shell than bash, `module` may be unknown
        known = ["command -v module >/dev/null || . /etc/profile"] if self.modules else []
        return [*known, *(f"{line} || {_told(line)}" for line in needed), *self.setup]


def _told(line: str) -> str:
    """Shell that ends the job where a line of it failed, which Python would stumble over much later."""
    return f'{{ echo {shlex.quote(f"error: `{line}` failed on")} "$(hostname)" >&2; exit 3; }}'


def _home(path: str) -> str:
    """A path with ~ spelt out: it is quoted on the node."""
    return os.path.expanduser(path)


def _shown(value: object) -> str:
    """In one line, the middle of a long text left out."""
    text = str(value)
    short = text if len(text) <= 80 else f"{text[:40]}…{text[-40:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short)


# A file of a thousand clusters is smaller; no node has so many of anything.
MOST_BYTES, MOST = 4 << 20, 1_000_000
KEYS = {f.name: f for f in dataclasses.fields(Cluster) if f.name not in ("name", "file", "lines")}


def read_cluster(name: str, file: Path | None = None) -> Cluster:
    """The cluster of that name; `here` is the one that this batch job runs on, unless the file has one of that name.

    Raises ClusterError for a file, table or key that is not there, with the right ones.
    """
    path = file.expanduser() if file else found_file()
    if not path.is_file():
        if name == HERE and file is None:
            return here()
        raise ClusterError(f"{path} is not there: describe the cluster in it as slurm/README.md shows.")
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ClusterError(f"{path} has more than {MOST_BYTES >> 20} MB: is that the right file?")
        text = path.read_bytes().decode("utf-8")
        tables = tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ClusterError(f"{path} is not TOML ({_shown(error)}): correct it.") from None
    if name not in tables:
        if name == HERE:
            return here()
        known = [_shown(key) for key, value in tables.items() if isinstance(value, dict)][:8]
        raise ClusterError(f"{path} has no cluster {_shown(name)!r}: it describes {', '.join(known) or 'none'}.")
    if not isinstance(tables[name], dict):
        raise ClusterError(f"{path}: {name} is no table: write [{name}] and its keys below.")
    lines = _lines(text, name)
    values = {key: _typed(path, lines, name, key, value) for key, value in tables[name].items()}
    return _checked(Cluster(name=name, file=str(path), lines=lines, **values))


# What `here` finds; a plan.json may come from anywhere, and the other keys run what they hold.
FOUND = ("partition", "account", "qos", "gpus_per_node", "cpus_per_gpu", "time")


def remembered(known: Mapping[str, Any]) -> Cluster:
    """The cluster that a batch job found `here` and wrote down; raises ClusterError for values of other kinds."""
    values = {key: _typed(Path("plan.json"), {}, HERE, key, known[key]) for key in FOUND if key in known}
    return _checked(Cluster(name=HERE, **values))


def found_file() -> Path:
    """$MEDTRAIN_CLUSTERS where it is set, else the user's own file, else the site's where only that is there."""
    if named := os.environ.get("MEDTRAIN_CLUSTERS"):
        return Path(named).expanduser()
    own, site = Path(DEFAULT_FILE).expanduser(), Path(SITE_FILE)
    return site if site.is_file() and not own.is_file() else own


def _typed(path: Path, lines: dict[str, int], table: str, key: str, value: Any) -> Any:
    place = f"{path}, line {lines.get(key, 1)}"
    if key not in KEYS:
        near = difflib.get_close_matches(key[:99], KEYS, 3, 0.5) or [*list(KEYS)[:10], "or see slurm/README.md"]
        raise ClusterError(f"{place}: there is no key {_shown(key)!r}: choose {', '.join(near)}.")
    wanted = KEYS[key].type
    if wanted is str and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # mem = 64000
    if typing.get_origin(wanted) is tuple:
        if isinstance(value, str):
            value = [value]
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise ClusterError(f"{place}: {key} must be a list of texts.")
    if typing.get_origin(wanted) is Literal:
        if value in typing.get_args(wanted):
            return value
        raise ClusterError(f"{place}: {key} must be one of {', '.join(typing.get_args(wanted))}.")
    kind = typing.get_origin(wanted) or wanted
    if not isinstance(value, kind) or isinstance(value, bool):  # type: ignore[arg-type]
        words = {int: "a whole number", str: "a text", dict: "a table"}
        raise ClusterError(f"{place}: {key} must be {words[kind]}.")  # type: ignore[index]
    return value


def _checked(cluster: Cluster) -> Cluster:
    for key in ("time", "cpu_time"):
        if getattr(cluster, key) and minutes(getattr(cluster, key)) is None:
            raise ClusterError(f"{cluster.where(key)} is no time: write it as 12:00:00 or 2-00:00:00.")
    for key, least in (("gpus_per_node", 0), ("cpus_per_gpu", 1), ("throttle", 0), ("signal_s", 1)):
        if not least <= getattr(cluster, key) < MOST:
            raise ClusterError(f"{cluster.where(key)} must be at least {least} and below {MOST}.")
    for key in KEYS:  # each becomes a line or a word for sbatch; `setup` and `sbatch` are read as they are
        value = getattr(cluster, key)
        texts = [value] if isinstance(value, str) else value if isinstance(value, tuple) and key != "setup" else []
        if not all(text.isprintable() for text in texts):
            raise ClusterError(f"{cluster.where(key)} holds a line break or the like: take it out.")
    for key, value in cluster.sbatch.items():
        if not isinstance(value, str | int | float) or not str(value).isprintable() or not key.isprintable():
            raise ClusterError(f"{cluster.where('sbatch')}: {_shown(key)} must be a text or a number of one line.")
    if cluster.container and cluster.venv:
        raise ClusterError(f"{cluster.where('venv')}: the container has a Python of its own: leave venv out.")
    for key in ("mem", "mem_per_gpu", "cpu_mem"):
        if getattr(cluster, key) and not re.fullmatch(r"\d+[KMGT]?B?", getattr(cluster, key), re.IGNORECASE):
            raise ClusterError(f"{cluster.where(key)} is no memory: write it as 64G.")
    return cluster


def _lines(text: str, table: str) -> dict[str, int]:
    """Where each key of a table stands, counted from 1; for messages only."""
    found: dict[str, int] = {}
    inside = False
    for number, line in enumerate(text.splitlines(), 1):
        head = re.match(r"\s*\[\s*[\"']?([^\]\"']+)[\"']?\s*\]", line)
        if head:
            inside = head.group(1).strip() == table
        key = re.match(r"\s*[\"']?([\w-]+)[\"']?\s*=", line)
        if inside and key:
            found.setdefault(key.group(1), number)
    return found


def minutes(time: str) -> int | None:
    """A SLURM time in whole minutes, rounded up; None where it is none. Forms: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    if time.upper() in ("UNLIMITED", "INFINITE"):
        return 60 * 24 * 365
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if not match:
        return None
    days, *rest = match.groups()
    numbers = [int(part) for part in rest if part is not None]
    if days is not None:
        hours, mins, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, mins, seconds = numbers
    else:
        hours, mins, seconds = 0, *[*numbers, 0][:2]
    total = ((int(days or 0) * 24 + hours) * 60 + mins) * 60 + seconds
    return -(-total // 60) or None


def here() -> Cluster:
    """The cluster that this batch job runs on: its partition, account and QOS, and what its nodes have."""
    if "SLURM_JOB_ID" not in os.environ:
        raise ClusterError(
            f"--cluster {HERE} is the cluster of the batch job that it is typed in: name one of {DEFAULT_FILE}."
        )
    partition = os.environ.get("SLURM_JOB_PARTITION", "")
    cpus, gpus = commands.node_kinds(partition)
    return Cluster(
        name=HERE, partition=partition, account=os.environ.get("SLURM_JOB_ACCOUNT", ""),
        qos=os.environ.get("SLURM_JOB_QOS", "") if os.environ.get("SLURM_JOB_QOS") != "normal" else "",
        gpus_per_node=gpus, cpus_per_gpu=max(1, min(8, cpus // max(1, gpus))), time=commands.longest(partition),
    )  # fmt: skip
