"""Train one member: `python launch/train.py RECIPE --cache C.h5 --out RUN`, or the same under torchrun."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from medlaunch.forecast import add_arguments, forecast, refuse_without_plan
from medlaunch.run import is_rank_0, run
from medlaunch.tasks import DOORS, find_recipe, recipe_names
from medtrain.errors import UserError, exit_code
from medtrain.processes import end_on_signals
from medtrain.recipe import described
from medtrain.run_folder import DONE, RECIPE, open_run


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", help=f"one of {', '.join(recipe_names())}")
    parser.add_argument("--cache", type=Path, help="HDF5 cache made by launch/prepare.py")
    parser.add_argument("--out", type=Path, help="run folder; a run found there goes on")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a field of the recipe"
    )
    parser.add_argument("--show", action="store_true", help="print the recipe's fields as --set takes them, and end")
    parser.add_argument("--profile", type=int, default=0, metavar="STEPS", help="record steps with torch's profiler")
    add_arguments(parser)
    options = parser.parse_args(argv)
    end_on_signals()
    recipe = find_recipe(options.recipe).override(options.set)
    if options.show:
        lines = described(recipe)
        width = max(len(line) for line, _ in lines)
        print("\n".join(f"{line:{width}}  {values}".rstrip() for line, values in lines))
        return 0
    if options.plan:
        forecast(recipe, options)
        return 0
    refuse_without_plan(options)
    if options.cache is None or options.out is None:
        parser.error("the following arguments are required: --cache, --out (or --plan)")
    if options.profile < 0:
        raise UserError(f"--profile {options.profile}: give how many steps to record.")
    if (options.out / DONE).exists() and (options.out / RECIPE).exists():
        open_run(recipe, DOORS[recipe.task].open_cache(options.cache), options.out)
        print(f"{options.out} is done already")
        return 0
    if not (options.out / RECIPE).exists():
        DOORS[recipe.task].check_early([recipe])
    done = run(recipe, options.cache, options.out, profile=options.profile)
    scores = ", ".join(f"{name} {value:.3f}" for name, value in done["scores"].items())
    if scores and is_rank_0():
        print(f"{done['cases']} {done['part']} cases, {DOORS[recipe.task].SCORE_NOTE}: {scores}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
