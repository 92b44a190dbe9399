"""What sbatch is told; splitting by MaxArraySize; refusals with the line to blame."""

import functools
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_slurm
import pytest

from medslurm import commands, submit
from medslurm.cluster import Cluster, read_cluster
from medslurm.commands import ClusterError
from medslurm.submit import Array

pytestmark = pytest.mark.slurm


def array(count: int = 1, **options: object) -> Array:
    return Array("it's a job", [functools.partial(print, n) for n in range(count)], **options)  # type: ignore[arg-type]


def submitted(*arguments: Any) -> list[str]:
    """The ids of all calls of sbatch."""
    return [job for ids in submit.submit(*arguments) for job in ids]


def test_the_script_asks_for_what_the_cluster_gives(slurm: Path, tmp_path: Path) -> None:
    folder = tmp_path / "it's ä folder"
    lab = Cluster(name="lab", partition="gpu", time="00:30:00", account="onc", qos="long", constraint="a100|h100",
                  gpus_per_node=4, gpu_type="a100", cpus_per_gpu=6, mem="64G", signal_s=90,
                  sbatch={"mail-type": "END"})  # fmt: skip
    text = submit.text(lab, array(3, nodes=2, processes=4, throttle=2), folder, tmp_path / "co de", "afterok:7")
    for line in (
        "--account=onc", "--qos=long", "--constraint='a100|h100'", "--nodes=2", "--ntasks-per-node=4",
        "--cpus-per-task=6", "--gres=gpu:a100:4", "--mem=64G", "--time=30", "--signal=USR2@90", "--array=0-2%2",
        "--dependency=afterok:7", "--kill-on-invalid-dep=yes", "--requeue", "--open-mode=append", "--mail-type=END",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in text
    assert f"export PYTHONPATH='{tmp_path}/co de'" in text
    assert "export PYTHONSAFEPATH=1" in text
    srun = next(line for line in text.splitlines() if line.startswith("srun "))
    for word in ("--kill-on-bad-exit=1", "--wait=0", "--export=ALL", "--cpus-per-task=6"):
        assert f" {word} " in srun
    assert "PYTHONNOUSERSITE" not in text
    assert "--wckey" not in text
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    other = Cluster(name="lab", partition="gpu", gpus_as="gpus-per-node", gpus_per_node=2)
    text = submit.text(other, array(), folder, tmp_path)
    assert "#SBATCH --gpus-per-node=1\n" in text
    assert "--gres" not in text
    assert "--partition=gpu" in text
    assert not re.search(r"--(gres|gpus)", submit.text(other, array(gpus=False), folder, tmp_path))


def test_arrays_are_split_and_the_throttle_is_shared(slurm: Path, tmp_path: Path) -> None:
    (slurm / "max_array.txt").write_text("4")
    jobs = submitted(Cluster(name="lab"), array(10, throttle=5), tmp_path / "jobs", tmp_path)
    assert jobs == [*(f"100_{n}" for n in range(4)), *(f"101_{n}" for n in range(4)), "102_0", "102_1"]
    assert [fake_slurm.array_of(text) for text in fake_slurm.scripts(slurm)] == ["0-3%2", "0-3%2", "0-1%2"]
    assert submit.after("afterany", jobs) == "afterany:100:101:102"
    assert submit.after("afterok", []) == ""
    assert submitted(Cluster(name="lab"), array(1), tmp_path / "jobs", tmp_path) == ["103"]
    assert submit.log_of(tmp_path / "jobs", "103").name == "103_0_log.out"
    assert len(list((tmp_path / "jobs").glob("*_submitted.pkl"))) == 11


def test_a_batch_jobs_variables_are_hidden_but_not_where_the_controller_is(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_CONF", "/etc/x.conf")
    (slurm / "bin" / "sbatch").write_text('#!/bin/sh\necho "job 5 ${SLURM_JOB_ID:-none} $SLURM_CONF" >&2; env >"'
                                          f'{tmp_path}/seen"; echo Submitted batch job 5\n')  # fmt: skip
    submitted(Cluster(name="lab"), array(), tmp_path / "jobs", tmp_path)
    seen = (tmp_path / "seen").read_text()
    assert "SLURM_JOB_ID=" not in seen
    assert "SLURM_CONF=/etc/x.conf" in seen


def test_users_defaults_do_not_override_what_a_job_asks_for(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SBATCH_PARTITION", "SBATCH_TIMELIMIT", "SBATCH_NO_REQUEUE", "SBATCH_ACCOUNT", "SQUEUE_PARTITION"):
        monkeypatch.setenv(name, "other")
    monkeypatch.setenv("SLURM_CLUSTERS", "second")
    submitted(Cluster(name="lab", partition="gpu"), array(), tmp_path / "jobs", tmp_path)
    seen = fake_slurm.environment(slurm, "sbatch")
    assert {name for name in seen if name.startswith("SBATCH_")} == {"SBATCH_ACCOUNT"}  # the cluster names none
    assert seen["SLURM_CLUSTERS"] == "second"
    (slurm / "squeue.txt").write_text("")
    assert commands.live(["7"]) == set()
    seen = fake_slurm.environment(slurm, "squeue")
    assert "SQUEUE_PARTITION" not in seen
    assert seen["SLURM_CLUSTERS"] == "second"  # all programs ask the same one


def test_a_container_and_the_sites_words_for_srun(slurm: Path, tmp_path: Path) -> None:
    lab = Cluster(name="lab", container=("apptainer", "exec", "x.sif"))
    assert "export PYTHONNOUSERSITE=1" in submit.text(lab, array(), tmp_path, tmp_path)
    path = tmp_path / "clusters.toml"
    path.write_text("[lab]\nsrun = ['--container-image=x y.sqsh', '--mpi=none']\npython = 'python'\n")
    srun = next(line for line in submit.text(read_cluster("lab", path), array(), tmp_path, tmp_path).splitlines()
                if line.startswith("srun "))  # fmt: skip
    assert " '--container-image=x y.sqsh' --mpi=none " in srun


def test_a_line_before_python_that_fails_ends_the_job(tmp_path: Path) -> None:
    lines = Cluster(name="lab", modules=("cuda/13", "it's"), venv=str(tmp_path)).setup_lines()
    for known, wanted in (("cuda/13", "`module load 'it'\"'\"'s'` failed on"), ("", "`module load cuda/13` failed on")):
        code = f'module() {{ [ "$2" = "{known}" ]; }}\n' + "\n".join(lines)
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 3
        assert done.stderr.startswith(f"error: {wanted}")
    done = subprocess.run(["bash", "-c", "module() { true; }\n" + "\n".join(lines)], capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 3
    assert f"{tmp_path}/bin/activate` failed on" in done.stderr


def test_nodes_that_are_away_are_waited_for(slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lab = Cluster(name="lab", partition="hidden")
    (slurm / "refuse_test.txt").write_text("allocation failure: Requested node configuration is not available")
    with pytest.raises(ClusterError, match="node configuration"):  # sinfo tells of no node that is away
        submit.check(lab, array(), tmp_path)
    (slurm / "sinfo.txt").write_text("2\n1\n")
    submit.check(lab, array(), tmp_path)
    assert "3 are down or drained: it waits" in capsys.readouterr().out
    assert submitted(lab, array(), tmp_path / "jobs", tmp_path) == ["100"]


def test_sbatch_is_tried_again_while_the_controller_is_down(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit.time, "sleep", lambda seconds: None)
    (slurm / "down").write_bytes(b"xxx")
    assert submitted(Cluster(name="lab"), array(), tmp_path / "jobs", tmp_path) == ["100"]
    monkeypatch.setattr(commands, "PATIENCE_S", 0)
    (slurm / "refuse.txt").write_text("Batch job submission failed: Job violates accounting/QOS policy")
    with pytest.raises(ClusterError, match=r"sbatch refuses: .*Job violates accounting/QOS policy"):
        submitted(Cluster(name="lab"), array(), tmp_path / "jobs", tmp_path)


@pytest.mark.parametrize(
    ("refusal", "line"),
    [("Invalid account or account/partition combination specified", "account = 'onc'"),
     ("Invalid qos specification", "qos = 'long'"), ("Invalid feature specification", "constraint = 'fast'"),
     ("Requested node configuration is not available", "mem = '64G'"),
     ("Invalid generic resource (gres) specification", "gpus_per_node = 4"), ("something new", "partition = 'gpu'")],
)  # fmt: skip
def test_a_refusal_names_the_line_to_blame(slurm: Path, tmp_path: Path, refusal: str, line: str) -> None:
    path = tmp_path / "clusters.toml"
    path.write_text(
        "[lab]\npartition='gpu'\naccount='onc'\nqos='long'\nconstraint='fast'\nmem='64G'\ngpus_per_node=4\n"
    )
    (slurm / "refuse.txt").write_text(f"allocation failure: {refusal}")
    with pytest.raises(ClusterError) as caught:
        submit.check(read_cluster("lab", path), array(), tmp_path)
    assert f"({line}): SLURM says: allocation failure: {refusal}." in str(caught.value)


def test_a_refusal_of_a_job_without_gpus_names_its_own_keys(slurm: Path, tmp_path: Path) -> None:
    path = tmp_path / "clusters.toml"
    path.write_text("[lab]\nqos='long'\ncpu_partition='cpu'\ncpu_qos='short'\nmem_per_gpu='9G'\ngpus_per_node=2\n")
    lab = read_cluster("lab", path)
    script = submit.text(lab, array(gpus=False), tmp_path, tmp_path)
    assert "#SBATCH --qos=short\n" in script
    assert "--mem" not in script
    assert "#SBATCH --mem=18G\n" in submit.text(lab, array(processes=2), tmp_path, tmp_path)
    for refusal, line in (("Invalid qos specification", "cpu_qos = 'short'"), ("odd", "cpu_partition = 'cpu'")):
        (slurm / "refuse.txt").write_text(refusal)
        with pytest.raises(ClusterError) as caught:
            submit.check(lab, array(gpus=False), tmp_path)
        assert f"({line}): SLURM says: {refusal}." in str(caught.value)
    (slurm / "refuse.txt").write_text("Memory specification can not be satisfied")
    with pytest.raises(ClusterError, match=r"mem_per_gpu = '9G'"):
        submit.check(lab, array(), tmp_path)


def test_a_time_over_the_partitions_is_refused(slurm: Path, tmp_path: Path) -> None:
    lab = Cluster(name="lab", partition="gpu", time="2-00:00:00")
    with pytest.raises(ClusterError, match="partition gpu allows 1-00:00:00 at most"):
        submit.check(lab, array(), tmp_path)
    submit.check(replace(lab, time="00:30:00"), array(), tmp_path)
