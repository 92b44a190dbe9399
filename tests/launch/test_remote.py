"""Sweeps for a cluster: plan, dry run, budget, submission, resume, refusals; SLURM's programs are stand-ins."""

import csv
import json
import re
from pathlib import Path

import fake_slurm
import pytest
from launch_helpers import run_main

pytestmark = pytest.mark.slurm


def words(slurm: Path, data: Path, out: Path, *extra: object, sweep: str = "brats_demo") -> list[object]:
    return ["sweep", sweep, "--data", data, "--out", out, "--cluster", "lab", "--cluster-file", slurm / "clusters.toml",
            *extra]  # fmt: skip


def jobs(out: Path) -> list[dict[str, str]]:
    with open(out / "jobs.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def queue(slurm: Path, out: Path, state: str = "RUNNING") -> None:
    """Let squeue say that every job of a sweep is in this state."""
    lines = [f"{job['job']}|{state}|None|node1" for job in jobs(out)]
    (slurm / "squeue.txt").write_text("\n".join(lines) + "\n")


def test_a_dry_run_shows_the_plan_and_the_scripts_and_submits_nothing(
    slurm: Path, phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = ("--seeds", 3, "--folds", 2, "--throttle", 2, "--nodes", 2, "--processes", 4, "--set", "train.batch=8")
    assert run_main(*words(slurm, phantoms, tmp_path / "s", *extra, "--dry-run")) == 0
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if "s-brats_segresnet_demo" in line)
    assert [cell.strip() for cell in line.split("|")[2:9]] == ["6", "2", "2", "4", "4", "02:00:00", "96"]
    assert "12 members, at most 194 GPU-hours" in printed
    assert printed.count("#!/bin/bash") == 4
    assert "#SBATCH --array=0-5%2" in printed
    assert not (tmp_path / "s").exists()
    assert not fake_slurm.calls(slurm, "sbatch")


def test_a_dry_run_needs_no_slurm(
    slurm: Path, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/x")
    assert run_main(*words(slurm, phantoms, tmp_path / "s", "--dry-run")) == 0
    assert "srun --unbuffered" in capsys.readouterr().out


def test_one_array_a_recipe_and_a_final_job_after_all(slurm: Path, phantoms: Path, tmp_path: Path) -> None:
    out = tmp_path / "it's ä sweep"
    assert run_main(*words(slurm, phantoms, out, "--seeds", 2)) == 0
    submitted = jobs(out)
    assert [(job["kind"], job["job"]) for job in submitted] == [
        ("prepare", "100"), ("train", "101_0"), ("train", "101_1"), ("train", "102_0"), ("train", "102_1"),
        ("finish", "103")]  # fmt: skip
    plan = json.loads((out / "plan.json").read_text())
    assert [job["folder"] for job in submitted[1:5]] == [member["folder"] for member in plan["members"]]
    labels = [member["label"] for member in plan["members"]]
    assert labels[:2] == ["brats_segresnet_demo", "brats_segresnet_demo (seed 1)"]
    scripts = fake_slurm.scripts(slurm)
    waits = [re.findall(r"--dependency=(\S+)", script) for script in scripts]
    assert waits == [[], ["afterok:100"], ["afterok:100"], ["afterany:101:102"]]
    assert "--gres" not in scripts[0]
    assert all("--gres=gpu:1" in script for script in scripts[1:])
    code = out / "code" / submitted[0]["code"]
    assert (code / "medslurm" / "job.py").is_file()
    assert not (out / "lock.json").exists()
    assert (out / "jobs").stat().st_mode & 0o777 == 0o700  # it holds pickles


def test_jobs_know_how_many_gpus_they_were_given(slurm: Path, phantoms: Path, tmp_path: Path) -> None:
    from medlaunch.arrays import make_jobs
    from medlaunch.plan import read_plan, read_recipes
    from medslurm.cluster import Cluster

    extra = ("--processes", 2, "--set", "train.batch=2")
    assert run_main(*words(slurm, phantoms, tmp_path / "s", *extra)) == 0
    plan = read_plan(tmp_path / "s")
    for gpus_per_node, wanted in ((4, [2, 2, 1]), (0, [0, 0, 0])):
        lab = Cluster(name="lab", gpus_per_node=gpus_per_node)
        made = make_jobs(tmp_path / "s", plan, read_recipes(plan, tmp_path / "s"),
                         {member["folder"] for member in plan["members"]}, lab, prepare=True)  # fmt: skip
        asked = [(array.calls[0].gpus, array.gpus_per_node(lab)) for array in made.all[1:]]  # type: ignore[attr-defined]
        assert asked == [(number, number) for number in wanted]


def test_files_that_recipes_name_are_found_by_jobs_and_looked_at_before_anything_is_submitted(
    slurm: Path, phantoms: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for data, sweep, name in ((phantoms, "brats_demo", "s"), (pictures, "multicancer_demo", "t")):
        sets = ("--set", "train.deepspeed=ds.json", "--set", "train.strategy=deepspeed")
        typed = words(slurm, data, tmp_path / name, *sets, sweep=sweep)
        for content, told in ((None, "can not be read as JSON (No such file"), ("{", "can not be read as JSON"),
                              ("[]", "holds no settings of DeepSpeed")):  # fmt: skip
            if content is not None:
                (tmp_path / "ds.json").write_text(content)
            assert run_main(*typed) == 2
            error = capsys.readouterr().err
            assert f"error: {tmp_path}/ds.json {told}" in error
            assert error.count("\n") == 1
            assert not (tmp_path / name).exists()
        (tmp_path / "ds.json").write_text("{}")
        assert run_main(*typed) == 0
        plan = json.loads((tmp_path / name / "plan.json").read_text())
        assert {m["settings"]["train"]["deepspeed"] for m in plan["members"]} == {f"{tmp_path}/ds.json"}
        (tmp_path / "ds.json").unlink()


@pytest.mark.parametrize(
    ("sweep", "processes", "settings", "told"),
    [
        ("brats_demo", 2, "train.batch=5", "shared by 2 processes x 1 accumulations: --set train.batch=4"),
        ("brats_demo", 2, "train.batch=2 train.strategy=single", "single can not use 2 processes"),
        ("brats_demo", 1, "optim.schedule=plateau optim.min_lr=0.1", "holds: --set optim.min_lr=0"),
        ("brats_demo", 1, "train.compile=graphs train.accumulate=2 train.batch=2", "graphs can not accumulate 2"),
        ("brats_demo", 1, "train.strategy=deepspeed train.precision=fp16", "does not train in fp16"),
        ("brats_demo", 1, "train.strategy=deepspeed optim.library=apex", "--set optim.library=torch"),
        ("brats_demo", 1, "train.strategy=deepspeed train.deepspeed=ds.json", "stage to 1, the recipe to 2"),
        ("multicancer_demo", 1, "train.strategy=deepspeed finetune.freeze_epochs=1", "can not release weights later"),
    ],
)
def test_what_every_job_would_refuse_is_told_before_anything_is_submitted(
    sweep: str, processes: int, settings: str, told: str, slurm: Path, phantoms: Path, pictures: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1}}')
    data = phantoms if sweep == "brats_demo" else pictures
    sets = [word for setting in settings.split() for word in ("--set", setting)]
    assert run_main(*words(slurm, data, tmp_path / "s", "--processes", processes, *sets, sweep=sweep)) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert not (tmp_path / "s").exists()


def test_a_plan_over_the_budget_is_refused(
    slurm: Path, phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(*words(slurm, phantoms, tmp_path / "s", "--max-gpu-hours", 5.9)) == 2
    assert "up to 6 GPU-hours, more than --max-gpu-hours 5.9" in capsys.readouterr().err
    assert not fake_slurm.calls(slurm, "sbatch")
    assert run_main(*words(slurm, phantoms, tmp_path / "s", "--max-gpu-hours", 6)) == 0


def test_two_writers_are_refused_and_only_what_is_missing_is_submitted_again(
    slurm: Path, phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s"
    assert run_main(*words(slurm, phantoms, out)) == 0
    queue(slurm, out)
    assert run_main(*words(slurm, phantoms, out)) == 2
    assert "has jobs that wait or run (100, 101, 102, …)" in capsys.readouterr().err
    assert run_main("sweep", "brats_demo", "--data", phantoms, "--out", out) == 2
    assert "has jobs on the cluster" in capsys.readouterr().err
    assert run_main("sweep", "--resume", out) == 0
    assert "nothing is missing" in capsys.readouterr().out
    assert len(jobs(out)) == 4
    # the first member is done, the second's job and the final one are gone
    folder = out / jobs(out)[1]["folder"]
    folder.mkdir()
    (folder / "done.json").write_text('{"scores": {"mean": 0.5}}')
    (out / "prepared.json").write_text("{}")
    (out / "cache.h5").write_text("")
    (slurm / "squeue.txt").write_text("")
    assert run_main("sweep", "--resume", out) == 0
    assert [(job["kind"], job["job"]) for job in jobs(out)[4:]] == [("train", "104"), ("finish", "105")]
    assert "--dependency=afterany:104" in fake_slurm.scripts(slurm)[-1]
    # the second runs, and so does its final job: nothing to do; then the final job is cancelled
    (slurm / "squeue.txt").write_text("104|RUNNING|None|node1\n105|PENDING|Dependency|\n")
    assert run_main("sweep", "--resume", out) == 0
    assert "1 members wait or run" in capsys.readouterr().out
    (slurm / "squeue.txt").write_text("104|RUNNING|None|node1\n")
    assert run_main("sweep", "--resume", out) == 0
    assert [(job["kind"], job["job"]) for job in jobs(out)[6:]] == [("finish", "106")]


def test_a_sweep_that_runs_here_is_not_cancelled(
    slurm: Path, phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(*words(slurm, phantoms, tmp_path / "s")) == 0
    (tmp_path / "s" / "jobs.csv").unlink()
    assert run_main("sweep", "cancel", tmp_path / "s") == 2
    assert "was not submitted to a cluster" in capsys.readouterr().err


@pytest.mark.parametrize(("file", "owner"), [("recipe.json", "a run"), ("dataset.json", "a data set")])
def test_folders_of_others_are_no_sweeps(
    file: str, owner: str, slurm: Path, phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / file).write_text("{}")
    typed = words(slurm, phantoms, tmp_path, "--dry-run")
    local = ["sweep", "brats_demo", "--data", phantoms, "--out", tmp_path]
    for command in (typed, local):
        assert run_main(*command) == 2
        assert f"{tmp_path} belongs to {owner}: give another --out" in capsys.readouterr().err
    assert not (tmp_path / "cache.h5").exists()


def test_images_have_an_array_a_network_with_a_task_a_cancer(slurm: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    assert run_main(*words(slurm, pictures, out, "--models", "vgg19", "densenet201", sweep="multicancer_demo")) == 0
    assert [job["job"] for job in jobs(out)] == ["100", "101_0", "101_1", "102_0", "102_1", "103"]
    plan = json.loads((out / "plan.json").read_text())
    assert [member["settings"]["data"]["cancer"] for member in plan["members"]] == [
        "Brain Cancer", "Brain Cancer", "Oral Cancer", "Oral Cancer"]  # fmt: skip
    scripts = fake_slurm.scripts(slurm)
    assert ["--gres=gpu:1" in script for script in scripts] == [False, True, True, False]  # tables need no GPU
    assert run_main(*words(slurm, pictures, tmp_path / "t", "--folds", 3, "--seeds", 2, sweep="multicancer_demo")) == 0
    assert [job["job"] for job in jobs(tmp_path / "t")][-1] == "109"
    assert len(jobs(tmp_path / "t")) == 1 + 2 * 4 * 3 * 2 + 1


def test_the_final_job_of_images_goes_where_the_data_is_prepared_and_costs_no_gpu(
    slurm: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open(slurm / "clusters.toml", "a") as file:
        file.write('cpu_partition = "cpu"\ncpu_time = "00:30:00"\n')
    asked = words(slurm, pictures, tmp_path / "s", "--models", "vgg19", "--max-gpu-hours", 4, sweep="multicancer_demo")
    assert run_main(*asked) == 0  # two members of two hours
    assert "2 members, at most 4 GPU-hours" in capsys.readouterr().out
    scripts = fake_slurm.scripts(slurm)
    assert ["--partition=cpu\n" in script and "--time=30\n" in script for script in scripts] == [True, False, True]


def test_refusals(
    slurm: Path, phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "s"
    (slurm / "bad.toml").write_text('[lab]\npartitoin = "gpu"\n')
    (slurm / "absent.toml").write_text('[lab]\npartition = "absent"\n')
    (slurm / "cpus.toml").write_text('[lab]\npartition = "cpu"\ngpus_per_node = 0\n')
    for extra, told in (
        (("--models", "resnet"), "brats_demo has segresnet, unetr"),
        (("--seeds", 0), "at least 1"),
        (("--folds", 1), "at least 2"),
        (("--processes", 5, "--set", "train.batch=5"), "has 4 GPUs"),
        (("--cluster-file", slurm / "cpus.toml", "--set", "train.compile=replay"), "nodes of lab have no GPU: --set"),
        (("--nodes", 0), "at least 1"),
        (("--nodes", 3), "--set train.batch=3"),
        (("--time", "soon"), "is no time"),
        (("--cluster-file", slurm / "bad.toml"), "line 2: there is no key 'partitoin': choose partition"),
        (("--cluster-file", slurm / "none.toml"), "is not there"),
        (("--cluster-file", slurm / "absent.toml"), "line 2 (partition = 'absent'): SLURM says: Invalid partition"),
        (("--cluster", "lib"), "has no cluster 'lib': it describes lab"),
        (("--time", "3-00:00:00"), "allows 1-00:00:00 at most"),
        (("--data", tmp_path / "none"), "none is not a folder"),
        (("--every", 0), "above 0"),
        (("--out", tmp_path / "100%"), "has a %"),
        (("--out", tmp_path / "12:30"), "has a :, which parts PYTHONPATH"),
    ):
        assert run_main(*words(slurm, phantoms, out, *extra)) == 2, extra
        error = capsys.readouterr().err
        assert told in error, error
        assert error.count("\n") == 1
    assert not fake_slurm.scripts(slurm)
    for arguments, told in (
        (("sweep", "brats_demo", "--out", out), "needs its name, --data and --out"),
        (("sweep", "brats_demo", "--data", phantoms, "--out", out, "--dry-run"), "add --cluster NAME"),
        (("sweep", "brats_demo", "--data", phantoms, "--out", out, "--nodes", 2), "add --cluster NAME"),
        (("sweep", "brats_demo", "--data", phantoms, "--out", out, "--cluster-file", "f"), "add --cluster NAME"),
        (("sweep", "--resume", out, "--seeds", 2), "leave --seeds out"),
        (("sweep", "--resume", out, "--set", "optim.lr=1"), "leave --set out"),
        (("sweep", "--resume", tmp_path / "none"), "no plan.json"),
        (("sweep", "cancel", tmp_path / "none"), "no plan.json"),
        (("sweep", "follow", tmp_path / "none"), "no plan.json"),
        (("status", tmp_path / "none"), "no plan.json"),
        (("status", tmp_path / "none", "--watch", 0), "above 0"),
    ):
        assert run_main(*arguments) == 2
        assert told in capsys.readouterr().err
    monkeypatch.setenv("PATH", "/x")
    assert run_main(*words(slurm, phantoms, out)) == 2
    assert "is not on PATH" in capsys.readouterr().err


def test_a_partition_without_gpus_is_refused_for_what_takes_weeks_there(
    slurm: Path, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`sbatch slurm/brats.sh` without a partition lands on the site's default one; what was described as a cluster
    without GPUs is meant so.
    """
    (slurm / "sinfo.txt").write_text("64|(null)\n")
    for name, value in (("ID", "7"), ("PARTITION", "cpu"), ("ACCOUNT", "onc")):
        monkeypatch.setenv(f"SLURM_JOB_{name}", value)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MEDTRAIN_ALLOW_CPU", raising=False)

    def asked(sweep: str, *more: object) -> list[object]:
        where = more or ("--cluster", "here")
        return ["sweep", sweep, "--data", phantoms, "--out", tmp_path / "s", "--dry-run", *where]

    assert run_main(*asked("brats")) == 2
    error = capsys.readouterr().err
    assert "brats_segresnet wants a GPU, and partition cpu has none: sbatch -p PARTITION" in error
    assert error.count("\n") == 1
    assert run_main(*asked("brats_demo")) == 0
    assert "note:" not in capsys.readouterr().out
    monkeypatch.setenv("MEDTRAIN_ALLOW_CPU", "1")
    assert run_main(*asked("brats")) == 0
    note = "has no GPUs; brats_segresnet, brats_unetr will take days to weeks (brats_segresnet_2mm"
    assert note in capsys.readouterr().out
    monkeypatch.delenv("MEDTRAIN_ALLOW_CPU")
    (tmp_path / "c.toml").write_text("[lab]\ngpus_per_node = 0\n")
    assert run_main(*asked("brats", "--cluster", "lab", "--cluster-file", tmp_path / "c.toml")) == 0
    assert note in capsys.readouterr().out


def test_another_sweep_in_the_folder_and_an_unwritable_one(
    slurm: Path, phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s"
    assert run_main(*words(slurm, phantoms, out)) == 0
    assert run_main(*words(slurm, phantoms, out, "--seeds", 2)) == 2
    assert "holds another sweep" in capsys.readouterr().err
    other = tmp_path / "other data"
    other.symlink_to(phantoms)
    assert run_main(*words(slurm, other, out)) == 2
    assert "holds another sweep" in capsys.readouterr().err
    (slurm / "squeue.txt").unlink()
    assert run_main("sweep", "--resume", out) == 2
    assert "squeue does not answer" in capsys.readouterr().err
    assert len(jobs(out)) == 4
    (slurm / "squeue.txt").write_text("")
    assert run_main(*words(slurm, phantoms, out, "--seeds", 2, "--resume", out)) == 2
    assert "holds another sweep" in capsys.readouterr().err
    assert run_main("sweep", "--resume", out, "--time", "10:00:00", "--throttle", 3, "--dry-run") == 0
    assert "10:00:00" in capsys.readouterr().out
    (tmp_path / "file").write_text("")
    assert run_main(*words(slurm, phantoms, tmp_path / "file" / "s")) == 2
    assert "can not be made (Not a directory): give a writable --out" in capsys.readouterr().err
    assert run_main("sweep", "brats_demo", "--data", phantoms, "--out", "/proc/x") == 2
    assert "can not be made" in capsys.readouterr().err
    (out / "plan.json").write_text("{}")
    assert run_main("status", out) == 2
    assert "damaged or of another version" in capsys.readouterr().err
