"""The networks: timm's own classes, with weights from a file. The only file that imports timm."""

import hashlib
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medcls.recipes import ClsModel, ClsRecipe
from medtrain import checkpoint
from medtrain.errors import UserError
from medtrain.files import replacing
from medtrain.strategy import Group
from medtrain.trained import check_tensors

REMEDY = "give a .safetensors or .pt file of this network"
NAMES = ("densenet201", "mobilenetv3_small_100", "resnetv2_50", "vgg19")


def timm() -> Any:
    """The timm package. torchvision's wheel may be built for CUDA and not load its operators beside a CPU torch; timm
    needs only their names, so they are declared.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        import sys

        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", schema)
    import timm as package

    return package


def normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation, of pixels in 0..1, that the network's ImageNet weights were trained with."""
    config = timm().get_pretrained_cfg(name)
    return tuple(config.mean), tuple(config.std)


def build_model(recipe: ClsRecipe, classes: int) -> nn.Module:
    """timm's network with `classes` outputs: image (B,3,H,W) -> logits (B,classes), fresh weights."""
    model = recipe.model
    options = {"mlp_ratio": model.mlp_ratio} if model.name == "vgg19" else {}
    net = timm().create_model(model.name, pretrained=False, num_classes=classes, drop_rate=model.dropout, **options)
    if recipe.train.recompute:
        try:
            net.set_grad_checkpointing()
        except (AssertionError, AttributeError):
            raise UserError(f"timm's {model.name} can not recompute: --set train.recompute=false.") from None
    return net


def weights_file(model: ClsModel) -> Path | None:
    """Where the recipe's weights lie, or None for fresh ones; raises UserError where the file is absent."""
    if model.weights == "none":
        return None
    if model.weights != "imagenet":
        path = Path(model.weights).expanduser()
        if not path.is_file():
            raise UserError(f"{path} is not there: --set model.weights=imagenet, none, or a file of weights.")
        return path
    path = weights_folder(model.weights_folder) / f"{model.name}.safetensors"
    if not path.is_file():
        raise UserError(
            f"{path} is not there: run `python launch/prepare.py weights` where there is internet, or "
            "--set model.weights=none."
        )
    return path


def weights_folder(named: str = "") -> Path:
    """The folder of ImageNet weights: as named, $MEDTRAIN_WEIGHTS, or ~/.cache/medtrain/weights."""
    return Path(named or os.environ.get("MEDTRAIN_WEIGHTS", "") or "~/.cache/medtrain/weights").expanduser()


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by name from a safetensors file, a state dict, or a checkpoint of this program; raises UserError."""
    content = _content(path)
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UserError(f"{path} holds no tensors by name: {REMEDY}.")
    check_tensors(path, content)
    return content


def seen_by(path: Path) -> frozenset[str]:
    """The images, by their paths in the data folder, that a run's checkpoint was trained or chosen by, or the weights
    that it began with; none for other files. Raises UserError where they are no texts.
    """
    if path.suffix == ".safetensors":
        return frozenset()
    content = _content(path)
    told: dict[Any, Any] = content if isinstance(content, dict) else {}
    split = told.get("split")
    parts = [told.get("seen_before"), *([split.get("train"), split.get("val")] if isinstance(split, dict) else [])]
    names = [name for part in parts if isinstance(part, list) for name in part]
    if not all(isinstance(name, str) for name in names):  # lists that share lists make texts beyond any memory
        raise UserError(f"{path} holds images that are no names: {REMEDY}.")
    return frozenset(names)


def _content(path: Path) -> Any:
    """What a file of weights holds, whatever it is; raises UserError where it can not be read."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if zipfile.is_zipfile(path):  # torch compares no checksum, and its files of old have none
            checkpoint.check(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} is not a file of weights ({type(error).__name__}): {REMEDY}.") from None


def load_backbone(model: nn.Module, name: str, path: Path) -> None:
    """Take every tensor but the head's from a file, each checked by name and shape; raises UserError."""
    found, own = read_weights(path), model.state_dict()
    heads = head_names(model)
    wanted = {key: value for key, value in own.items() if not key.startswith(heads)}
    given = {key: value for key, value in found.items() if not key.startswith(heads)}
    problems = [f"{key} is missing" for key in wanted if key not in given and not key.endswith("num_batches_tracked")]
    problems += [f"{key} is unknown" for key in given if key not in wanted]
    problems += [
        f"{key} is {tuple(value.shape)} and not {tuple(wanted[key].shape)}"
        for key, value in given.items()
        if key in wanted and value.shape != wanted[key].shape
    ]
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise UserError(f"{path} does not fit {name}: tensor {problems[0]}{more}; give weights of this network.")
    model.load_state_dict({**own, **given})


def head_names(model: Any) -> tuple[str, ...]:
    """Prefixes of the classifier's tensors."""
    names = model.pretrained_cfg["classifier"]
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))


def fingerprint(path: Path) -> str:
    """BLAKE2b of a file of weights, 8 bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()


def parameter_groups(model: nn.Module, recipe: ClsRecipe) -> list[Group]:
    """Groups by depth (timm's layer decay), with the backbone frozen for the recipe's first epochs; no weight decay on
    norms and biases.
    """
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    tune, heads = recipe.finetune, head_names(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups: list[Group] = []
    decay = recipe.optim.weight_decay
    if tune.layer_decay == 1:
        layers = [{**group, "lr_scale": 1.0} for group in param_groups_weight_decay(model, decay)]
    else:
        layers = param_groups_layer_decay(model, decay, layer_decay=tune.layer_decay)
    for made in layers:
        for head in (False, True):
            kept = [p for p in made["params"] if names[id(p)].startswith(heads) == head]
            if kept:
                frozen = 0 if head else tune.freeze_epochs
                groups.append({"params": kept, "weight_decay": made["weight_decay"],
                               "lr_scale": made["lr_scale"], "frozen_epochs": frozen})  # fmt: skip
    return groups


def fetch(name: str, folder: Path) -> Path:
    """Fetch a network's ImageNet weights into `folder`; one that is there is left alone. Raises UserError offline."""
    from safetensors.torch import save_file

    path = folder / f"{name}.safetensors"
    if path.is_file():
        return path
    try:
        model = timm().create_model(name, pretrained=True)
    except Exception as error:  # whatever the network, the hub or its mirror raise
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError(f"{path} can not be fetched ({reason}): run this where there is internet.") from None
    with replacing(path) as temporary:
        save_file(model.state_dict(), temporary, {"source": str(model.pretrained_cfg.get("hf_hub_id", name))})
    return path
