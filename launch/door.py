"""What the launcher asks of a task. `medseg.door` and `medcls.door` are two: modules of these names."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol


class Door(Protocol):
    """Recipes, caches and tasks are the task's own kinds, which the launcher hands on unseen."""

    @property
    def TASK(self) -> str:
        """Its name in recipes and plans."""

    @property
    def Recipe(self) -> type[Any]:
        """The class of its recipes."""

    @property
    def RECIPES(self) -> Mapping[str, Callable[[], Any]]:
        """Makers of its recipes by name."""

    @property
    def SWEEPS(self) -> Mapping[str, Sequence[str]]:
        """Names of recipes by the sweep that trains them together."""

    @property
    def SCORE_NOTE(self) -> str:
        """What its scores are."""

    @property
    def MEMORY_FIELDS(self) -> str:
        """What to lower where memory does not suffice."""

    @property
    def UNUSED_OPTIONS(self) -> Mapping[str, object]:
        """Options of a sweep that mean nothing here, and their defaults."""

    @property
    def CPU_RECIPES(self) -> str:
        """What is made for CPUs."""

    @property
    def FINISH_ON_GPU(self) -> bool:
        """Whether the final job asks for a GPU."""

    @property
    def OUTPUTS(self) -> Mapping[str, str]:
        """What a finished sweep leaves, and what that is."""

    def open_cache(self, path: Path) -> Any:
        """A prepared cache."""

    def make_task(self, recipe: Any, cache: Any) -> Any:
        """The task that the engine trains."""

    def example(self, recipe: Any, batch: int, device: Any) -> Any:
        """A step without data, for a plan."""

    def folder(self, recipe: Any) -> str:
        """The name of a member's run folder."""

    def check_early(self, recipes: Sequence[Any]) -> None:
        """Refuse what needs no data to be seen, before hours of preparation."""

    def prepare(self, data: Path, out: Path, recipes: Sequence[Any], options: Any) -> Path:
        """The sweep's cache, made or found; `options` has workers, label_map and strict."""

    def look(self, data: Path, label_map: str) -> Any:
        """What a data folder holds, without reading its images; raises UserError where it is none."""

    def expand(self, recipes: Sequence[Any], source: Any, cancers: Sequence[str]) -> list[Any]:
        """The sweep's members from its recipes and what `look` or `open_cache` gave."""

    def wants_gpu(self, recipe: Any) -> bool:
        """Whether it takes days on a CPU."""

    def check(self, recipe: Any, cache: Any, weights: str) -> None:
        """Refuse before anything runs what would fail in the member's job."""

    def finish(self, sweep: Path, plan: dict[str, Any], weights: str) -> int:
        """Make ensembles, tables and figures; returns how many members are missing."""

    def predict(self, runs: Sequence[Path], weights: Sequence[float], place: Path, out: Path) -> tuple[str, int]:
        """Predict what `place` names; returns a sentence, and how many of it were left out."""

    def evaluate(self, runs: Sequence[Path], place: Path, prepared: bool, label_map: str, out: Path) -> int:
        """Write the tables of members on other data; returns how many cases could not be used."""
