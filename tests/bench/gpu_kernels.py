"""Kernels' benchmarks in one go: `python tests/bench/gpu_kernels.py [KERNEL...]` on a GPU appends to
kernels/benchmarks.csv.

`TRITON_INTERPRET=1 python tests/bench/gpu_kernels.py --smoke` only proves that they run.
"""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from medkernels.measurement import asked

KERNELS = sorted(path.parent.name for path in (Path(__file__).parents[2] / "kernels").glob("*/bench.py"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one after the other."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = asked(__doc__ or "", arguments, names=tuple(KERNELS))
    for name in options.names or KERNELS:
        importlib.import_module(f"medkernels.{name}.bench").main([word for word in arguments if word.startswith("-")])


if __name__ == "__main__":
    main()
