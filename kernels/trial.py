"""Each kernel once against its reference on the very device, before it is trusted with a training.

A compiler, a driver or a card may be at fault where every test passed elsewhere. A kernel that answers otherwise than
plain torch, or not at all, is left out with a warning: `dispatch.use_fused` then takes the reference.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from medkernels import dispatch
from medkernels.augment import Volumes
from medkernels.augment import augment as augment_samples
from medkernels.conv3d import conv3d
from medkernels.dispatch import Impl
from medkernels.group_norm_relu import group_norm_relu, instance_norm_leaky_relu
from medkernels.region_dice import region_dice
from medkernels.upsample_add import upsample_add
from medkernels.window_accumulate import window_accumulate

# ||found - expected|| / ||expected||: some roundings of each type, far below any fault
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}

Answers = Iterator[torch.Tensor]
_tried: set[tuple[str, int]] = set()


def try_kernels(device: torch.device, side: int = 48) -> dict[str, str]:
    """Kernels that fail on this device, with the reason; told once, and left out from now on. Tried once a device.

    `side` is that of the volumes, in voxels: 48 reaches every path of the kernels.
    """
    key = (device.type, device.index or 0)
    if dispatch.device_refusal(device.type) or key in _tried:
        return dispatch.distrusted
    _tried.add(key)
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for kernel, attempt in TRIALS.items():
            reason = _verdict(partial(attempt, device, side))
            if reason:
                dispatch.distrust(kernel, reason)
    return dispatch.distrusted


def _verdict(attempt: Callable[[Impl], Answers]) -> str:
    try:
        expected = list(attempt("reference"))
    except RuntimeError:  # no memory, say: the training will tell
        return ""
    try:
        found = list(attempt("fused"))
    except torch.OutOfMemoryError:
        return ""
    except Exception as error:  # compilers and drivers fail in many ways
        words = str(error).strip().partition("\n")[0][:160]
        return f"it fails on this device ({type(error).__name__}{': ' * bool(words)}{words})"
    for ours, theirs in zip(found, expected, strict=True):
        wanted = theirs.detach().double()
        gap = float((ours.detach().double() - wanted).norm() / wanted.norm().clamp(min=1e-12))
        if not gap <= TOLERANCE.get(ours.dtype, 1e-4):
            return f"it is off by {gap:.1%} on this device"
    return ""


def _draw(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    return values.to(device, dtype).requires_grad_()


def _layouts(device: torch.device, impl: Impl, *shape: int) -> Iterator[torch.Tensor]:
    """Channels first in float32, channels last in bfloat16; for the reference the same numbers in float32."""
    yield _draw(device, *shape)
    last = _draw(device, *shape, dtype=torch.bfloat16).detach().contiguous(memory_format=torch.channels_last_3d)
    yield (last if impl == "fused" else last.float()).requires_grad_()


def _group_norm(device: torch.device, side: int, impl: Impl) -> Answers:
    """Groups that one program holds, and groups shared by several; both ends of the kernel's shapes."""
    for channels, edge, groups in ((32, max(2, side // 6), 8), (2, side, 1)):
        for x in _layouts(device, impl, 2, channels, edge, edge, edge + 1):
            weight, bias = _draw(device, channels), _draw(device, channels)
            residual = x.detach().flip(0).requires_grad_()
            y = group_norm_relu(x, groups, weight, bias, residual=residual, impl=impl)
            yield y
            yield from torch.autograd.grad(y, (x, weight, bias, residual), torch.ones_like(y))


def _instance_norm(device: torch.device, side: int, impl: Impl) -> Answers:
    for x in _layouts(device, impl, 2, 16, side // 2, side // 2, side // 2 + 1):
        y = instance_norm_leaky_relu(x, impl=impl)
        yield y
        yield from torch.autograd.grad(y, x, x.detach())


def _conv3d(device: torch.device, side: int, impl: Impl) -> Answers:
    half = torch.float16 if device.type == "cpu" else torch.bfloat16  # triton's interpreter multiplies no bfloat16
    # rows of a whole block of 128 and of a part of one
    for channels, channels_out, kernel, row in (
        (16, 16, 3, 128), (16, 16, 3, side), (32, 32, 3, 128), (32, 32, 3, side), (4, 16, 3, side), (16, 3, 1, side)
    ):  # fmt: skip
        x = _draw(device, 1, channels, side // 6, side // 4, row, dtype=half).detach()
        x = x.contiguous(memory_format=torch.channels_last_3d)
        weight = (_draw(device, channels_out, channels, kernel, kernel, kernel).detach() / channels).requires_grad_()
        bias = _draw(device, channels_out) if kernel == 1 else None
        # the reference with the same numbers in float32
        x = (x if impl == "fused" else x.float()).requires_grad_(channels > 4)
        y = conv3d(x, weight, bias, impl=impl)
        yield y
        wanted = [t for t in (x, weight, bias) if t is not None and t.requires_grad]
        yield from torch.autograd.grad(y, wanted, torch.ones_like(y))


def _region_dice(device: torch.device, side: int, impl: Impl) -> Answers:
    size = (2, 2 * side, 2 * side, 2 * side)  # a program has several blocks
    label = torch.arange(16 * side**3, device=device).remainder(4).to(torch.uint8).reshape(size)
    for logits in _layouts(device, impl, 2, 3, *size[1:]):
        loss = region_dice(logits, label, [[2, 3], [1, 2, 3], [3]], bce=True, impl=impl)
        yield loss
        yield from torch.autograd.grad(loss, logits)


def _upsample_add(device: torch.device, side: int, impl: Impl) -> Answers:
    edge = side // 2
    for x, skip in zip(
        _layouts(device, impl, 1, 8, edge, edge, edge), _layouts(device, impl, 1, 8, *[2 * edge] * 3), strict=True
    ):
        y = upsample_add(x, skip, impl=impl)
        yield y
        yield from torch.autograd.grad(y, (x, skip), skip.detach())


def _window_accumulate(device: torch.device, side: int, impl: Impl) -> Answers:
    edge = side // 2 + 1
    total, weight = torch.zeros(2, 3, *[side] * 3, device=device), torch.zeros([side] * 3, device=device)
    windows = _draw(device, 2, 2, 3, edge, edge, edge).detach()
    importance = _draw(device, edge, edge, edge).detach().exp()
    window_accumulate(total, weight, windows, [(0, 0, 0), (side - edge, 1, 0)], importance, impl=impl)
    yield from (total, weight)


def _augment(device: torch.device, side: int, impl: Impl) -> Answers:
    fields, length = {}, 0
    for name, count in {"warp": 1, "matrix": 12, "flip": 3, "noise": 1, "blur": 1, "contrast": 2, "low": 1, "gamma": 2,
                        "scale": 2, "shift": 2}.items():  # fmt: skip
        fields[name] = slice(length, length + count)
        length += count
    row = torch.zeros(2, length)
    for name in ("contrast", "low", "gamma", "scale"):
        row[:, fields[name]] = 1.25 if name == "scale" else 1.0
    row[0, fields["flip"]] = 1.0
    row[1, fields["warp"]], row[1, fields["matrix"]] = 1.0, torch.eye(3, 4).flatten() * 0.9
    image = _draw(device, 2, *[side] * 3).detach().half()
    volumes = Volumes.pack([(image, image[0].abs().to(torch.uint8))], device)
    crop = (side // 2,) * 3
    yield augment_samples(volumes, [0, 0], [((1, 1, 1), tuple(n + 1 for n in crop))] * 2, row, fields, crop,
                          impl=impl)[0]  # fmt: skip


TRIALS: dict[str, Callable[[torch.device, int, Impl], Answers]] = {
    "group_norm_relu": _group_norm,
    "instance_norm_leaky_relu": _instance_norm,
    "conv3d": _conv3d,
    "region_dice": _region_dice,
    "upsample_add": _upsample_add,
    "window_accumulate": _window_accumulate,
    "augment": _augment,
}
