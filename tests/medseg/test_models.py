"""A checkpoint's weights load with strict=True into MONAI's plain class."""

import pytest
import torch
from monai.networks.nets import UNETR, DynUNet, SegResNet, SwinUNETR

from medkernels.group_norm_relu import InstanceNormLeakyReLU
from medseg.door import check_early
from medseg.labels import KNOWN
from medseg.losses import region_loss, region_targets, supervised_loss
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
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_same(model: torch.nn.Module, plain: torch.nn.Module, image: torch.Tensor, *, bits: bool) -> None:
    """Equal keys, and with equal weights equal logits and gradients: on a CPU to the bit where no kernel ran."""
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict(), strict=True)
    pairs = zip(logits_and_gradients(model, image), logits_and_gradients(plain, image), strict=True)
    for found, expected in pairs:
        if bits and image.device.type == "cpu":  # on a GPU torch's own gradients change from run to run
            assert torch.equal(found, expected)
        else:
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


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
    torch.manual_seed(1)  # under 0 a value at a rectifier's kink falls on the other side, rightly rounded
    sizes = {"blocks_down": (1, 1, 1), "blocks_up": (1, 1)}
    plain = SegResNet(init_filters=8, in_channels=4, out_channels=3, **sizes)
    image = torch.randn(2, 4, 8, 8, 12).to(device)
    assert_same(small(kernels), plain, image, bits=kernels != "fused")


