"""Prepare data: `prepare.py brats --data DIR --out C.h5`, `prepare.py verify C.h5`, `prepare.py phantom --out DIR`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medtrain.errors import UserError, exit_code


def brats(options: argparse.Namespace) -> int:
    """MSD or BraTS folder -> HDF5 cache."""
    from medseg.preparation import Preparation, prepare_dataset, report_enhancement

    if not 0 <= options.spacing_mm < 100:
        raise UserError(
            f"--spacing-mm {options.spacing_mm:g} is no voxel size: give millimetres, or 0 to keep the spacing."
        )
    how = Preparation(spacing_mm=options.spacing_mm, compressed=options.compressed)
    prepare_dataset(options.data, options.out, how, workers=options.workers, label_map=options.label_map)
    report_enhancement(options.out)
    print(f"{options.out}: {options.out.stat().st_size / 1e9:.2f} GB")
    return 0


def verify(options: argparse.Namespace) -> int:
    """Compare every case's bytes with its checksum."""
    from medtrain.cache import Cache
    from medtrain.progress import track

    cache = Cache(options.cache)
    damaged = [case for case, intact in track(cache.verify(), len(cache.ids), "verify") if not intact]
    if damaged:
        raise UserError(f"{options.cache}: the bytes of case {', '.join(damaged)} have changed: prepare it again.")
    print(f"{options.cache}: {len(cache.ids)} cases are intact")
    return 0


def phantom(options: argparse.Namespace) -> int:
    """Write a phantom data set in MSD form."""
    from medseg.phantom import write_dataset
    from medtrain.progress import Progress

    if options.cases < 1 or options.seed < 0:
        raise UserError(
            f"--cases {options.cases} --seed {options.seed}: give at least 1 case and a seed of at least 0."
        )
    if (options.out / "dataset.json").exists():
        print(f"{options.out} already holds a data set")
        return 0
    progress = Progress(options.cases, "phantoms")
    write_dataset(options.out, cases=options.cases, seed=options.seed, workers=max(1, options.workers),
                  progress=lambda done, total: progress.advance())  # fmt: skip
    progress.close()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    workers: dict[str, Any] = {
        "type": int,
        "default": len(os.sched_getaffinity(0)),
        "help": "processes (default: all cores)",
    }
    command = commands.add_parser("brats", help="brain tumours: MSD Task01 or BraTS case folders to a cache")
    command.add_argument("--data", type=Path, required=True)
    command.add_argument("--out", type=Path, required=True, help="cache file to write (.h5)")
    command.add_argument("--spacing-mm", type=float, default=0.0, help="resample to this spacing (default: keep)")
    command.add_argument("--label-map", default="auto", help="auto, msd, legacy, brats18 or brats23")
    command.add_argument("--compressed", action="store_true", help="smaller file, slower patches")
    command.add_argument("--workers", **workers)
    command.set_defaults(run=brats)
    command = commands.add_parser("verify", help="compare a cache with its checksums")
    command.add_argument("cache", type=Path)
    command.set_defaults(run=verify)
    command = commands.add_parser("phantom", help="make a phantom data set in MSD form")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--cases", type=int, default=24)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--workers", **workers)
    command.set_defaults(run=phantom)
    options = parser.parse_args(argv)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(exit_code(main))
