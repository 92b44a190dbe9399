"""Start the process group from torchrun, SLURM or a plain call; sums and gathers over ranks."""

import contextlib
import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from medtrain.errors import NodeError, UserError
from medtrain.files import write_text
from medtrain.wording import shown

# Names a file that all ranks can see. Rank 0 is given a free port by the system and tells the others there: no port is
# chosen beforehand, so two jobs on one node can not collide.
RENDEZVOUS = "MEDTRAIN_RENDEZVOUS"
MEETING_S = 300.0
# NCCL ends a process without a word at its time limit: the hosts notice before, and can say whom they wait for.
AFTER_HOSTS = timedelta(seconds=120)
# Set to 1 where GPUs are only counted, or where a job may do without those that it asked for.
ALLOW_CPU = "MEDTRAIN_ALLOW_CPU"
# A group over gloo for what the hosts agree on without waiting for their GPUs; None where the default one is gloo.
_hosts: Any = None
# Where every rank says which step it has done, for the one who must tell whom it waited for in vain.
_pulses: Any = None


@dataclass(frozen=True)
class Ranks:
    """This process among the others, and its device."""

    rank: int
    world: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0


def start(timeout_s: float = 1800) -> Ranks:
    """Join the process group that the environment describes (RANK, WORLD_SIZE, MASTER_ADDR); alone without one. Raises
    NodeError where this process's GPU is there and can not be used.
    """
    rank, world, local = (int(os.environ.get(key, default)) for key, default in
                          (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))  # fmt: skip
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", device_index(local, torch.cuda.device_count()))
        _try(device)
    if world > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if backend == "nccl" and not dist.is_nccl_available():
            raise UserError(
                f"torch {torch.__version__} comes without NCCL, which {world} processes on GPUs need: install a build "
                "of torch for CUDA, or start one process."
            )
        place = os.environ.get(RENDEZVOUS)
        store = _rendezvous_store(Path(place), rank, world) if place else next(rendezvous("env://"))[0]
        _check_kind(store, rank, backend)
        hosts_s = timedelta(seconds=timeout_s)
        dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=rank, world_size=world,
                                timeout=hosts_s if backend == "gloo" else hosts_s + AFTER_HOSTS,
                                device_id=device if backend == "nccl" else None)  # fmt: skip
        global _hosts, _pulses
        _pulses = dist.PrefixStore("step", store)
        pulse(0)
        _hosts = dist.new_group(backend="gloo", timeout=hosts_s) if backend == "nccl" else None
        if place and rank == 0:
            Path(place).unlink(missing_ok=True)
    return Ranks(rank, world, local, device)


def _check_kind(store: Any, rank: int, backend: str) -> None:
    """Raise NodeError where this rank would wait for the others in another way than rank 0, for ever."""
    store.set(f"kind/{rank}", backend)
    first = store.get("kind/0").decode()
    if first != backend:
        told = {"nccl": "can use a GPU", "gloo": "can use none"}
        raise NodeError(f"{this_node()}: torch {told[backend]} there, and {told[first]} where rank 0 is: see that all "
                        "nodes have the same driver and GPUs.")  # fmt: skip


def this_node() -> str:
    """The name of this machine as SLURM knows it, else its own."""
    return os.environ.get("SLURMD_NODENAME", "") or socket.gethostname()


def _try(device: torch.device) -> None:
    """Make the GPU this process's, and use it once; raises NodeError where it is broken, or another program has it."""
    try:
        torch.cuda.set_device(device)
        torch.ones(1, device=device).item()
    except RuntimeError as error:
        raise NodeError(f"{this_node()}: GPU {device.index} can not be used{_first_sentence(error)}.") from None


def demand_gpus(asked: int) -> None:
    """Raise UserError where a job asked for GPUs and torch can use none on its node: it would train on the CPU, for
    weeks and without a word. NodeError where the node is to blame, not torch. $MEDTRAIN_ALLOW_CPU=1 lets it.
    """
    if asked <= 0 or torch.cuda.is_available() or os.environ.get(ALLOW_CPU, "") == "1":
        return
    said = f"{this_node()} was asked for {asked} GPU{'s' if asked > 1 else ''}, and torch {torch.__version__}"
    without = f"{ALLOW_CPU}=1 goes on without."
    if torch.version.cuda is None:
        raise UserError(f"{said} is a build for CPUs: install a build of torch for CUDA there; {without}")
    raise NodeError(f"{said} for CUDA {torch.version.cuda} can use none{_why_no_gpu()}: renew its driver, or name a "
                    f"partition with GPUs; {without}")  # fmt: skip


