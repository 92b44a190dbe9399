"""Weights from files: what fits is taken tensor by tensor, what does not is named; groups, layer decay, fetching."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launch_helpers import run_main
from safetensors.torch import save_file

from medcls import backbones
from medcls.door import check_early
from medcls.recipes import RECIPES, ClsModel, ClsRecipe, FineTune
from medtrain.errors import UserError


def recipe(name: str = "mobilenetv3_small_100", **options: object) -> ClsRecipe:
    plain = RECIPES["multicancer_mobilenetv3_demo"]()
    return replace(plain, model=ClsModel(name=name, **options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as timm's own: MobileNetV3-Small with 1000 classes."""
    torch.manual_seed(7)
    model = backbones.timm().create_model("mobilenetv3_small_100", num_classes=1000)
    path = tmp_path_factory.mktemp("weights") / "mobilenetv3_small_100.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.mark.parametrize("name", backbones.NAMES)
def test_the_four_networks_answer_with_one_logit_a_class(name: str) -> None:
    model = backbones.build_model(recipe(name, weights="none", mlp_ratio=0.05), 5).eval()
    with torch.inference_mode():
        assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 5)
    heads = [key for key in model.state_dict() if key.startswith(backbones.head_names(model))]
    assert sorted(key.rsplit(".", 1)[1] for key in heads) == ["bias", "weight"]
    mean, std = backbones.normalisation(name)
    assert len(mean) == len(std) == 3


