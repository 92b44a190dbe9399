"""What a job runs: small callables that can be pickled; heavy imports come inside."""

import json
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

        from medlaunch.train import run
        from medseg.recipes import SegRecipe
        from medtrain.errors import UserError
        from medtrain.files import write_json

        if submitit.JobEnvironment().num_tasks > 1:
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        failed = Path(self.out) / "failed.json"
        try:
            failed.unlink(missing_ok=True)
            return run(SegRecipe.from_json(self.recipe), Path(self.cache), Path(self.out))
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
        from medseg.table import finish

        sweep = Path(self.sweep)
        plan = json.loads((sweep / "plan.json").read_text(encoding="utf-8"))
        runs = [sweep / member["folder"] for member in plan["members"]]
        return finish(sweep, sweep / plan["cache"], runs, self.weights)
