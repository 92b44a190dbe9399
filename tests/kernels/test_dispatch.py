"""Which implementation runs: by device, by what was asked, and said once."""

import logging
import subprocess
import sys

import pytest
import torch
from kernel_checks import DEVICE

from medkernels import dispatch


def test_auto_takes_the_reference_on_the_cpu_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    assert not dispatch.use_fused("k", "auto", [torch.zeros(1)])
    assert not caplog.records


def test_fused_runs_under_the_interpreter_or_on_a_device() -> None:
    assert dispatch.use_fused("k", "fused", [torch.zeros(1, device=DEVICE)])
    assert not dispatch.use_fused("k", "reference", [torch.zeros(1, device=DEVICE)])


@pytest.mark.parametrize("missing", ["HAS_TRITON", "INTERPRETED"])
def test_fused_raises_where_it_can_not_run(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, missing, False)
    with pytest.raises(dispatch.FusedUnavailable, match=r"triton is not installed|need the interpreter"):
        dispatch.use_fused("k", "fused", [torch.zeros(1)])


def test_only_auto_falls_back_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    meta = torch.zeros(1, device="meta")
    with caplog.at_level(logging.WARNING, "medkernels"):
        for _ in range(2):
            assert not dispatch.use_fused("only_here", "auto", [meta])
    assert [record.message for record in caplog.records] == [
        "only_here: reference instead of fused: no kernel runs on meta tensors"
    ]
    with pytest.raises(RuntimeError, match="meta"):
        dispatch.use_fused("only_here", "fused", [meta])


def test_a_kernels_own_refusal_and_an_unknown_choice() -> None:
    x = torch.zeros(1, dtype=torch.float64, device=DEVICE)
    with pytest.raises(dispatch.FusedUnavailable, match=r"no kernel for torch\.float64"):
        dispatch.use_fused("k", "fused", [x], dispatch.dtype_refusal(x, None))
    with pytest.raises(ValueError, match="must be one of"):
        dispatch.use_fused("k", "quick", [x])  # type: ignore[arg-type]


def test_the_compiler_takes_the_devices_answer_for_a_constant() -> None:
    def asked() -> None: ...

    assert vars(torch.compiler.assume_constant_result(asked)).items() <= vars(dispatch.device_refusal).items()


def test_kernels_are_imported_without_the_compiler() -> None:
    names = ("augment", "conv3d", "group_norm_relu", "region_dice", "upsample_add", "window_accumulate", "trial")
    code = (
        "".join(f"import medkernels.{name}\n" for name in names) + "import sys; print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