def test_every_tensor_but_the_heads_is_taken(thousand: Path) -> None:
    torch.manual_seed(1)
    model = backbones.build_model(recipe(), 3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    backbones.load_backbone(model, "mobilenetv3_small_100", thousand)
    given, heads = backbones.read_weights(thousand), backbones.head_names(model)
    for key, value in model.state_dict().items():
        wanted = before if key.startswith(heads) else given
        assert torch.equal(value, wanted[key]), key


def test_our_own_checkpoints_and_plain_state_dicts_serve_too(thousand: Path, tmp_path: Path) -> None:
    given = backbones.read_weights(thousand)
    torch.save(given, tmp_path / "plain.pt")
    torch.save({"model": given, "epoch": 3}, tmp_path / "run.pt")
    for name in ("plain.pt", "run.pt"):
        model = backbones.build_model(recipe(), 2)
        backbones.load_backbone(model, "mobilenetv3_small_100", tmp_path / name)
        assert torch.equal(model.conv_stem.weight, given["conv_stem.weight"])


def test_what_does_not_fit_is_named(thousand: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    given = backbones.read_weights(thousand)
    (tmp_path / "text.pt").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"model": {"a": Evil()}}, tmp_path / "evil.pt")
    torch.save({k: v for k, v in given.items() if k != "conv_stem.weight"}, tmp_path / "short.pt")
    torch.save({**given, "more": torch.ones(1)}, tmp_path / "more.pt")
    torch.save({**given, "conv_stem.weight": torch.ones(16, 1, 3, 3)}, tmp_path / "shape.pt")
    torch.save({**given, "conv_stem.weight": given["conv_stem.weight"] * torch.nan}, tmp_path / "nan.pt")
    torch.save(given, tmp_path / "bit.pt")
    content = bytearray((tmp_path / "bit.pt").read_bytes())
    content[len(content) // 2] ^= 1  # in the middle of a tensor
    (tmp_path / "bit.pt").write_bytes(content)
    for name, words in [
        ("nan.pt", "no numbers"), ("bit.pt", "is damaged"),
        ("text.pt", "not a file of weights"), ("text.safetensors", "not a file of weights"),
        ("list.pt", "holds no tensors"), ("evil.pt", "not a file of weights"),
        ("short.pt", "conv_stem.weight is missing"), ("more.pt", "more is unknown"),
        ("shape.pt", r"conv_stem.weight is \(16, 1, 3, 3\) and not \(16, 3, 3, 3\)"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=words) as caught:
            backbones.load_backbone(backbones.build_model(recipe(), 3), "mobilenetv3_small_100", tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert len(str(caught.value)) < 300
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UserError, match="does not fit densenet201") as caught:
        backbones.load_backbone(backbones.build_model(recipe("densenet201"), 3), "densenet201", thousand)
    assert "more; give weights of this network" in str(caught.value)


def test_names_of_images_are_texts(tmp_path: Path) -> None:
    """A list in a list in a list, each twice: as a text it would double with each level."""
    told = {"split": {"train": ["a/1.png"], "val": ["b/2.png"]}, "seen_before": ["c/3.png"]}
    torch.save(told, tmp_path / "run.pt")
    assert backbones.seen_by(tmp_path / "run.pt") == {"a/1.png", "b/2.png", "c/3.png"}
    nested: list = []
    for _ in range(20):
        nested = [nested, nested]
    for name, content in {"first": {"seen_before": [nested]}, "split": {"split": {"val": ["a/1.png", 3]}}}.items():
        path = tmp_path / f"{name}.pt"
        torch.save(content, path)
        with pytest.raises(UserError, match=r"pt holds images that are no names: give a \.safetensors or \.pt file"):
            backbones.seen_by(path)


def test_where_weights_are_looked_for(thousand: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDTRAIN_WEIGHTS", str(thousand.parent))
    assert backbones.weights_file(recipe().model) == thousand
    assert backbones.weights_file(recipe(weights="none").model) is None
    assert backbones.weights_file(recipe(weights=str(thousand)).model) == thousand
    monkeypatch.setenv("MEDTRAIN_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError, match="run `python launch/prepare"):
        backbones.weights_file(recipe().model)
    assert backbones.weights_file(recipe(weights_folder=str(thousand.parent)).model) == thousand
    with pytest.raises(UserError, match="is not there"):
        backbones.weights_file(recipe(weights=str(tmp_path / "none.pt")).model)


def test_fetching_writes_once_and_tells_when_there_is_no_internet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = backbones.timm()
    real, asked = package.create_model, []

    def offline(*arguments: object, **options: object) -> None:
        raise OSError("the hub is not reachable")

    monkeypatch.setattr(package, "create_model", offline)
    assert run_main("prepare", "weights", "--out", tmp_path) == 2
    error = capsys.readouterr().err
    assert "can not be fetched" in error
    assert "where there is internet" in error
    assert list(tmp_path.iterdir()) == []

    def fetched(name: str, **options: object) -> torch.nn.Module:
        asked.append(name)
        assert options == {"pretrained": True}
        return real("mobilenetv3_small_100", num_classes=1000)

    monkeypatch.setattr(package, "create_model", fetched)
    for _ in range(2):
        assert run_main("prepare", "weights", "--out", tmp_path) == 0
    assert asked == list(backbones.NAMES)
    assert f"export MEDTRAIN_WEIGHTS={tmp_path}" in capsys.readouterr().out
    monkeypatch.undo()
    model = backbones.build_model(recipe(), 3)
    backbones.load_backbone(model, "mobilenetv3_small_100", tmp_path / "mobilenetv3_small_100.safetensors")


def test_groups_hold_every_parameter_once_and_scale_by_depth() -> None:
    model = backbones.build_model(recipe(), 3)
    tuned = replace(recipe(), finetune=FineTune(freeze_epochs=2, layer_decay=0.8))
    for chosen in (recipe(), tuned):
        groups = backbones.parameter_groups(model, chosen)
        held = [id(p) for group in groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in model.parameters())
    head = [group for group in groups if group["frozen_epochs"] == 0]
    assert {id(p) for group in head for p in group["params"]} == {id(p) for p in model.classifier.parameters()}
    assert all(group["lr_scale"] == 1 for group in head)
    stem = next(group for group in groups if any(p is model.conv_stem.weight for p in group["params"]))
    scales = [group["lr_scale"] for group in groups]
    assert stem["lr_scale"] == min(scales) < 0.8**5
    biases = next(group for group in groups if any(p is model.classifier.bias for p in group["params"]))
    assert biases["weight_decay"] == 0


def test_a_width_that_no_network_reads_is_refused() -> None:
    with pytest.raises(UserError, match=r"multicancer_mobilenetv3_demo: model\.mlp_ratio is of VGG19 alone"):
        check_early([recipe("densenet201", weights="none", mlp_ratio=0.5)])
    check_early([recipe(name, weights="none", mlp_ratio=0.5) for name in ("densenet201", "vgg19")])
