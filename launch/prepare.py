"""Prepare data: `prepare.py brats|multicancer --data DIR --out C.h5`, `verify C.h5`, `audit C.h5`, `weights`,
`phantom|phantom-images --out DIR`.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medtrain.errors import UserError, exit_code
from medtrain.processes import end_on_signals


def brats(options: argparse.Namespace) -> int:
    """MSD or BraTS folder -> HDF5 cache."""
    from medseg.findings import report_scans
    from medseg.preparation import LEAST_MM, Preparation, prepare_dataset

    if options.spacing_mm != 0 and not LEAST_MM <= options.spacing_mm < 100:
        raise UserError(
            f"--spacing-mm {options.spacing_mm:g} is no voxel size: give millimetres, or 0 to keep the spacing."
        )
    how = Preparation(spacing_mm=options.spacing_mm, compressed=options.compressed)
    prepare_dataset(options.data, options.out, how, workers=options.workers, label_map=options.label_map,
                    strict=options.strict)  # fmt: skip
    report_scans(options.out)
    print(f"{options.out}: {options.out.stat().st_size / 1e9:.2f} GB")
    return 0


def multicancer(options: argparse.Namespace) -> int:
    """Folders of images -> HDF5 cache, with groups of near-duplicates."""
    from medcls.preparation import prepare_folder

    prepare_folder(options.data, options.out, workers=options.workers, strict=options.strict)
    print(f"{options.out}: {options.out.stat().st_size / 1e9:.2f} GB")
    return _print_audit(options.out)


def audit(options: argparse.Namespace) -> int:
    """Print how many test images have a near-duplicate in training."""
    return _print_audit(options.cache)


def _print_audit(path: Path) -> int:
    from medcls.audit import audit_lines
    from medcls.cache import ImageCache
    from medcls.recipes import ImageData
    from medtrain.tables import to_markdown

    cache = ImageCache(path)
    print("\n" + to_markdown(audit_lines(cache, [ImageData(cancer=cancer) for cancer in cache.cancers])))
    return 0


def weights(options: argparse.Namespace) -> int:
    """Fetch the networks' ImageNet weights, on a node with internet."""
    from medcls import backbones
    from medtrain.progress import track

    folder = backbones.weights_folder(str(options.out or ""))
    for name in track(backbones.NAMES, len(backbones.NAMES), "weights"):
        backbones.fetch(name, folder)
    print(f"weights of {', '.join(backbones.NAMES)} in {folder}")
    if options.out:
        print(f"let the jobs find them: export MEDTRAIN_WEIGHTS={folder.resolve()}")
    return 0


def verify(options: argparse.Namespace) -> int:
    """Compare every case's bytes with its checksum."""
    from medcls.cache import ImageCache
    from medseg.cache import Cache
    from medtrain.cache import kind_of
    from medtrain.progress import track

    cache = Cache(options.cache) if kind_of(options.cache) == "volume" else ImageCache(options.cache)
    damaged = [case for case, intact in track(cache.verify(), len(cache.ids), "verify") if not intact]
    if damaged:
        names = ", ".join(damaged[:5]) + (f" and {len(damaged) - 5} more" if len(damaged) > 5 else "")
        raise UserError(f"{options.cache}: the bytes of case {names} have changed: prepare it again.")
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
    with Progress(options.cases, "phantoms") as progress:
        write_dataset(options.out, cases=options.cases, seed=options.seed, workers=max(1, options.workers),
                      progress=lambda done, total: progress.advance())  # fmt: skip
    return 0


def phantom_images(options: argparse.Namespace) -> int:
    """Write phantom images in the Multi Cancer layout."""
    from medcls.phantom import CLASSES, write_dataset
    from medtrain.progress import Progress

    if options.images < 1 or options.seed < 0:
        raise UserError(f"--images {options.images} --seed {options.seed}: give at least 1 and a seed of at least 0.")
    if (options.out / "phantom_truth.csv").exists():
        print(f"{options.out} already holds a data set")
        return 0
    with Progress(options.images * CLASSES, "phantoms") as progress:
        write_dataset(options.out, images=options.images, seed=options.seed, workers=max(1, options.workers),
                      progress=lambda done, total: progress.advance())  # fmt: skip
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
    command = commands.add_parser("brats", help="scans to a cache: MSD, nnU-Net's raw form, BraTS folders")
    command.add_argument("--data", type=Path, required=True, help="folder of dataset.json, or of BraTS case folders")
    command.add_argument("--out", type=Path, required=True, help="cache file to write (.h5)")
    command.add_argument("--spacing-mm", type=float, default=0.0, help="resample to this spacing (default: keep)")
    command.add_argument("--label-map", default="auto", help="auto, msd, legacy, brats18, brats23, brats24, brats24ped")
    command.add_argument("--strict", action="store_true", help="stop at a case that can not be used")
    command.add_argument("--compressed", action="store_true", help="smaller file, slower patches")
    command.add_argument("--workers", **workers)
    command.set_defaults(run=brats)
    command = commands.add_parser("multicancer", help="folders of images to a cache")
    command.add_argument("--data", type=Path, required=True, help="folder of <cancer>/<class>/* or of <class>/*")
    command.add_argument("--out", type=Path, required=True, help="cache file to write (.h5)")
    command.add_argument("--strict", action="store_true", help="stop at an image that can not be read")
    command.add_argument("--workers", **workers)
    command.set_defaults(run=multicancer)
    command = commands.add_parser("audit", help="near-duplicates across the splits of a cache of images")
    command.add_argument("cache", type=Path)
    command.set_defaults(run=audit)
    command = commands.add_parser("weights", help="fetch ImageNet weights, on a node with internet")
    command.add_argument("--out", type=Path, help="folder (default: $MEDTRAIN_WEIGHTS or ~/.cache/medtrain/weights)")
    command.set_defaults(run=weights)
    command = commands.add_parser("verify", help="compare a cache with its checksums")
    command.add_argument("cache", type=Path)
    command.set_defaults(run=verify)
    command = commands.add_parser("phantom", help="make a phantom data set in MSD form")
    command.add_argument("--out", type=Path, required=True, help="folder to write")
    command.add_argument("--cases", type=int, default=24, help="how many (default: 24)")
    command.add_argument("--seed", type=int, default=0, help="another one makes other phantoms (default: 0)")
    command.add_argument("--workers", **workers)
    command.set_defaults(run=phantom)
    command = commands.add_parser("phantom-images", help="make phantom images in the Multi Cancer layout")
    command.add_argument("--out", type=Path, required=True, help="folder to write")
    command.add_argument("--images", type=int, default=150, help="of each class (default: 150)")
    command.add_argument("--seed", type=int, default=0, help="another one makes other images (default: 0)")
    command.add_argument("--workers", **workers)
    command.set_defaults(run=phantom_images)
    options = parser.parse_args(argv)
    end_on_signals()
    return options.run(options)


if __name__ == "__main__":
    sys.exit(exit_code(main))
