"""The volumes that the benchmarks read: real cases where they lie beside the checkout, else phantoms of that size."""

from pathlib import Path

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "brats_mini"


def folder(place: Path, data: Path | None) -> tuple[Path, str]:
    """An MSD folder and its description for the conditions."""
    if data is not None:
        return data, str(data.name)
    if (REAL / "dataset.json").is_file():
        return REAL, "8 real BraTS cases"
    from medseg.phantom import write_dataset

    return write_dataset(place / "data", cases=8, shape=(192, 224, 160), spacing_mm=1.0), "8 phantoms of 192x224x160"
