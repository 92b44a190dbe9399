"""Settings that can not be together, seen without torch and DeepSpeed: login nodes ask before anything is submitted."""

from pathlib import Path
from typing import Any

from medtrain.errors import UserError
from medtrain.files import parse_json
from medtrain.recipe import Recipe, Train

# What DeepSpeed calls the types that operations are computed in, where these are not the weights' own.
AUTOCAST = {"bf16": "bfloat16", "fp16": "float16"}


def check_settings(recipe: Recipe, world: int) -> None:
    """Raise UserError for what can not be on so many processes, whatever the device and the network."""
    train, optim = recipe.train, recipe.optim
    if optim.schedule == "plateau" and optim.min_lr >= optim.lr:
        raise UserError(
            f"{recipe.name}: optim.schedule=plateau lowers no rate of {optim.lr:g} that optim.min_lr={optim.min_lr:g} "
            "holds: --set optim.min_lr=0."
        )
    share = train.accumulate * world
    if train.batch % share:
        raise UserError(
            f"{recipe.name}: train.batch={train.batch} can not be shared by {world} processes x {train.accumulate} "
            f"accumulations: --set train.batch={max(1, round(train.batch / share)) * share}."
        )
    if train.compile == "graphs" and train.accumulate > 1:
        # a CUDA graph writes over the memory of the step before, in which the gradients are summed up
        raise UserError(
            f"train.compile=graphs can not accumulate {train.accumulate} micro-batches: --set train.compile=on."
        )
    if train.strategy == "single" and world > 1:
        raise UserError(f"train.strategy=single can not use {world} processes: take auto or ddp.")
    deepspeed_settings(train)
    if train.strategy != "deepspeed":
        for name in ("zero", "offload", "deepspeed"):
            if getattr(train, name) != getattr(Train(), name):
                raise UserError(f"train.{name} is DeepSpeed's: --set train.strategy=deepspeed, or leave it as it is.")
    if train.strategy == "deepspeed":
        check_deepspeed(recipe, train.precision)
        configuration(recipe, world, train.precision)
    if train.compile == "replay":
        refuse_replay(replay_refusal(recipe, world))


def replay_refusal(recipe: Recipe, world: int) -> str:
    """Why a recipe's steps can not be replayed as CUDA graphs on so many processes, or an empty text."""
    train = recipe.train
    if train.strategy == "deepspeed" or (train.strategy == "ddp" and world > 1):
        return f"train.strategy={train.strategy} holds on to nodes of gradients, which a capture makes anew"
    if train.recompute:
        return "train.recompute is on"
    if train.deterministic:
        return "train.deterministic is on"
    if recipe.unfreezes_later:
        return "weights are released later"
    return ""


def refuse_replay(reason: str) -> None:
    """Raise UserError where there is a reason."""
    if reason:
        raise UserError(f"train.compile=replay can not be, as {reason}: --set train.compile=auto.")


def check_deepspeed(recipe: Recipe, precision: str) -> None:
    """Raise UserError for what the strategy `deepspeed` can not do."""
    train = recipe.train
    if precision == "fp16":  # 0.19 has no loss scale at stage 0, and at 1 and 2 never lowers it after an overflow
        raise UserError(
            "train.strategy=deepspeed does not train in fp16: --set train.strategy=ddp, or train.precision=fp32."
        )
    if train.zero == 3 and recipe.optim.ema:
        raise UserError("train.zero=3 shares the weights out, and optim.ema needs them whole: --set optim.ema=0.")
    if train.compile in ("on", "graphs", "replay"):
        raise UserError("train.strategy=deepspeed is not compiled: --set train.compile=off.")
    if recipe.optim.library == "apex":
        raise UserError("train.strategy=deepspeed brings torch's optimisers: --set optim.library=torch.")
    if train.offload and train.zero == 0:
        raise UserError("train.offload=true needs train.zero=1, 2 or 3: stage 0 shares nothing out.")
    if train.zero and recipe.unfreezes_later:
        raise UserError(
            f"train.zero={train.zero} can not release weights later: --set finetune.freeze_epochs=0 or train.zero=0."
        )


def configuration(recipe: Recipe, world: int, precision: str) -> dict[str, Any]:
    """DeepSpeed's settings as the recipe wants them, with those of the JSON file `train.deepspeed` added; raises
    UserError where the file sets what the recipe sets. A precision that only the device tells sets nothing.
    """
    train = recipe.train
    zero: dict[str, Any] = {"stage": train.zero}
    if train.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    made: dict[str, Any] = {
        "train_batch_size": train.batch,
        "train_micro_batch_size_per_gpu": train.batch // (train.accumulate * world),
        "gradient_accumulation_steps": train.accumulate,
        "gradient_clipping": recipe.optim.clip_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's own, the same as without DeepSpeed
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    if precision in AUTOCAST:
        # weights stay fp32 and gradients are summed in fp32, as with the other strategies
        made["torch_autocast"] = {"enabled": True, "dtype": AUTOCAST[precision], "lower_precision_safe_modules": []}
    _merge(made, deepspeed_settings(train), train.deepspeed)
    return made


def _merge(made: dict[str, Any], extra: dict[str, Any], origin: str, prefix: str = "") -> None:
    for key, value in extra.items():
        if key not in made:
            made[key] = value
        elif isinstance(made[key], dict) and isinstance(value, dict):
            _merge(made[key], value, origin, f"{prefix}{key}.")
        elif made[key] != value:
            raise UserError(
                f"{origin} sets {prefix}{key} to {value!r}, the recipe to {made[key]!r}: leave it out of the file."
            )


def deepspeed_settings(train: Train) -> dict[str, Any]:
    """What the JSON file `train.deepspeed` holds, nothing where none is named; raises UserError where it is absent or
    no JSON object.
    """
    if not train.deepspeed:
        return {}
    path = Path(train.deepspeed)
    try:
        value = parse_json(path)
    except ValueError as error:
        raise UserError(f"{path} can not be read as JSON ({error}): correct train.deepspeed.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no settings of DeepSpeed: it needs a JSON object.")
    return value
