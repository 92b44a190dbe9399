"""Ranks that meet without a port chosen beforehand; which GPU is whose."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed import DistBackendError

from medtrain.distributed import any_rank, demand_gpus, device_index, lost_partner, start
from medtrain.errors import NodeError, UserError

MEET = """
import sys
from medtrain import distributed
ranks = distributed.start()
assert distributed.gather(ranks.rank) == [0, 1, 2]
print(distributed.any_rank(ranks.rank == 2), distributed.any_rank(False))
distributed.finish()
"""


HOSTS = """
import sys, time
from datetime import timedelta
import torch.distributed as dist
from medtrain import distributed
ranks = distributed.start()
# as over NCCL, whose place a second group of gloo takes here: the default one has more patience than the hosts
distributed._hosts = dist.new_group(backend="gloo", timeout=timedelta(seconds=2))
assert distributed.gather(ranks.rank) == [0, 1] and distributed.broadcast(ranks.rank) == 0
distributed.barrier()
distributed.sync_hosts()
if ranks.rank == 1:
    time.sleep(8)
    sys.exit()
began = time.monotonic()
try:
    arguments = {"gather": (1,)}.get(sys.argv[1], ())
    getattr(distributed, sys.argv[1])(*arguments)
except RuntimeError as error:
    assert time.monotonic() - began < 6
    print(distributed.lost_partner(error, 7))
"""


def with_rank(rank: int, code: str, meet: Path, *arguments: str, **pipes: int) -> "subprocess.Popen[str]":
    """One of two processes that meet."""
    told = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "localhost",
            "MEDTRAIN_RENDEZVOUS": meet, "OMP_NUM_THREADS": 1}  # fmt: skip
    environment = {**os.environ, **{name: str(value) for name, value in told.items()}}
    environment.pop("MASTER_PORT", None)
    return subprocess.Popen([sys.executable, "-c", code, *arguments], text=True, env=environment, **pipes)


@pytest.mark.distributed
@pytest.mark.parametrize("call", ["sync_hosts", "gather", "barrier"])
def test_hosts_do_not_wait_for_as_long_as_their_gpus(tmp_path: Path, call: str) -> None:
    """What ranks say to each other goes over the hosts' group: one that hangs is told in a sentence."""
    processes = [with_rank(rank, HOSTS, tmp_path / "meet", call, stdout=subprocess.PIPE) for rank in range(2)]
    text, _ = processes[0].communicate(timeout=400)
    processes[1].wait(timeout=400)
    assert text.startswith("rank 1 does not answer after step 7: ")


@pytest.mark.distributed
def test_two_groups_on_one_machine_meet_each_on_its_own(tmp_path: Path) -> None:
    processes = []
    for group in range(2):
        for rank in range(3):
            told = {"RANK": rank, "WORLD_SIZE": 3, "LOCAL_RANK": rank, "MASTER_ADDR": "localhost",
                    "MEDTRAIN_RENDEZVOUS": tmp_path / f"meet-{group}", "OMP_NUM_THREADS": 1}  # fmt: skip
            environment = {**os.environ, **{name: str(value) for name, value in told.items()}}
            environment.pop("MASTER_PORT", None)
            processes.append(subprocess.Popen([sys.executable, "-c", MEET], stdout=subprocess.PIPE, text=True,
                                              env=environment))  # fmt: skip
    for process in processes:
        text, _ = process.communicate(timeout=400)
        assert process.returncode == 0
        assert text == "True False\n"
    assert not list(tmp_path.iterdir())


def test_alone_a_flag_is_ones_own() -> None:
    assert any_rank(True)
    assert not any_rank(False)


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_GPUS_PER_TASK", raising=False)
    assert [device_index(rank, 4) for rank in range(4)] == [0, 1, 2, 3]
    with pytest.raises(UserError, match="local rank 1 has no GPU of its own, 1 are visible"):
        device_index(1, 1)
    monkeypatch.setenv("SLURM_GPUS_PER_TASK", "a100:1")  # then each process sees one device, its own
    assert device_index(1, 1) == 0


def test_gpus_without_nccl_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("medtrain.distributed._try", lambda device: None)
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: False)
    with pytest.raises(UserError, match="without NCCL, which 2 processes on GPUs need"):
        start()


SHM = """NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, unhandled system error (run with
NCCL_DEBUG=INFO for details), NCCL version 2.28.9
ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.
Last error:
Error while creating shared memory segment /dev/shm/nccl-kXbJ2z (size 33030528), error: No space left on device (28)"""


def test_what_nccl_lacks_on_this_very_rank_is_no_other_ranks_death() -> None:
    told = lost_partner(DistBackendError(SHM), 0)
    assert told.startswith("NCCL fails after step 0: Error while creating shared memory segment /dev/shm/nccl-")
    assert told.endswith("No space left on device (28)")


KINDS = """
import sys, time
from pathlib import Path
from medtrain import distributed
ended = Path(sys.argv[1])
def init(*arguments, **options):
    while not ended.exists():
        time.sleep(0.1)
    raise SystemExit("meets the others")
distributed.dist.init_process_group = init
if distributed.os.environ["RANK"] == "1":  # as on a node whose GPUs work, beside one whose do not
    distributed.torch.cuda.is_available = lambda: True
    distributed.torch.cuda.device_count = lambda: 2
    distributed.dist.is_nccl_available = lambda: True
    distributed._try = lambda device: None
try:
    distributed.start()
finally:
    ended.touch()
"""


@pytest.mark.distributed
def test_a_node_whose_gpus_do_not_work_does_not_wait_for_others_whose_do(tmp_path: Path) -> None:
    meet, ended = tmp_path / "meet", str(tmp_path / "ended")
    processes = [with_rank(rank, KINDS, meet, ended, stderr=subprocess.PIPE) for rank in range(2)]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert "meets the others" in said[0]
    assert "torch can use a GPU there, and can use none where rank 0 is" in said[1]


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update it.")

    monkeypatch.delenv("MEDTRAIN_ALLOW_CPU", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.init", init)


def test_gpus_that_can_not_be_used_are_told_with_node_and_remedy(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "gpu07")
    monkeypatch.setattr("torch.version.cuda", "13.0")
    with pytest.raises(NodeError, match=r"^gpu07 was asked for 2 GPUs, .* for CUDA 13\.0 .* with GPUs; ") as told:
        demand_gpus(2)
    assert "is too old (found version 11040)): renew its driver" in str(told.value)
    monkeypatch.setattr("torch.version.cuda", None)
    with pytest.raises(
        UserError, match=r"asked for 1 GPU, .* is a build for CPUs: install a build of torch for CUDA"
    ) as cpu:
        demand_gpus(1)
    assert not isinstance(cpu.value, NodeError)  # every node has this torch


def test_a_cpu_is_taken_where_no_gpu_was_asked_for_or_it_is_allowed(
    no_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert demand_gpus(0) is None  # others raise
    monkeypatch.setenv("MEDTRAIN_ALLOW_CPU", "1")
    assert demand_gpus(4) is None
    monkeypatch.setenv("MEDTRAIN_ALLOW_CPU", "0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert demand_gpus(4) is None


def test_a_gpu_that_is_there_and_broken_is_the_nodes_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: torch.device) -> None:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be reported ...")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.set_device", broken)
    monkeypatch.setenv("SLURMD_NODENAME", "gpu07")
    monkeypatch.setenv("LOCAL_RANK", "2")
    words = "gpu07: GPU 2 can not be used (CUDA error: uncorrectable ECC error encountered)."
    with pytest.raises(NodeError, match=re.escape(words)):
        start()
