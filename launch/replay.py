"""Do the step again in which a run lost its gradients: `replay.py RUN` names the samples, cases and losses."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from medlaunch.tasks import DOORS, recipe_of_run
from medtrain.errors import exit_code
from medtrain.files import read_json
from medtrain.processes import end_on_signals
from medtrain.run_folder import CACHE
from medtrain.tables import to_markdown

HEAD = ("epoch", "sample", "case", "values not finite", "largest value", "loss", "norm of the share's gradients")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run folder that holds diverged.json")
    parser.add_argument("--cache", type=Path, help="the cache, where it has moved since")
    options = parser.parse_args(argv)
    end_on_signals()
    from medtrain.divergence import replay
    from medtrain.trained import default_device

    run = options.run
    recipe = recipe_of_run(run)
    door = DOORS[recipe.task]
    cache = door.open_cache(options.cache or Path(read_json(run / CACHE)["path"]))
    task = door.make_task(recipe, cache)
    lines: list[list[str]] = [list(HEAD)]
    for share in replay(run, recipe, task, default_device()):
        for sample in share.samples:
            cells = (sample.epoch, sample.index, sample.case, sample.not_finite, f"{sample.largest:.4g}",
                     f"{sample.loss:.4g}", f"{share.norm:.4g}")  # fmt: skip
            lines.append([str(cell) for cell in cells])
    print(to_markdown(lines))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
