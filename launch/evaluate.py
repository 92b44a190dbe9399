"""Score trained members and their mean on a labelled data set that they need not come from:
`evaluate.py --members RUN... --data DIR|--cache C.h5 --out DIR` writes cases.csv, table.csv and table.md.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from medlaunch.tasks import door_of_run
from medtrain.errors import UserError, exit_code
from medtrain.lock import locked
from medtrain.run_folder import owner_of


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=Path, nargs="+", required=True, help="run folders; several are averaged too")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="labelled scans: an MSD, nnU-Net or BraTS folder")
    source.add_argument("--cache", type=Path, help="the same, made by launch/prepare.py as the members' own data was")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables")
    parser.add_argument("--label-map", default="auto", help="of --data (default: auto; see prepare.py)")
    options = parser.parse_args(argv)
    if options.cache and options.label_map != "auto":
        raise UserError(f"--label-map belongs to --data, {options.cache} tells its own: leave it out.")
    if owner := owner_of(options.out):
        raise UserError(f"{options.out} belongs to {owner}, whose files are not overwritten: give another --out.")
    door = door_of_run(options.members[0])
    place = options.data or options.cache
    with locked(options.out, "evaluating into it"):
        aside = door.evaluate(options.members, place, bool(options.cache), options.label_map, options.out)
    print((options.out / "table.md").read_text(encoding="utf-8"))
    return 3 if aside else 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
