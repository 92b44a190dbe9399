"""Memory of preparation (does not grow with the data set) and of loader workers, and how preparation scales."""

import argparse
import json
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any


def family(pid: int) -> list[int]:
    """The processes below `pid`, from /proc."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
    found, grown = {pid}, True
    while grown:
        more = {child for child, parent in parents.items() if parent in found} - found
        grown, found = bool(more), found | more
    return sorted(found - {pid})


def megabytes(pid: int, kinds: tuple[str, ...]) -> float:
    """The sum of those lines of a process's memory accounting."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith(kinds)) / 1024


class Peak(threading.Thread):
    """The largest proportional memory of all processes below this one, sampled until stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.value, self.running = 0.0, True

    def run(self) -> None:
        import os

        while self.running:
            self.value = max(self.value, sum(megabytes(pid, ("Pss:",)) for pid in family(os.getpid())))
            time.sleep(0.1)

    def stop(self) -> float:
        """End, and tell the peak in MB."""
        self.running = False
        self.join()
        return self.value


def prepare(data: Path, place: Path, cases: int, workers: int, measure: bool) -> tuple[float, float]:
    """(seconds, peak MB of the workers or 0) to prepare the first `cases` cases."""
    from medseg.preparation import Preparation, prepare_dataset

    part = place / f"data{cases}"
    if not part.exists():
        part.mkdir()
        for name in ("imagesTr", "labelsTr"):
            (part / name).mkdir()
        listing = json.loads((data / "dataset.json").read_text(encoding="utf-8"))
        entries = []
        for n in range(cases):
            source = listing["training"][n % len(listing["training"])]
            entries.append({"image": f"imagesTr/case{n:02}.nii.gz", "label": f"labelsTr/case{n:02}.nii.gz"})
            for key, name in entries[-1].items():
                shutil.copy(data / source[key], part / name)
        listing["training"] = entries
        (part / "dataset.json").write_text(json.dumps(listing), encoding="utf-8")
    peak = Peak()
    if measure:
        peak.start()
    began = time.monotonic()
    prepare_dataset(part, place / f"c{cases}-{workers}-{measure}.h5", Preparation(), workers=workers)
    spent = time.monotonic() - began
    return spent, peak.stop() if measure else 0.0


def largest_private(batches: Any, count: int) -> float:
    """Largest private memory in MB of one process of a loader, after `count` batches.

    Dirty pages only: clean ones are the cache file's, which every process shares and the system may drop.
    """
    import os

    for _ in range(count):
        next(batches)
    return max(megabytes(pid, ("Private_Dirty:",)) for pid in family(os.getpid()))


def main() -> None:
    """Measure all in one run."""
    import volumes
    from loader import ours
    from record import record

    from medseg.augment import Augment
    from medseg.cache import Cache

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        data, words = volumes.folder(place, options.data)
        packages = ("h5py", "nibabel", "nvidia-dali-cuda130")
        one, _ = prepare(data, place, 24, 1, False)
        two, _ = prepare(data, place, 24, 2, False)
        record("prepare", "24 cases, 1 mm, 2 processes", two, "s", peer="1 process", peer_value=one,
               ratio=one / (2 * two), target="efficiency >= 0.9", conditions=words, packages=packages,
               keep=options.record)  # fmt: skip
        _, small = prepare(data, place, 8, 2, True)
        _, large = prepare(data, place, 24, 2, True)
        record("prepare", "peak memory of 2 processes, 24 cases", large, "MB", peer="8 cases", peer_value=small,
               ratio=large / small, target="does not grow", conditions=words, packages=packages,
               keep=options.record)  # fmt: skip
        cache = Cache(place / "c24-1-False.h5")
        for workers in (1, 2, 4):
            value = largest_private(ours(cache, Augment(rotate=0.2), 128, workers, 1), 10)
            record("loader", f"private memory of a worker, {workers} workers", value, "MB",
                   target="<= 250", conditions=f"{words}, crop 128^3, batch 2", packages=packages,
                   keep=options.record)  # fmt: skip


if __name__ == "__main__":
    main()
