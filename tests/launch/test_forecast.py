"""The plan of a recipe: memory against real steps, shares of ZeRO, the model of scaling, and what it prints."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch_helpers import run_main

from medlaunch.tasks import DOORS, find_recipe
from medtrain.estimate import Place, Sizes, largest_batch, memory_of_rank, sizes_of
from medtrain.scaling import BUCKET, Links, all_reduce_seconds, step_seconds

BENCH = Path(__file__).parents[1] / "bench" / "memory_plan.py"
HERE = Place(gpu=False, precision="fp32", device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("brats_segresnet", "data.crop=64,64,64 train.precision=fp32"),
        ("brats_unetr", "data.crop=64,64,64"),
        ("multicancer_densenet201", "train.batch=4"),
    ],
)
def test_the_memory_told_is_that_of_real_steps(name: str, setting: str) -> None:
    done = subprocess.run([sys.executable, str(BENCH), "--one", name, *setting.split()], capture_output=True, text=True,
                          check=True)  # fmt: skip
    told, real = map(float, done.stdout.split()[-2:])
    assert 0.8 < told / real < 1.2


def sizes(name: str, *settings: str, gpu: bool = False, precision: str = "fp32") -> Sizes:
    recipe = find_recipe(name).override(list(settings))
    place = Place(gpu, precision, torch.device("cpu"))
    return sizes_of(lambda batch: DOORS[recipe.task].example(recipe, batch, HERE.device), place)


def test_activations_follow_precision_recomputation_and_size() -> None:
    whole = sizes("brats_segresnet_demo", "data.crop=32,32,32")
    assert sizes("brats_segresnet_demo", "data.crop=32,32,32", precision="bf16").sample < 0.75 * whole.sample
    assert sizes("brats_segresnet_demo", "data.crop=32,32,32", "train.recompute=true").sample < 0.8 * whole.sample
    # normalisation stays in float32 under a GPU's autocast
    gpu, cpu = (sizes("brats_segresnet_demo", precision="bf16", gpu=g) for g in (True, False))
    assert gpu.sample > 1.2 * cpu.sample
    double = sizes("brats_segresnet_demo", "data.crop=64,32,32")
    assert double.sample == pytest.approx(2 * whole.sample, rel=0.01)
    assert double.flops == pytest.approx(2 * whole.flops, rel=0.01)


def test_a_plan_knows_of_timms_recomputation() -> None:
    settings = ("multicancer_resnetv2", "model.weights=none", "data.size=96")
    assert sizes(*settings, "train.recompute=true").sample < 0.8 * sizes(*settings).sample


def test_floating_point_operations_of_a_known_network() -> None:
    recipe = find_recipe("multicancer_vgg19").override(["model.weights=none"])
    vgg = sizes_of(lambda batch: DOORS["multicancer"].example(recipe, batch, HERE.device), HERE)
    # 19.6 G multiplications forward, twice as many backward but for the first layer's inputs
    assert vgg.flops == pytest.approx(6 * 19.6e9, rel=0.02)


@pytest.mark.parametrize("name", ["brats_swinunetr_demo", "brats_dynunet_demo", "multicancer_mobilenetv3_demo"])
def test_every_network_can_be_planned(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--set", "model.weights=none"] if name.startswith("multicancer") else []
    assert run_main("train", name, "--plan", *settings) == 0
    assert re.search(r"largest micro-batch in .*: \d+, which is train.batch=\d+", capsys.readouterr().out)


def test_shares_of_zero_and_the_largest_batch() -> None:
    recipe = find_recipe("brats_segresnet").override(["train.strategy=deepspeed"])
    given = Sizes(weights=1000, frozen=0, base=0.0, sample=10.0, flops=0.0)
    parts = {}
    for stage in range(4):
        staged = recipe.override([f"train.zero={stage}"])
        parts[stage] = memory_of_rank(given, staged, 10, 1)
    # weights, gradients, Adam's two states; a part's own copy of the weights lies among the states
    assert parts[0]["together"] == 1000 + 1000 + 2000 + 10
    assert parts[1]["together"] == 1000 + 1000 + 300 + 10
    assert parts[2]["together"] == 1000 + 100 + 300 + 10
    assert parts[3]["together"] == 100 + 100 + 300 + 10
    offloaded = memory_of_rank(given, recipe.override(["train.zero=2", "train.offload=true"]), 10, 1)
    assert offloaded["optimiser"] == 0
    staged = recipe.override(["train.zero=2"])
    assert largest_batch(given, staged, 10, 1000 + 100 + 300 + 39) == 3
    assert largest_batch(given, staged, 10, 1000 + 100 + 300 + 9) == 0


def test_a_ring_and_what_the_backward_pass_hides() -> None:
    links = Links(inside=100e9, between=10e9, hop=1e-6)
    assert all_reduce_seconds(1e9, 1, 8, links) == 0
    assert all_reduce_seconds(1e9, 8, 8, links) == pytest.approx(2 * 7 / 8 * 0.01 + 14e-6)
    assert all_reduce_seconds(1e9, 16, 8, links) == pytest.approx(2 * 15 / 16 * 0.1 + 30e-6)
    size = 8 * BUCKET
    whole = all_reduce_seconds(size, 16, 8, links) + 7 * 30e-6
    # hidden but for the last of eight buckets, then bound by the network
    assert step_seconds(1.0, size, 16, 8, links) == pytest.approx(1.0 + whole / 8)
    assert step_seconds(0.01, size, 16, 8, links) == pytest.approx(0.01 + whole - 0.01 * 2 / 3)
    assert step_seconds(0.01, size, 16, 8, links, stage=3) > step_seconds(0.01, size, 16, 8, links, stage=2)
    assert step_seconds(1.0, size, 1, 8, links) == 1.0
    in_one_piece = 1.0 + all_reduce_seconds(size, 16, 8, links)
    assert step_seconds(1.0, size, 16, 8, links, overlaps=False) == in_one_piece


def test_what_a_plan_prints(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--plan", "--on", "gpu", "--memory-gb", "80", "--nodes", "64", "--step-s", "0.2")
    assert run_main("train", "brats_segresnet", *words) == 0
    told = capsys.readouterr().out
    assert "4,702,227 trained parameters" in told
    assert "ring all-reduce after the backward pass, in one piece" in told
    assert "bf16 on a GPU" in told
    rows = [line.split("|")[1:-1] for line in told.splitlines() if re.match(r"\| +\d+ \|", line)]
    assert [int(row[0]) for row in rows] == [1, 8, 64, 512]
    assert [int(row[2]) for row in rows] == [2, 16, 128, 1024]
    efficiency = [float(row[5].strip(" %")) for row in rows]
    assert efficiency[0] == 100
    assert efficiency == sorted(efficiency, reverse=True)


def test_ranks_share_the_batch(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--plan", "--on", "gpu", "--memory-gb", "16", "--ranks", "8")
    assert run_main("train", "brats_unetr_zero2", *words) == 0
    told = capsys.readouterr().out
    assert "memory of one of 8 ranks, micro-batch 1" in told
    row = {line.split("|")[1].strip(): float(line.split("|")[2]) for line in told.splitlines() if line.count("|") == 3
           and "GB" not in line and "--" not in line}  # fmt: skip
    assert row["gradients"] == pytest.approx(row["weights"] / 8, abs=0.01)
    assert row["together"] == pytest.approx(sum(row.values()) - row["together"], abs=0.03)


def test_a_step_is_measured_where_none_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main("train", "brats_segresnet_demo", "--plan", "--nodes", "1", "--set", "train.precision=fp32") == 0
    assert "(measured here)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--plan", "--on", "gpu"), "--memory-gb"),
        (("--plan", "--on", "gpu", "--memory-gb", "80", "--nodes", "2"), "--step-s"),
        (("--plan", "--memory-gb", "-1"), "--memory-gb -1.0: give a number above 0"),
        (("--plan", "--nodes", "0"), "--nodes 0"),
        (
            ("--plan", "--ranks", "2", "--set", "train.strategy=single", "--set", "train.batch=2"),
            "single can not use 2",
        ),
        (("--plan", "--ranks", "3"), "--ranks 3: train.batch=2 can not be shared by 3"),
        (("--plan", "--memory-gb", "nan"), "--memory-gb nan"),
        ((), "--cache, --out"),
    ],
)
def test_plans_that_can_not_be_made(words: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU to read and to measure")
    try:
        code = run_main("train", "brats_segresnet_demo", *words)
    except SystemExit as end:  # argparse's own
        code = int(end.code or 0)
    assert code == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("settings", [("train.strategy=ddp",), ("train.compile=off",), ("train.recompute=true",)])
def test_ddp_averages_gradients_meanwhile(settings: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--plan", "--on", "gpu", "--memory-gb", "80", "--nodes", "2", "--step-s", "0.2")
    sets = [word for setting in settings for word in ("--set", setting)]
    assert run_main("train", "brats_segresnet", *words, *sets) == 0
    assert "ring all-reduce that overlaps with the backward pass" in capsys.readouterr().out


@pytest.mark.parametrize("words", [("--nodes", "2"), ("--on", "cpu"), ("--ranks", "4"), ("--step-s", "0.1")])
def test_options_of_a_plan_are_refused_for_a_training(
    words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = ("--cache", tmp_path / "c.h5", "--out", tmp_path / "run")
    assert run_main("train", "brats_segresnet_demo", *paths, *words) == 2
    assert capsys.readouterr().err == f"error: {words[0]} belongs to a plan: add --plan, or leave it out.\n"
    assert not (tmp_path / "run").exists()
