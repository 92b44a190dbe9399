"""Predict with trained members, averaged:
`predict.py --members RUN... --image X.nii.gz|DIR --out DIR` writes label maps of scans,
`predict.py --members RUN... --image DIR --out predictions.csv` class probabilities of images.
Scans of a folder that can not be used are listed in set_aside.csv, and the status is 3.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from medlaunch.tasks import door_of_run
from medtrain.errors import UserError, exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=Path, nargs="+", required=True, help="run folders; several are averaged")
    parser.add_argument("--image", type=Path, required=True, help="a file, or a folder of files or of BraTS cases")
    parser.add_argument("--out", type=Path, required=True, help="folder for <case>.nii.gz, or a .csv file")
    parser.add_argument("--weights", type=float, nargs="+", help="one weight a member (default: equal)")
    options = parser.parse_args(argv)
    weights = options.weights or [1.0] * len(options.members)
    if len(weights) != len(options.members) or not (min(weights) >= 0 and 0 < sum(weights) < math.inf):
        raise UserError(f"--weights needs {len(options.members)} numbers, one a member, at least one above 0.")
    if not options.image.exists():
        raise UserError(f"{options.image} is not there: give a file or a folder of them.")
    told, aside = door_of_run(options.members[0]).predict(options.members, weights, options.image, options.out)
    print(told)
    return 3 if aside else 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
