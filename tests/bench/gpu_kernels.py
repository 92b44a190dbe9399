"""All kernels' benchmarks in one go: `python tests/bench/gpu_kernels.py` on a GPU appends to kernels/benchmarks.csv.

`TRITON_INTERPRET=1 python tests/bench/gpu_kernels.py --smoke` only proves that they run.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path

from medkernels.measurement import asked

KERNELS = sorted(path.parent.name for path in (Path(__file__).parents[2] / "kernels").glob("*/bench.py"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one after the other."""
    asked(__doc__ or "", arguments)
    for name in KERNELS:
        importlib.import_module(f"medkernels.{name}.bench").main(arguments)


if __name__ == "__main__":
    main()
