"""DeepSpeed beside the other strategies: equal losses, exact states, and what can not work is refused."""

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launch_helpers import run_main, run_script
from monai.networks.nets import SegResNet

from medseg.recipes import SegRecipe
from medtrain import checkpoint, zero
from medtrain.distributed import Ranks
from medtrain.errors import UserError
from medtrain.settings import check_deepspeed, configuration

Tiny = Callable[..., SegRecipe]
NETWORKS = {"fp32": ("segresnet", "unetr", "mobilenetv3"), "bf16": ("segresnet", "unetr")}
KINDS = ("ddp:0", "replayed:0", *(f"deepspeed:{stage}" for stage in range(4)))
SETTINGS = [*(f"{kind}:fp32" for kind in KINDS), *(f"{kind}:bf16" for kind in ("ddp:0", "deepspeed:2", "deepspeed:3"))]


@pytest.fixture(scope="module")
def told() -> dict[str, dict[str, dict[str, list[float]]]]:
    """Losses by settings and network, from two processes that live through all of them: starting takes longest."""
    script = Path(__file__).with_name("strategies_on_ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run([*command, *SETTINGS], capture_output=True, text=True, timeout=1800, check=False,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {settings: {line["network"]: line for line in lines if line["settings"] == settings}
            for settings in SETTINGS}  # fmt: skip


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("settings", SETTINGS)
def test_strategies_agree(settings: str, told: dict[str, dict[str, dict[str, list[float]]]]) -> None:
    """Four steps: like one process within 5e-4 (fp32) or 5e-3 (bf16); bit by bit again from
    the state; and one process goes on from the state of two ranks.
    """
    found = told[settings]
    assert tuple(found) == NETWORKS[settings.rpartition(":")[2]]
    tolerance = 5e-4 if settings.endswith("fp32") else 5e-3
    for network, losses in found.items():
        assert losses["ranks"] == pytest.approx(losses["single"], abs=tolerance), network
        assert losses["again"] == losses["ranks"], network
        assert losses["moved"] == pytest.approx(losses["ranks"], abs=tolerance), network
        assert len(set(losses["single"])) == 4, network  # it moves


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("stage", "offload"), [(2, "true"), (3, "false")])
def test_a_whole_run(stage: int, offload: str, cache: Path, tmp_path: Path) -> None:
    """With accumulation. Gone on on one process from the middle, and the best checkpoint is plain MONAI's."""
    sets = ("data.crop=32,32,32", "data.spacing_mm=0", "train.batch=4", "train.accumulate=2",
            f"train.offload={offload}", "train.epochs=2", "train.precision=fp32",
            "train.workers=0", "optim.ema=0", "train.strategy=deepspeed", f"train.zero={stage}", "model.dropout=0",
            "train.validate_every=1", "train.log_every=1")  # fmt: skip
    words = [part for item in sets for part in ("--set", item)]
    arguments = ("train", "brats_segresnet_demo", "--cache", cache, "--out")
    done = run_script(*arguments, tmp_path / "run", *words, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Dice on the original spacing" in done.stdout
    best = checkpoint.load(tmp_path / "run" / checkpoint.BEST)
    plain = SegResNet(init_filters=8, in_channels=4, out_channels=3, blocks_down=(1, 2, 2, 4), blocks_up=(1, 1, 1))
    plain.load_state_dict(best["model"], strict=True)
    out = tmp_path / "moved"
    out.mkdir()
    for path in (tmp_path / "run").iterdir():  # as it was after the first epoch
        if path.name in ("recipe.json", "cache.json", "split.json"):
            (out / path.name).write_bytes(path.read_bytes())
    (out / checkpoint.LAST).write_bytes((tmp_path / "run" / checkpoint.PREVIOUS).read_bytes())
    assert checkpoint.load(out / checkpoint.LAST)["step"] == 2
    done = run_script(*arguments, out, *words)  # one process
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on from step 2 of 4" in done.stdout
    one, two = (checkpoint.load(tmp_path / name / checkpoint.LAST)["model"] for name in ("moved", "run"))
    for name in two:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=2e-3)


def test_the_settings_come_from_the_recipe(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny("train.strategy=deepspeed", "train.zero=3", "train.offload=true", "train.batch=8",
                  "train.accumulate=2", "optim.clip_norm=0.5")  # fmt: skip
    made = configuration(recipe, 2, "bf16")
    assert made["zero_optimization"] == {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    assert (made["train_batch_size"], made["train_micro_batch_size_per_gpu"]) == (8, 2)
    assert (made["gradient_accumulation_steps"], made["gradient_clipping"]) == (2, 0.5)
    assert made["torch_autocast"]["dtype"] == "bfloat16"
    extra = tmp_path / "extra.json"
    extra.write_text('{"zero_optimization": {"overlap_comm": true}, "wall_clock_breakdown": true}')
    merged = configuration(recipe.override([f"train.deepspeed={extra}"]), 2, "fp32")
    assert merged["zero_optimization"]["overlap_comm"] is True
    assert merged["zero_optimization"]["stage"] == 3
    extra.write_text('{"zero_optimization": {"stage": 1}}')
    with pytest.raises(UserError, match=r"sets zero_optimization\.stage to 1, the recipe to 3"):
        configuration(recipe.override([f"train.deepspeed={extra}"]), 2, "fp32")


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (("train.zero=3", "optim.ema=0.9"), "--set optim.ema=0"),
        (("train.zero=0", "train.offload=true", "optim.ema=0"), "needs train.zero=1"),
        (("train.zero=4",), "at most 3"),
        (("train.deepspeed=/none.json", "optim.ema=0"), "/none.json can not be read"),
        (("train.precision=fp16",), "does not train in fp16"),
    ],
)
def test_what_can_not_work_is_refused(
    sets: tuple[str, ...], words: str, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ("data.crop=32,32,32", "data.spacing_mm=0", "train.strategy=deepspeed", *sets)
    arguments = [part for item in base for part in ("--set", item)]
    assert run_main("train", "brats_segresnet_demo", "--cache", cache, "--out", tmp_path / "run", *arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_fp16_is_refused_as_deepspeed_would_not_scale_its_losses(tiny: Tiny) -> None:
    recipe = tiny("train.strategy=deepspeed")
    check_deepspeed(recipe, "bf16")
    with pytest.raises(UserError, match=r"does not train in fp16: --set train\.strategy=ddp"):
        check_deepspeed(recipe, "fp16")


def test_deepspeed_is_told_the_gpu_that_its_process_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM may show each process one GPU: 0, whatever its local rank."""
    ops = types.SimpleNamespace(__compatible_ops__={})
    stand_in = types.SimpleNamespace(ops=ops, init_distributed=lambda **named: None)
    monkeypatch.setitem(sys.modules, "deepspeed", stand_in)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    for device, told in ((torch.device("cuda", 0), "0"), (torch.device("cpu"), "3")):
        monkeypatch.setenv("LOCAL_RANK", "3")
        assert zero._library(Ranks(3, 4, 3, device)) is stand_in
        assert os.environ["LOCAL_RANK"] == told


def test_without_deepspeed(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    sets = ("data.crop=32,32,32", "data.spacing_mm=0", "train.strategy=deepspeed", "optim.ema=0")
    arguments = [part for item in sets for part in ("--set", item)]
    assert run_main("train", "brats_segresnet_demo", "--cache", cache, "--out", tmp_path / "run", *arguments) == 2
    assert "needs DeepSpeed" in capsys.readouterr().err
