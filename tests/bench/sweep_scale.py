"""Planning, submitting and showing a sweep of 1,000 members, on a real SLURM where this machine can hold one (root on
Debian, see tests/system/slurm_cluster.py), with members that do nothing.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

SEEDS = 500  # of two recipes
MAX_ARRAY = 300  # so that each recipe's array has to be split
PLAN = """
import resource, sys, time
from pathlib import Path
began = time.perf_counter()
from medlaunch.plan import Request, make_plan, read_recipes, write_plan
from medlaunch.arrays import make_jobs, table
from medslurm.cluster import read_cluster
out, data, seeds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
request = Request(sweep="brats_demo", data=data, seeds=seeds, cluster="many", cluster_file=sys.argv[4])
plan = make_plan(request, request.recipes())
jobs = make_jobs(out, plan, read_recipes(plan, out), {m["folder"] for m in plan["members"]},
                 read_cluster("many", Path(sys.argv[4])), prepare=True)
write_plan(out, plan)
table(jobs)
print(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
"""


def planning(out: Path, data: Path, clusters: Path) -> tuple[float, float]:
    """(seconds with all imports, MB) of a new process that plans."""
    words = [sys.executable, "-c", PLAN, str(out), str(data), str(SEEDS), str(clusters)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    seconds, memory = map(float, done.stdout.split())
    return seconds, memory


def write_runs(out: Path) -> None:
    """What 1,000 members of which each has a run behind it leave: four small files each."""
    from medlaunch.plan import read_plan
    from medtrain.files import write_json

    for number, member in enumerate(read_plan(out)["members"]):
        run = out / member["folder"]
        run.mkdir(exist_ok=True)
        told = {"phase": "train", "step": 90, "total": 100, "epoch": 9.0, "scores": {"mean": 0.5}, "left_s": 60}
        write_json(run / "status.json", {**told, "time": time.time()})
        write_json(run / "job.json", {"job": f"1_{number}", "nodes": ["node1"], "starts": 2, "stuck": [], "log": "x"})
        if number % 2:
            write_json(run / "done.json", {"scores": {"mean": 0.6}, "steps": 100, "epochs": 10})
        elif number % 5 == 0:
            write_json(run / "failed.json", {"status": "failed", "reason": "RuntimeError: x"})


def showing(out: Path) -> float:
    """Seconds of `launch/status.py DIR --files-only`, start of Python included."""
    script = Path(__file__).resolve().parents[2] / "launch" / "status.py"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, str(script), str(out), "--files-only"], capture_output=True, text=True,
                          check=True)  # fmt: skip
    assert done.stdout.count("| done ") == SEEDS
    return time.perf_counter() - began


def submitting(out: Path, clusters: Path) -> tuple[float, int, float, Counter[str]]:
    """(seconds to submit, calls of sbatch, seconds until all have ended, how many ended how)."""
    from medlaunch.arrays import make_jobs
    from medlaunch.plan import read_plan, read_recipes
    from medlaunch.remote import Submission
    from medlaunch.report import read_jobs, standings
    from medslurm import commands
    from medslurm.cluster import read_cluster

    plan = read_plan(out)
    folders = {m["folder"] for m in plan["members"]}
    cluster = read_cluster("many", clusters)
    jobs = make_jobs(out, plan, read_recipes(plan, out), folders, cluster, prepare=False)
    began = time.perf_counter()
    Submission(out, plan, cluster, [], set()).submit(jobs)
    seconds = time.perf_counter() - began
    submitted = read_jobs(out)
    while True:
        states, _ = commands.states(job.job for job in submitted)
        if len(states) >= len(submitted) and not any(state.active for state in states.values()):
            break
        time.sleep(2)
    ended = Counter(states[job.job].state for job in submitted if job.kind == "train")
    assert len(standings(out, plan, states)) == len(folders)
    return seconds, len({job.job.split("_")[0] for job in submitted}), time.perf_counter() - began, ended


def main() -> None:
    """Measure all in one run."""
    from record import record

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "system"))
    from slurm_cluster import Cluster, why_not

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    keep = {"keep": options.record, "packages": ("submitit",)}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        folder.chmod(0o755)
        clusters = folder / "clusters.toml"
        clusters.write_text('[many]\npartition = "main"\ngpus_per_node = 0\ncpus_per_gpu = 1\npython = "true"\n'
                            'time = "00:10:00"\n')  # fmt: skip
        out = folder / "sweep"
        members = 2 * SEEDS
        seconds, memory = planning(out, folder, clusters)
        words = f"{members} members, new process with all imports"
        record("sweep_scale", "planning", seconds, "s", target="<= 2", conditions=words, **keep)
        record("sweep_scale", "memory of planning", memory, "MB", target="<= 200", conditions=words, **keep)
        reason = why_not()
        if reason:
            print(f"not submitted: {reason}")
        else:
            with Cluster(folder / "slurm", nodes=8, cpus=16, max_array=MAX_ARRAY) as cluster:
                os.environ["SLURM_CONF"] = str(cluster.conf)
                took, calls, ended_s, ended = submitting(out, clusters)
            assert ended == {"COMPLETED": members}, ended
            words = f"{members} members that do nothing, real SLURM, 8 x 16 CPUs on 2 cores, MaxArraySize {MAX_ARRAY}"
            record("sweep_scale", "submission", took, "s", conditions=words, **keep)
            record("sweep_scale", "arrays and final job", calls, "sbatch calls", target="5", conditions=words, **keep)
            record("sweep_scale", "until all are accounted for", ended_s, "s", conditions=words, **keep)
        write_runs(out)
        record("sweep_scale", "status from files", showing(out), "s", target="<= 2",
               conditions=f"{members} members, four files each, new process", **keep)  # fmt: skip
    print(f"largest memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB")


if __name__ == "__main__":
    main()
