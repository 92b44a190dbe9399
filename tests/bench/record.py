"""Rows of benchmark results: append one with its conditions; show the newest (`python tests/bench/record.py`)."""

import csv
import os
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path

from medkernels.measurement import commit

RESULTS = Path(__file__).with_name("results.csv")
HEAD = ("benchmark", "what", "value", "unit", "peer", "peer_value", "ratio", "target", "conditions", "commit", "date")


def processor() -> str:
    """Name of this machine's processor and how many cores this process may use."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()}, {len(os.sched_getaffinity(0))} cores"
    return platform.machine()


def record(benchmark: str, what: str, value: float, unit: str, *, peer: str = "", peer_value: float | None = None,
           ratio: float | None = None, target: str = "", conditions: str = "", packages: tuple[str, ...] = (),
           keep: bool = False) -> None:  # fmt: skip
    """Print one result; with `keep`, append it to results.csv."""
    shown = f"{what}: {value:.4g} {unit}"
    if peer_value is not None:
        shown += f", {peer} {peer_value:.4g} {unit}" + (f", ratio {ratio:.2f}" if ratio is not None else "")
    print(f"{shown}{f' (target {target})' if target else ''}", flush=True)
    if not keep:
        return
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    row = (
        benchmark, what, f"{value:.4g}", unit, peer, "" if peer_value is None else f"{peer_value:.4g}",
        "" if ratio is None else f"{ratio:.2f}", target, "; ".join(filter(None, (conditions, processor(), versions))),
        commit(), date.today().isoformat(),
    )  # fmt: skip
    fresh = not RESULTS.exists()
    with open(RESULTS, "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if fresh:
            writer.writerow(HEAD)
        writer.writerow(row)


def newest() -> str:
    """The newest row of each figure as a Markdown table, without conditions."""
    from medtrain.tables import to_markdown

    with open(RESULTS, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    last = {(row["benchmark"], row["what"], row["peer"]): row for row in rows}
    shown = [name for name in HEAD if name != "conditions"]
    order = sorted(last.values(), key=lambda row: row["benchmark"])  # stable: as they were measured
    return to_markdown([shown, *([row[name] for name in shown] for row in order)])


def main() -> None:
    """Print the table of tests/bench/README.md."""
    print(newest(), end="")


if __name__ == "__main__":
    main()
