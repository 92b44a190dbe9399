"""What names a patient in a scan's header or in the folders around the data set stands in nothing that is written."""

import gzip
import shutil
import zipfile
from pathlib import Path

import nibabel as nib
import pytest
from conftest import TINY
from hostile import with_header
from launch_helpers import in_this_process, run_main

from medlaunch import report
from medseg import evaluation
from medseg.cohort import ScanCohort

SECRETS = {
    "descrip": b"Doe^Jane 1970-01-01", "aux_file": b"/pacs/doe_jane", "db_name": b"DOE_JANE_8",
    "intent_name": b"doe_jane_t", "data_type": b"DOEJANE_7",
}  # fmt: skip
FOLDER = "Doe_Jane_MRN123456"


def told(path: Path) -> bytes:
    """A file's bytes, and those it is packed from."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        content += gzip.decompress(content)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            content += b"".join(archive.read(name) for name in archive.namelist())
    return content


@pytest.mark.slow
def test_a_sweep_and_a_prediction(phantoms: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data, out = tmp_path / FOLDER / "Task01", tmp_path / "out"
    for path in sorted(phantoms.rglob("*")):
        target = data / path.relative_to(phantoms)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.name.endswith(".nii.gz"):
            raw = with_header(gzip.decompress(path.read_bytes()), **SECRETS)
            extension = nib.nifti1.Nifti1Extension("comment", b"Doe^Jane, bed 7Q")
            image = nib.Nifti1Image.from_bytes(raw)
            image.header.extensions.append(extension)
            for name, value in SECRETS.items():
                image.header[name] = value
            target.write_bytes(gzip.compress(with_header(image.to_bytes(), **SECRETS), 1))
        elif path.is_file():
            target.write_bytes(path.read_bytes())
    scan = data / "imagesTr" / "PHANTOM_000.nii.gz"
    assert all(value in told(scan) for value in SECRETS.values())
    sets = [part for item in TINY for part in ("--set", item)]
    assert run_main("sweep", "brats_demo", "--data", data, "--out", out / "sweep", "--models", "segresnet", *sets) == 0
    (run,) = (path.parent for path in (out / "sweep").rglob("done.json"))
    assert run_main("predict", "--members", run, "--image", scan, "--out", out / "labels") == 0
    assert run_main("status", out / "sweep", "--files-only") == 0
    printed = "".join(capfd.readouterr())
    # none is short: three bytes of a megabyte of weights are any word now and then
    words = [*SECRETS.values(), b"Doe^Jane", b"Doe_Jane", b"DoeJane", b"bed 7Q", FOLDER.encode(), b"/pacs/"]
    assert min(len(word) for word in words) > 5
    looked = {"terminal": printed.encode()}
    looked |= {str(path.relative_to(out)): told(path) for path in sorted(out.rglob("*")) if path.is_file()}
    for kind in ("cache.h5", "tfevents", "table.md", "table.csv", "cases.csv", "jobs", ".nii.gz", "checkpoint_best.pt"):
        assert any(kind in name for name in looked), kind
    found = []
    for name, content in looked.items():
        if name == "sweep/plan.json":  # where the data lie must stand in it, so that the sweep can go on
            continue
        both = content.lower()
        found += [(name, w) for w in words if w.lower() in both or w.hex().encode() in both]
    assert found == []


@pytest.mark.parametrize("deep", [1, 8])
def test_what_is_set_aside_and_what_is_judged(
    deep: int, phantoms: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medseg.preparation.in_processes", in_this_process)
    data = Path(shutil.copytree(phantoms, tmp_path.joinpath(*["a_folder_in_a_folder"] * deep, FOLDER, "Task01")))
    for name, content in (("imagesTr/PHANTOM_001", b""), ("labelsTr/PHANTOM_002", b"x")):
        (data / f"{name}.nii.gz").write_bytes(content)
    shutil.copy(data / "labelsTr" / "PHANTOM_003.nii.gz", data / "imagesTr" / "PHANTOM_003.nii.gz")
    assert run_main("prepare", "brats", "--data", data, "--out", tmp_path / "c.h5") == 0
    listed = (tmp_path / "c.h5.set_aside.csv").read_text()
    assert listed.count(".nii.gz") == 3
    assert '\nPHANTOM_003,"imagesTr/PHANTOM_003.nii.gz has shape' in listed
    rules = evaluation._rules(ScanCohort(data), 5)
    assert "5 of 5 labelled cases of Task01 (" in rules
    for text in (listed, rules, "".join(capfd.readouterr()), told(tmp_path / "c.h5").decode("latin-1")):
        assert FOLDER not in text


def test_what_is_named_as_a_log_is_shown_from_the_sweep_only(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    for place in (tmp_path, sweep):
        (place / "a.log").write_text("Traceback\nRuntimeError: what only its owner may read\n")
    (sweep / "link.log").symlink_to(tmp_path / "a.log")
    assert "what only its owner" in report._last_words(sweep, str(sweep / "a.log"))
    for log in (tmp_path / "a.log", sweep / "link.log", sweep / ".." / "a.log", sweep, "/dev/zero", ""):
        assert report._last_words(sweep, str(log)) == ""
