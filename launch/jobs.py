"""What a job runs: small callables that can be pickled; heavy imports come inside."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class TrainJob:
    """Train one member, on every process of the job."""

    recipe: str  # JSON
    cache: str
    out: str

    def __call__(self) -> dict[str, Any]:
        import submitit

        from medlaunch.options import read_recipe
        from medlaunch.train import run
        from medtrain.errors import UserError
        from medtrain.files import write_json

        if submitit.JobEnvironment().num_tasks > 1:
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        failed = Path(self.out) / "failed.json"
        try:
            failed.unlink(missing_ok=True)
            return run(read_recipe(self.recipe, "the job's recipe"), Path(self.cache), Path(self.out))
        except Exception as error:
            if os.environ.get("RANK", "0") == "0":
                text = str(error).splitlines()[0] if str(error) else ""
                kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
                write_json(failed, {"status": "failed", "reason": f"{kind}{text}"[:300]})
            raise


@dataclass
class FinishJob:
    """Make ensemble, tables and figures of a sweep folder; returns how many members are missing."""

    sweep: str
    weights: str

    def __call__(self) -> int:
        from medlaunch.options import DOORS
        from medtrain.errors import UserError
        from medtrain.files import read_json

        sweep = Path(self.sweep)
        plan = read_json(sweep / "plan.json")
        if plan.get("task") not in DOORS:
            raise UserError(f"{sweep / 'plan.json'} is of another version of this program: run the sweep again.")
        return DOORS[plan["task"]].finish(sweep, plan, self.weights)
