"""Make a sweep's ensemble, tables and figures again: `finish.py DIR [--weights equal|validation]`. Scans are predicted
on this machine, by its GPU if it has one.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from medlaunch.jobs import FinishJob
from medlaunch.plan import read_plan, read_request
from medlaunch.tasks import DOORS
from medtrain.errors import UserError, exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="folder that launch/sweep.py wrote")
    parser.add_argument("--weights", choices=("equal", "validation"),
                        help="of the scans' ensemble (default: as the sweep was asked for)")  # fmt: skip
    options = parser.parse_args(argv)
    plan = read_plan(options.sweep)
    if options.weights and "weights" in DOORS[plan["task"]].UNUSED_OPTIONS:
        raise UserError("--weights is for sweeps of scans: this one has a table of every weighting.")
    weights = options.weights or read_request(plan).weights
    missing = FinishJob(str(options.sweep), weights)()
    print((options.sweep / "table.md").read_text(encoding="utf-8"))
    return 3 if missing else 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