def _why_no_gpu() -> str:
    """What CUDA says, in brackets."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return _first_sentence(error)
    return ""


def _first_sentence(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f" ({' '.join(lines[0].split()).split('. ')[0][:120].rstrip('.')})"


def device_index(local_rank: int, visible: int) -> int:
    """The GPU of a process among the visible ones: its own place, or the only one where SLURM shows each process one
    (--gpus-per-task); raises UserError where there are too few.
    """
    if local_rank < visible:
        return local_rank
    if visible == 1 and os.environ.get("SLURM_GPUS_PER_TASK", "").rsplit(":", 1)[-1] == "1":
        return 0
    raise UserError(
        f"local rank {local_rank} has no GPU of its own, {visible} are visible: start at most one process per GPU."
    )


def _rendezvous_store(place: Path, rank: int, world: int) -> Any:
    """A store on MASTER_ADDR at a port that the system chose, which rank 0 writes into `place`."""
    wait = timedelta(seconds=MEETING_S)
    if rank == 0:
        host = os.environ["MASTER_ADDR"]
        store = dist.TCPStore(host, 0, world, True, wait, wait_for_workers=False)
        write_text(place, f"{host} {store.port}")
        return store
    end = time.monotonic() + MEETING_S
    while time.monotonic() < end:
        try:
            os.listdir(place.parent)  # makes network file systems look again
            host, port = place.read_text(encoding="utf-8").split()
            return dist.TCPStore(host, int(port), world, False, wait)
        except (FileNotFoundError, ValueError):
            time.sleep(0.2)
    raise RuntimeError(f"rank 0 did not say within {MEETING_S:.0f} s where to meet ({place})")


def pulse(step: int) -> None:
    """Tell the other ranks how far this one is; costs some microseconds."""
    _tell(str(step))


def say_failed() -> None:
    """Tell the other ranks that this one ends by an error of its own."""
    _tell("failed")


def _tell(text: str) -> None:
    if _pulses is not None:
        with contextlib.suppress(RuntimeError):  # rank 0 is gone: the next collective says so
            _pulses.set(str(dist.get_rank()), text)


# How long a rank that only lost its partner keeps silent: the partner's own message comes first, and the others say
# meanwhile that they wait too.
LOST_PARTNER_DELAY_S = 3.0


def lost_partner(error: BaseException, step: int) -> str:
    """What to say of an error of the ranks' network in the step after `step`: NCCL's own words, or, some seconds later,
    that another rank died or does not answer; empty for other errors.
    """
    text = str(error)
    if not isinstance(error, dist.DistError) and "gloo/transport" not in text:
        return ""
    if "NCCL error" in text and "ncclRemoteError" not in text:  # of this very rank, as when /dev/shm is full
        say_failed()
        return f"NCCL fails after step {step}: {_nccls_words(text)}"
    _tell("waits")
    with contextlib.suppress(KeyboardInterrupt):  # torchrun ends the rest
        time.sleep(LOST_PARTNER_DELAY_S)
    told = _told()
    failed = [rank for rank, words in told.items() if words == "failed"]
    silent = [rank for rank, words in told.items() if words.isdigit()]
    if failed:
        return f"rank {failed[0]} failed after step {step}: its own message says why"
    named = f"rank {', '.join(map(str, silent[:8]))}" if silent else "another rank"
    if "imed out" in text or "timeout" in text.lower():
        return f"{named} does not answer after step {step}: see what it does there, or give a longer train.timeout_s"
    return f"{named} was lost after step {step}: its own message, or the kernel's (killed for memory?), says why"


def _nccls_words(text: str) -> str:
    """What NCCL says itself of an error: the lines after "Last error:", or the one that names its kind."""
    last = text.partition("Last error:")[2].split("\n\n")[0]
    kind = next((line for line in text.splitlines() if line.startswith("nccl")), text)
    return shown(" ".join((last or kind).split()), 200)


def _told() -> dict[int, str]:
    """What every rank told last; empty where rank 0, which keeps it, is gone."""
    try:
        return {rank: _pulses.get(str(rank)).decode() for rank in range(dist.get_world_size())}
    except (RuntimeError, AttributeError):
        return {}


def _alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank; the hosts wait for each other, not for their GPUs."""
    if _alone():
        return flag
    value = torch.tensor(int(flag))
    dist.all_reduce(value, dist.ReduceOp.MAX, group=_hosts)
    return bool(value)


def sync_hosts() -> None:
    """On GPUs let the hosts wait for each other before they wait for their GPUs, which only NCCL would end."""
    if _hosts is not None:
        any_rank(False)


def _destroy() -> None:
    global _hosts, _pulses
    dist.destroy_process_group()
    _hosts = _pulses = None


def leave() -> None:
    """Leave the process group where other ranks may still wait in it: NCCL would wait for them, and they learn of the
    end by that of this process.
    """
    if dist.is_initialized() and dist.get_backend() != "nccl":
        _destroy()


def finish() -> None:
    """Leave the process group, as every rank does."""
    if dist.is_initialized():
        _destroy()
        # gloo's threads drop what a compiled step left with them, for which they need the interpreter: where it ended
        # first, they would bring the process down
        time.sleep(0.05)


def barrier() -> None:
    """Wait for every rank's host."""
    if not _alone():
        dist.barrier(group=_hosts)


def gather(value: Any) -> list[Any]:
    """Every rank's value, in the order of ranks, on every rank. Values are small and picklable."""
    if _alone():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_hosts)
    return values


def broadcast(value: Any) -> Any:
    """Rank 0's value on every rank."""
    if _alone():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_hosts)
    return box[0]


def mean(value: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over ranks."""
    if not dist.is_initialized():
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()
