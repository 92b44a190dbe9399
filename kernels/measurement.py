"""How kernels are measured: time, bytes and memory of rival implementations on a GPU, appended to benchmarks.csv."""

import argparse
import csv
import os
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

RESULTS = Path(__file__).with_name("benchmarks.csv")
HEAD = (
    "kernel", "what", "shape", "dtype", "layout", "implementation", "ms", "gb_counted", "gb_per_s", "share_of_copy",
    "peak_mb", "device", "torch", "triton", "cuda", "commit", "date",
)  # fmt: skip
LAYOUTS = {"channels first": torch.contiguous_format, "channels last": torch.channels_last_3d}

BUDGET_MS = 60.0  # of repetitions
WAIT_CYCLES = 8_000_000  # of the device: four milliseconds at 2 GHz

Work = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """What is measured: `counted` are the bytes that the fused kernel has to move at least."""

    kernel: str
    what: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    counted: int


def asked(about: str, arguments: Sequence[str] | None = None, names: tuple[str, ...] = ()) -> argparse.Namespace:
    """The options that all benchmarks share, and which of `names`. Without `--smoke` leaves the program where there is
    no GPU.
    """
    parser = argparse.ArgumentParser(description=about)
    if names:
        parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(names)}")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU, no rows: only that it runs")
    parser.add_argument("--no-record", dest="record", action="store_false", help="print, but append no rows")
    parser.add_argument("--warm", action="store_true", help="only compile what a later run then finds compiled")
    options = parser.parse_args(arguments)
    if not options.smoke and not torch.cuda.is_available():
        raise SystemExit("error: torch sees no CUDA device here: run this on a machine with a GPU.")
    unknown = sorted(set(getattr(options, "names", ())) - set(names))
    if unknown:
        parser.error(f"no {unknown[0]}: choose from {', '.join(names)}")
    options.device = "cpu" if options.smoke else "cuda"
    options.record &= not (options.smoke or options.warm)
    return options


def compiled(work: Callable[..., object], smoke: bool) -> Callable[..., object]:
    """torch.compile of a function, for each shape anew; in a smoke run only its tracing."""
    return torch.compile(work, backend="eager" if smoke else "inductor", dynamic=False)


def compare(case: Case, rivals: Mapping[str, Work], options: argparse.Namespace) -> None:
    """Measure rivals one after the other; print them and append their rows."""
    torch.compiler.reset()  # else the ninth shape would quietly run uncompiled
    for name, work in rivals.items():
        try:
            work()  # compiles
        except Exception as error:  # compilers fail in many ways, and the other rivals are to be measured all the same
            if options.device == "cpu":
                raise
            print(f"{case.kernel} {case.what} {case.shape}, {name}: FAILS: {type(error).__name__}: {error}", flush=True)
            continue
        if options.device == "cpu":
            print(f"{case.kernel} {case.what} {case.shape} {case.dtype} {case.layout}, {name}: runs")
            continue
        if options.warm:
            continue
        ms, peak, copy = milliseconds(work), peak_mb(work), copy_rate()
        rate = case.counted / ms / 1e6
        print(
            f"{case.kernel} {case.what} {case.shape} {case.dtype} {case.layout}, {name}: {ms:.3f} ms, "
            f"{rate:.0f} GB/s counted ({rate / copy:.0%} of a copy), peak {peak:.0f} MB", flush=True,
        )  # fmt: skip
        if options.record:
            figures = (f"{ms:.4f}", f"{case.counted / 1e9:.4f}", f"{rate:.0f}", f"{rate / copy:.3f}", f"{peak:.1f}")
            shape = "x".join(map(str, case.shape))
            append((case.kernel, case.what, shape, case.dtype, case.layout, name, *figures))


def milliseconds(work: Work, *, least: int = 10) -> float:
    """Median time of one call on the device by CUDA events, with the level-two cache overwritten before each.

    The device first waits for some milliseconds, in which the host asks for the work: a step of a network keeps the
    device so far behind too, and the time to launch a small kernel would else be taken for its own.
    """
    flush = torch.empty(128 * 2**20, dtype=torch.uint8, device="cuda")
    work()
    times: list[float] = []
    while len(times) < least or (sum(times) < BUDGET_MS and len(times) < 100):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(WAIT_CYCLES)
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def peak_mb(work: Work) -> float:
    """Memory in MB that one call takes at most beyond what was there before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


_copies: list[float] = []


def copy_rate() -> float:
    """GB/s, read and written, of a device-to-device copy of 1 GiB; measured once a process."""
    if not _copies:
        source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        _copies.append(2 * source.numel() / milliseconds(lambda: target.copy_(source)) / 1e6)
    return _copies[0]


def append(cells: Sequence[str]) -> None:
    """Append one row with device, versions, commit and date."""
    where = (torch.cuda.get_device_name(), torch.__version__, _triton(), str(torch.version.cuda))
    with open(RESULTS, "a", newline="", encoding="utf-8") as file:
        row = (*cells, *where, commit(), date.today().isoformat())
        csv.writer(file, lineterminator="\n").writerow(row)


def commit() -> str:
    """The commit that is measured; $MEDTRAIN_COMMIT tells it where the checkout has no git. Else nothing."""
    if os.environ.get("MEDTRAIN_COMMIT"):
        return os.environ["MEDTRAIN_COMMIT"]
    words = ["git", "rev-parse", "--short", "HEAD"]
    try:
        made = subprocess.run(words, capture_output=True, text=True, check=False, cwd=RESULTS.parent)
    except OSError:
        return ""
    return made.stdout.strip()


def _triton() -> str:
    from importlib.metadata import version

    return version("triton")


def training_step(forward: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor],
                  dy: torch.Tensor | None = None) -> Work:  # fmt: skip
    """A call of `forward` and the gradients of all inputs that need one."""
    wanted = [tensor for tensor in inputs if tensor.requires_grad]

    def work() -> object:
        y = forward(*inputs)
        return torch.autograd.grad(y, wanted, None if dy is None else dy.to(y.dtype))

    return work
