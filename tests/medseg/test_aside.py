"""Cases that can not be used: set aside with their reasons, tried again, never in a cache or a split."""

import errno
import os
import shutil
from pathlib import Path

import h5py
import pytest
from launch_helpers import in_this_process, run_main

from medseg import preparation
from medseg.cache import Cache
from medseg.cases import CaseFiles
from medseg.labels import LabelMap
from medseg.nifti import Unreadable
from medseg.nifti import _read as read_voxels
from medseg.preparation import Preparation, prepare_dataset
from medseg.recipes import RECIPES
from medseg.scan import Scan, read_scan
from medseg.task import SegTask


@pytest.fixture
def spoilt(phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, bytes]:
    """A data set of which a label is cut short, that label, and its bytes before."""
    monkeypatch.setattr("medseg.preparation.in_processes", in_this_process)
    data = Path(shutil.copytree(phantoms, tmp_path / "data"))
    broken = data / "labelsTr" / "PHANTOM_004.nii.gz"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:300])
    return data, broken, whole


def test_a_bad_case_is_set_aside_and_tried_again(
    spoilt: tuple[Path, Path, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data, broken, whole = spoilt
    out, listing = tmp_path / "c.h5", tmp_path / "c.h5.set_aside.csv"
    arguments = ("prepare", "brats", "--data", data, "--out", out)
    assert run_main(*arguments) == 0
    told = capsys.readouterr().err
    assert "set aside: PHANTOM_004: labelsTr/PHANTOM_004.nii.gz is cut short" in told
    assert f"1 case set aside, listed in {listing}" in told
    assert listing.read_text().startswith("case,reason\nPHANTOM_004,labelsTr/PHANTOM_004.nii.gz is cut short")
    assert Cache(out).ids == [f"PHANTOM_00{n}" for n in range(4)]
    before, tried = out.stat().st_mtime_ns, list[str]()

    def noted(files: CaseFiles, label_map: LabelMap) -> Scan:
        tried.append(files.id)
        return read_scan(files, label_map)

    monkeypatch.setattr("medseg.preparation.read_scan", noted)
    listing.unlink()
    assert run_main(*arguments) == 0
    assert tried == ["PHANTOM_004"]
    assert "set aside: PHANTOM_004" in capsys.readouterr().err
    assert listing.exists()
    assert out.stat().st_mtime_ns == before
    assert run_main(*arguments, "--strict") == 2
    assert str(broken) in capsys.readouterr().err
    broken.write_bytes(whole)
    tried.clear()
    assert run_main(*arguments) == 0
    assert tried == ["PHANTOM_004"]
    assert not listing.exists()
    assert capsys.readouterr().err == ""
    again = Cache(prepare_dataset(data, tmp_path / "d.h5", Preparation()))
    assert Cache(out).ids == again.ids
    assert Cache(out).fingerprint == again.fingerprint
    assert all(intact for _, intact in Cache(out).verify())
    assert not out.with_name("c.h5.parts").exists()


def test_a_case_that_is_spoilt_later_leaves_the_cache(
    spoilt: tuple[Path, Path, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, broken, whole = spoilt
    broken.write_bytes(whole)
    out = prepare_dataset(data, tmp_path / "c.h5", Preparation())
    assert len(Cache(out).ids) == 5
    broken.write_bytes(whole[:300])
    prepare_dataset(data, out, Preparation())
    assert Cache(out).ids == [f"PHANTOM_00{n}" for n in range(4)]
    assert "4 of 5 cases are prepared already" in capsys.readouterr().out
    task = SegTask(RECIPES["brats_segresnet_demo"]().override(["data.spacing_mm=0", "data.crop=32,32,32"]), Cache(out))
    assert "PHANTOM_004" not in (*task.split.train, *task.split.val, *task.split.test)


def test_where_every_case_is_bad_there_is_no_cache(
    spoilt: tuple[Path, Path, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, _, _ = spoilt
    for label in (data / "labelsTr").iterdir():
        label.write_bytes(b"")
    assert run_main("prepare", "brats", "--data", data, "--out", tmp_path / "c.h5") == 2
    told = capsys.readouterr().err
    assert told.startswith(
        f"error: no case of {data} can be used; the first of 5: {data / 'labelsTr/PHANTOM_000.nii.gz'} is cut short"
    )
    assert told.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_most_cases_set_aside_is_a_warning(
    spoilt: tuple[Path, Path, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, _, _ = spoilt
    for n in range(2):
        (data / "labelsTr" / f"PHANTOM_00{n}.nii.gz").write_bytes(b"")
    assert run_main("prepare", "brats", "--data", data, "--out", tmp_path / "c.h5") == 0
    assert "WARNING: most cases are set aside: look at their reasons, and at --label-map" in capsys.readouterr().err


def test_a_disk_that_fails_is_no_fault_of_the_case(
    spoilt: tuple[Path, Path, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data, broken, whole = spoilt
    broken.write_bytes(whole)

    def fail(path: Path, *rest: object) -> object:
        if path == broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read_voxels(path, *rest)

    monkeypatch.setattr("medseg.nifti._read", fail)
    assert run_main("prepare", "brats", "--data", data, "--out", tmp_path / "c.h5") == 2
    assert f"error: {broken} can not be read (Input/output error): run it again.\n" in capsys.readouterr().err
    assert not (tmp_path / "c.h5").exists()


def test_a_damaged_case_is_not_taken_over(
    spoilt: tuple[Path, Path, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, broken, whole = spoilt
    out = prepare_dataset(data, tmp_path / "c.h5", Preparation())
    with h5py.File(out, "r+") as file:
        file["cases/PHANTOM_001/image"][0, 0, 0, 0] += 1
    broken.write_bytes(whole)
    assert run_main("prepare", "brats", "--data", data, "--out", out) == 2
    assert "the bytes of case PHANTOM_001 have changed: remove it and prepare it again" in capsys.readouterr().err
    assert len(Cache(out).ids) == 4


def test_a_cache_that_members_were_trained_on_takes_up_no_case(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(shutil.copytree(phantoms, tmp_path / "data"))
    label = data / "labelsTr" / "PHANTOM_002.nii.gz"
    monkeypatch.setattr("medseg.preparation.in_processes", in_this_process)
    whole = label.read_bytes()
    label.write_bytes(whole[:100])
    out = prepare_dataset(data, tmp_path / "c.h5", Preparation())
    before = out.read_bytes()
    label.write_bytes(whole)
    prepare_dataset(data, out, Preparation(), settled=True)
    assert "note: 1 cases that were set aside, or are new, stay out of" in capsys.readouterr().out
    assert out.read_bytes() == before
    prepare_dataset(data, out, Preparation())
    assert len(Cache(out).ids) == 5


def test_a_file_that_vanished_while_others_were_read_stops_all(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Path(shutil.copytree(phantoms, tmp_path / "data"))
    real = preparation.read_scan
    monkeypatch.setattr("medseg.preparation.in_processes", in_this_process)

    def vanishes(files: CaseFiles, label_map: LabelMap) -> object:
        for path in files.images:
            path.unlink()
        return real(files, label_map)

    monkeypatch.setattr(preparation, "read_scan", vanishes)
    with pytest.raises(Unreadable, match="is not there"):
        prepare_dataset(data, tmp_path / "c.h5", Preparation())
    assert not (tmp_path / "c.h5").exists()