PLAIN = {
    "unetr": (
        lambda: UNETR(4, 3, img_size=(16, 16, 32), feature_size=4, hidden_size=12, mlp_dim=12, num_heads=2),
        ["data.crop=16,16,32", "model.feature=4", "model.hidden=12", "model.mlp=12", "model.heads=2"],
    ),
    "dynunet": (
        lambda: DynUNet(3, 4, 3, kernel_size=[3] * 3, strides=[1, 2, 2], upsample_kernel_size=[2] * 2,
                        filters=[8, 16, 32], deep_supervision=True, deep_supr_num=1),
        ["data.crop=16,16,32", "model.filters=8", "model.levels=3", "model.supervised=1"],
    ),
    "swinunetr": (lambda: SwinUNETR(4, 3, feature_size=12), ["data.crop=64,32,32"]),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("kernels", ["reference", "auto", "fused"])
def test_instance_norms_as_kernels_change_nothing(name: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if kernels == "fused" and device == "cpu" and name == "swinunetr":
        pytest.skip("its smallest crop takes triton's interpreter minutes")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    make, sets = PLAIN[name]
    plain = make()
    model = build_model(
        RECIPES[f"brats_{name}_demo"]().override([*sets, "model.dropout=0", f"model.kernels={kernels}"])
    )
    norms = [module for module in model.modules() if isinstance(module, torch.nn.InstanceNorm3d)]
    assert {type(norm) for norm in norms} == {InstanceNormLeakyReLU}
    assert {norm.impl for norm in norms} == {kernels}
    image = torch.randn(1, 4, *(int(side) for side in sets[0].removeprefix("data.crop=").split(","))).to(device)
    # SwinUNETR's gradients change by 1e-9 from run to run: its position tables are gathered
    assert_same(model, plain, image, bits=kernels != "fused" and name != "swinunetr")


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


def test_swinunetr_and_dynunet_are_monais() -> None:
    swin = build_model(RECIPES["brats_swinunetr_demo"]())
    SwinUNETR(4, 3, feature_size=12).load_state_dict(swin.state_dict(), strict=True)
    dyn = build_model(RECIPES["brats_dynunet_demo"]())
    plain = DynUNet(3, 4, 3, kernel_size=[3] * 4, strides=[1, 2, 2, 2], upsample_kernel_size=[2] * 3,
                    filters=[8, 16, 32, 64], deep_supervision=True, deep_supr_num=2)  # fmt: skip
    plain.load_state_dict(dyn.state_dict(), strict=True)


def test_deep_supervision_weighs_levels_by_halves() -> None:
    recipe = RECIPES["brats_dynunet_demo"]().override(["data.crop=16,16,16"])
    model = build_model(recipe).train()
    image, label = torch.randn(1, 4, 16, 16, 16), torch.randint(0, 4, (1, 16, 16, 16), dtype=torch.uint8)
    logits = model(image)
    assert logits.shape == (1, 3, 3, 16, 16, 16)
    parts = [float(region_loss(level.detach(), label, KNOWN["msd"], "dice_bce")) for level in logits.unbind(1)]
    found = float(supervised_loss(logits.detach(), label, KNOWN["msd"], "dice_bce"))
    assert found == pytest.approx((parts[0] + parts[1] / 2 + parts[2] / 4) / 1.75)
    assert model.eval()(image).shape == (1, 3, 16, 16, 16)


def test_dynunet_keeps_no_graph_of_its_last_pass() -> None:
    """Or the nodes that take up gradients would outlive a step, and it could not be captured as a CUDA graph."""
    net = build_model(RECIPES["brats_dynunet_demo"]().override(["data.crop=32,32,32"])).train()
    outputs = net(torch.randn(1, 4, 32, 32, 32))
    outputs.square().mean().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert len(net.heads) > 0
    assert all(head.grad_fn is None and head.numel() > 1 for head in net.heads)


@pytest.mark.parametrize("name", ["segresnet", "unetr", "swinunetr", "dynunet"])
def test_recomputing_saves_less_and_changes_nothing(name: str) -> None:
    sets = ["data.crop=64,32,32", "model.dropout=0"]
    image = torch.randn(1, 4, 64, 32, 32)
    found = []
    for recompute in ("false", "true"):
        torch.manual_seed(0)
        model = build_model(RECIPES[f"brats_{name}_demo"]().override([*sets, f"train.recompute={recompute}"]))
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = model.train()(image)
        outputs.square().mean().backward()
        gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        found.append((sum(kept.values()), gradients))
    (plain_bytes, plain), (fewer_bytes, again) = found
    assert fewer_bytes < 0.9 * plain_bytes
    assert plain.keys() == again.keys()
    for key in plain:
        torch.testing.assert_close(again[key], plain[key], rtol=1e-4, atol=1e-6)


def test_options_that_no_network_reads_are_refused() -> None:
    """A sweep gives each option to all of its members: one of them must read it."""
    segresnet, unetr = (
        RECIPES[f"brats_{name}_demo"]().override(["model.hidden=96"]) for name in ("segresnet", "unetr")
    )
    with pytest.raises(UserError, match=r"brats_segresnet_demo: SegResNet has no model\.hidden: leave it out"):
        check_early([segresnet])
    check_early([segresnet, unetr])
    check_early([recipe() for recipe in RECIPES.values() if recipe().data.spacing_mm == 0])


@pytest.mark.parametrize(
    ("recipe", "sets", "words"),
    [
        ("brats_swinunetr_demo", ("model.feature=10",), "in twelves"),
        ("brats_swinunetr_demo", ("data.crop=48,48,48",), "multiples of 32"),
        ("brats_swinunetr_demo", ("data.crop=32,32,32",), r"SwinUNETR needs a crop of more than 32\^3"),
        ("brats_dynunet_demo", ("data.crop=8,8,8", "model.levels=4"), r"DynUNet needs a crop of more than 8\^3"),
        ("brats_dynunet_demo", ("model.supervised=3",), "at most 2"),
        ("brats_dynunet_demo", ("model.levels=2", "model.supervised=0"), "at least 3"),
        ("brats_dynunet_demo", ("data.crop=20,20,20",), "multiples of 8"),
    ],
)
def test_fields_that_do_not_fit(recipe: str, sets: tuple[str, ...], words: str) -> None:
    changed = RECIPES[recipe]().override(list(sets))
    with pytest.raises(UserError, match=words):
        build_model(changed)
    with pytest.raises(UserError, match=words):  # on a login node, too
        check_early([changed])
