"""A checkpoint's weights load with strict=True into MONAI's plain class."""

import pytest
import torch
from monai.networks.nets import UNETR, SegResNet

from medseg.labels import KNOWN
from medseg.losses import region_loss, region_targets
from medseg.models import build_model
from medseg.recipes import RECIPES
from medtrain.errors import UserError


def test_segresnet_is_monais() -> None:
    model = build_model(RECIPES["brats_segresnet"]())
    plain = SegResNet(
        init_filters=16, in_channels=4, out_channels=3, blocks_down=(1, 2, 2, 4), blocks_up=(1, 1, 1), dropout_prob=0.2
    )
    plain.load_state_dict(model.state_dict(), strict=True)
    assert sum(p.numel() for p in model.parameters()) == 4_702_227


def test_unetr_is_monais() -> None:
    model = build_model(RECIPES["brats_unetr"]().override(["data.crop=32,32,32"]))
    plain = UNETR(4, 3, img_size=32, feature_size=16, hidden_size=768, mlp_dim=3072, num_heads=12)
    plain.load_state_dict(model.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


def logits_and_gradients(model: torch.nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
    model.to(image.device).zero_grad()
    logits = model(image)
    logits.square().mean().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters())]


def small(kernels: str) -> torch.nn.Module:
    return build_model(
        RECIPES["brats_segresnet_demo"]().override(
            ["data.crop=8,8,12", "model.dropout=0", "model.blocks_down=1,1,1", "model.blocks_up=1,1",
             f"model.kernels={kernels}"]
        )
    )  # fmt: skip


@pytest.mark.parametrize("kernels", ["reference", "auto", "fused"])
def test_kernels_change_neither_logits_nor_gradients_nor_keys(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    sizes = {"blocks_down": (1, 1, 1), "blocks_up": (1, 1)}
    plain = SegResNet(init_filters=8, in_channels=4, out_channels=3, **sizes)
    model = small(kernels)
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict(), strict=True)
    image = torch.randn(2, 4, 8, 8, 12, device=device)
    same = kernels != "fused" and device == "cpu"  # on a GPU torch's own gradients change from run to run
    pairs = zip(logits_and_gradients(model, image), logits_and_gradients(plain, image), strict=True)
    for found, expected in pairs:
        if same:
            assert torch.equal(found, expected)
        else:
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kernels", ["auto", "fused"])
def test_the_network_is_one_graph_for_torch_compile(kernels: str) -> None:
    model = small(kernels).to("cuda" if torch.cuda.is_available() else "cpu")
    image = torch.randn(1, 4, 4, 4, 4, device=next(model.parameters()).device)
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend="eager")(image)
        torch.testing.assert_close(found, model(image), rtol=1e-3, atol=1e-5)


def test_kernels_are_no_part_of_a_runs_signature() -> None:
    recipe = RECIPES["brats_segresnet"]()
    assert recipe.override(["model.kernels=reference"]).signature == recipe.signature


def test_fused_kernels_on_an_unable_device_are_a_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medkernels.dispatch.HAS_TRITON", False)
    with pytest.raises(UserError, match=r"model\.kernels=fused can not run here \(triton is not installed\)"):
        build_model(RECIPES["brats_segresnet"]().override(["model.kernels=fused"]))


@pytest.mark.parametrize("name", ["brats_segresnet_demo", "brats_unetr_demo"])
def test_four_channels_in_three_regions_out(name: str) -> None:
    model = build_model(RECIPES[name]().override(["data.crop=32,32,32"])).eval()
    with torch.inference_mode():
        assert model(torch.zeros(1, 4, 32, 32, 32)).shape == (1, 3, 32, 32, 32)


@pytest.mark.parametrize(("name", "crop"), [("brats_segresnet", "60,64,64"), ("brats_unetr", "72,64,64")])
def test_a_crop_that_does_not_fit_the_network_is_refused(name: str, crop: str) -> None:
    with pytest.raises(UserError, match="multiples of"):
        build_model(RECIPES[name]().override([f"data.crop={crop}"]))


def test_dice_loss_equals_its_formula_in_float64() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, 6, 7, dtype=torch.float64)
    label = torch.randint(0, 4, (2, 5, 6, 7), dtype=torch.uint8)
    t = region_targets(label, KNOWN["msd"]).double()
    p = torch.sigmoid(logits)
    axes = (2, 3, 4)
    expected = 1 - 2 * (p * t).sum(axes) / ((p * p).sum(axes) + (t * t).sum(axes) + 1e-5)
    loss = region_loss(logits, label, KNOWN["msd"], "dice")
    assert loss.item() == pytest.approx(expected.mean().item(), abs=1e-6)
    bce = -(t * p.log() + (1 - t) * (1 - p).log()).mean()
    both = region_loss(logits, label, KNOWN["msd"], "dice_bce")
    assert both.item() == pytest.approx((expected.mean() + bce).item(), abs=1e-6)


def test_loss_is_finite_without_tumour() -> None:
    logits = torch.zeros(1, 3, 4, 4, 4, requires_grad=True)
    loss = region_loss(logits, torch.zeros(1, 4, 4, 4, dtype=torch.uint8), KNOWN["msd"], "dice_bce")
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()
