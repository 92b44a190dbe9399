"""What the tests of all kernels share: the device, the tolerance table, and the comparison with float64."""

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = [str(dtype).removeprefix("torch.") for dtype in DTYPES]

# |found - expected| <= RELATIVE * |expected| + ABSOLUTE, expected from float64 on the very inputs of the kernel.
# bfloat16 has 8 significant bits. A device rounds to nearest (2**-9), triton's interpreter cuts off (2**-8); float16
# has 11. The rest of each row is for float32 sums of some thousand terms.
RELATIVE = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
ABSOLUTE = {torch.float32: 2e-5, torch.bfloat16: 2e-3, torch.float16: 3e-4}

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)


def assert_near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype | None = None,
                *, factor: float = 1.0) -> None:  # fmt: skip
    """Compare with float64 by the table's row of `dtype`, or of what was found; `factor` widens a long sum's."""
    kind = dtype or found.dtype
    assert found.shape == expected.shape
    torch.testing.assert_close(
        found.double().cpu(), expected.double().cpu(), rtol=RELATIVE[kind] * factor, atol=ABSOLUTE[kind] * factor
    )


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, mean: float = 0.0, std: float = 1.0,
         ) -> torch.Tensor:  # fmt: skip
    """Normal numbers that need a gradient, drawn on the CPU so that every device gets the same."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * std + mean
    return values.to(DEVICE, dtype).requires_grad_()


def double(x: torch.Tensor | None) -> torch.Tensor | None:
    """The same numbers in float64, needing their own gradient."""
    return None if x is None else x.detach().double().requires_grad_()
