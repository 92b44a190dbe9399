"""The forms that scans and labels come in: each is read rightly, or refused with its own remedy."""

import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medseg.brats import find_case_folders, role_of
from medseg.cases import CaseFiles, case_id
from medseg.labels import KNOWN, from_names
from medseg.msd import read_dataset
from medseg.prediction import find_images
from medseg.scan import read_scan
from medtrain.errors import UserError

NAMES = ("flair", "t1", "t1ce", "t2")
AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])
SHAPE = (6, 7, 5)


def volume(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 1000, SHAPE).astype(np.int16)


def label() -> np.ndarray:
    codes = np.zeros(SHAPE, np.uint8)
    codes[1, :, :], codes[2, :, :], codes[3, :, :] = 1, 2, 4
    return codes


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.Nifti1Image(array, affine).to_filename(path)
    return path


def brats(place: Path, beginning: str, names: tuple[str, ...] = NAMES, seg: str = "_seg", between: str = "_") -> Path:
    for n, name in enumerate(names):
        save(place / f"{beginning}{between}{name}.nii.gz", volume(n))
    if seg:
        save(place / f"{beginning}{seg}.nii.gz", label())
    return place


@pytest.fixture
def case(tmp_path: Path) -> CaseFiles:
    """A good case with all files beside each other, for tests to spoil."""
    return find_case_folders(brats(tmp_path / "data" / "BraTS_1", "BraTS_1"))[0][0]


def test_roles_by_names() -> None:
    found = {stem: role_of(stem) for stem in (
        "BraTS20_Training_001_t1ce", "BraTS-GLI-00000-000-t1n", "sub-01_ce-gad_T1w", "sub-01_T1w", "T1", "x_T2-FLAIR",
        "UCSF-PDGM-0004_tumor_segmentation", "W39_1998.09.19_Segm", "x_t1c_bias", "mat1", "notes")}  # fmt: skip
    assert found == {
        "BraTS20_Training_001_t1ce": ("T1Gd", "BraTS20_Training_001"), "x_t1c_bias": None, "mat1": None, "notes": None,
        "BraTS-GLI-00000-000-t1n": ("T1w", "BraTS-GLI-00000-000"), "sub-01_ce-gad_T1w": ("T1Gd", "sub-01"),
        "sub-01_T1w": ("T1w", "sub-01"), "T1": ("T1w", ""), "x_T2-FLAIR": ("FLAIR", "x"),
        "UCSF-PDGM-0004_tumor_segmentation": ("label", "UCSF-PDGM-0004"),
        "W39_1998.09.19_Segm": ("label", "W39_1998.09.19"),
    }  # fmt: skip


def test_folders_of_many_forms(tmp_path: Path) -> None:
    brats(tmp_path / "BraTS20_Training_355", "BraTS20_Training_355", seg="")
    save(tmp_path / "BraTS20_Training_355" / "W39_1998.09.19_Segm.nii.gz", label())  # as it was published
    brats(tmp_path / "pat0", "", between="", seg="seg")
    brats(tmp_path / "sub-01" / "anat", "sub-01", ("FLAIR", "T1w", "ce-gad_T1w", "T2w"), "_dseg")
    brats(tmp_path / "together", "A")
    brats(tmp_path / "together", "B")
    cases, lacking = find_case_folders(tmp_path)
    assert not lacking
    assert [case.id for case in cases] == ["BraTS20_Training_355", "pat0", "anat", "A", "B"]
    assert all(case.label is not None and case.label.parent == case.images[0].parent for case in cases)
    assert [[path.name for path in case.images] for case in cases][2] == [
        "sub-01_FLAIR.nii.gz", "sub-01_T1w.nii.gz", "sub-01_ce-gad_T1w.nii.gz", "sub-01_T2w.nii.gz"]  # fmt: skip


def test_folders_within_each_patients_own_are_named_by_their_files(tmp_path: Path) -> None:
    for name in ("sub-01", "sub-02"):
        brats(tmp_path / name / "anat", name)
    assert [case.id for case in find_case_folders(tmp_path)[0]] == ["sub-01", "sub-02"]


def test_files_of_two_patients_are_not_one_case(tmp_path: Path) -> None:
    place = brats(tmp_path / "BraTS2021_00002", "BraTS2021_00002", seg="")
    (place / "BraTS2021_00002_t1ce.nii.gz").rename(place / "BraTS2021_00004_t1ce.nii.gz")
    with pytest.raises(UserError, match=r"BraTS2021_00002\* has no T1Gd file: .* \(and 1 more lack a file\)"):
        read_dataset(tmp_path)


def test_linked_case_folders_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once each, also where links go round in circles; what leads out of the data folder is refused."""
    brats(tmp_path / "all" / "BraTS_1", "BraTS_1")
    brats(tmp_path / "all" / "BraTS_2", "BraTS_2")
    (tmp_path / "all" / "BraTS_2" / "up").symlink_to(tmp_path / "all")
    assert [case.id for case in find_case_folders(tmp_path / "all")[0]] == ["BraTS_1", "BraTS_2"]
    chosen = tmp_path / "chosen"
    chosen.mkdir()
    (chosen / "BraTS_1").symlink_to(tmp_path / "all" / "BraTS_1")
    with pytest.raises(UserError, match="a link that leaves the data folder"):
        find_case_folders(chosen)
    save(chosen / "scans" / "a.nii.gz", volume(0))
    (chosen / "scans" / "b.nii.gz").symlink_to(tmp_path / "all" / "BraTS_1" / "BraTS_1_t1.nii.gz")
    with pytest.raises(UserError, match="a link that leaves the data folder"):
        find_images(chosen / "scans")
    monkeypatch.setenv("MEDTRAIN_FOLLOW_LINKS", "1")
    assert [case.id for case in find_case_folders(chosen)[0]] == ["BraTS_1"]


def test_a_linked_folder_that_leaves_is_not_looked_into(tmp_path: Path) -> None:
    """Also where nothing in it would be taken, or would be refused for its name."""
    brats(tmp_path / "data" / "BraTS_1", "BraTS_1")
    save(tmp_path / "private" / "=Doe" / "=Doe.nii.gz", volume(0))
    (tmp_path / "data" / "more").symlink_to(tmp_path / "private")
    for read in (find_case_folders, read_dataset, find_images):
        with pytest.raises(UserError, match="data/more is a link that leaves the data folder") as told:
            read(tmp_path / "data")
        assert "Doe" not in str(told.value)


@pytest.mark.parametrize("kind", ["image", "label"])
def test_the_way_up_from_a_linked_folder_does_not_leave(phantoms: Path, tmp_path: Path, kind: str) -> None:
    """Written down, `link/..` is the folder that holds the link; opened, it is that above what the link points to."""
    data, private = Path(shutil.copytree(phantoms, tmp_path / "data")), tmp_path / "private"
    (private / "sub").mkdir(parents=True)
    shutil.copy(data / f"{kind}sTr" / "PHANTOM_000.nii.gz", private / "PHANTOM_000.nii.gz")
    (data / f"{kind}sTr" / "link").symlink_to(private / "sub")
    listing = json.loads((data / "dataset.json").read_text())
    listing["training"][0][kind] = f"./{kind}sTr/link/../PHANTOM_000.nii.gz"
    (data / "dataset.json").write_text(json.dumps(listing))
    with pytest.raises(UserError, match=r"link/\.\./PHANTOM_000\.nii\.gz is a link that leaves the data folder"):
        read_dataset(data)
    (data / f"{kind}sTr" / "link").unlink()
    (data / "deeper" / "sub").mkdir(parents=True)
    shutil.copy(private / "PHANTOM_000.nii.gz", data / "deeper" / "PHANTOM_000.nii.gz")
    (data / f"{kind}sTr" / "link").symlink_to(data / "deeper" / "sub")
    assert len(read_dataset(data).cases) == 5


@pytest.mark.parametrize("name", ["=1+1", "+1", "@SUM(A1)"])
def test_names_that_are_formulas_to_a_spreadsheet_are_refused(tmp_path: Path, name: str) -> None:
    words = f"spreadsheets take '{re.escape(name)}' for a formula: rename it"
    with pytest.raises(UserError, match=words):
        case_id(tmp_path / f"{name}.nii.gz")
    brats(tmp_path / "alone" / name, "x")
    brats(tmp_path / "together" / "b", name)
    brats(tmp_path / "together" / "b", "c")
    for folder in ("alone", "together"):
        with pytest.raises(UserError, match="for a formula: rename it"):
            find_case_folders(tmp_path / folder)
    assert [case_id(Path(f"{good}.nii")) for good in ("-1", "1", "a=b", " =1")] == ["-1", "1", "a=b", " =1"]


def test_folders_that_would_steer_a_terminal_are_told_in_plain_signs(tmp_path: Path) -> None:
    place = tmp_path / "x\x1b[31m"
    case = find_case_folders(brats(place / "BraTS_1", "BraTS_1"))[0][0]
    messages = []
    for what in SPOILT:
        brats(place / "BraTS_1", "BraTS_1")
        SPOILT[what][0](case)
        with pytest.raises(UserError) as told:
            read_scan(case, KNOWN["brats18"])
        messages.append(str(told.value))
    (place / "BraTS_1" / "BraTS_1_seg.nii.gz").unlink()
    for spoil in (lambda: None, lambda: case.images[0].unlink(), lambda: shutil.rmtree(place / "BraTS_1"),
                  lambda: (place / "dataset.json").write_text("{"), lambda: shutil.rmtree(place)):  # fmt: skip
        spoil()
        with pytest.raises(UserError) as told:
            read_dataset(place)
        messages.append(str(told.value))
    for message in messages:
        assert message.isprintable()
        assert "x\\x1b[31m" in message


def test_codings_of_brats_by_year(tmp_path: Path) -> None:
    names = ("t2f", "t1n", "t1c", "t2w")
    brats(tmp_path / "BraTS-GLI-00005-100", "BraTS-GLI-00005-100", names, "-seg", "-")
    data = read_dataset(tmp_path)
    assert data.label_map == KNOWN["brats23"]
    with pytest.raises(UserError, match=r"label code 4, .* brats24 where 4 is the cavity"):
        read_scan(data.cases[0], data.label_map)
    cavity = read_dataset(tmp_path, "brats24")
    found = read_scan(cavity.cases[0], cavity.label_map).label_XYZ
    np.testing.assert_array_equal(found, np.where(label() == 4, 0, label()))
    (tmp_path / "BraTS-GLI-00005-100").rename(tmp_path / "BraTS-PED-00005-000")
    with pytest.raises(UserError, match=r"by year: give --label-map brats23 .* or brats24ped"):
        read_dataset(tmp_path)
    children = read_dataset(tmp_path, "brats24ped")
    found = read_scan(children.cases[0], children.label_map).label_XYZ
    regions = children.label_map.regions(found)
    assert [int(region.sum()) for region in regions] == [2 * 35, 3 * 35, 35]  # 1 enhancing, 2 the rest, 4 oedema
    brats(tmp_path / "BraTS_1", "BraTS_1")
    (tmp_path / "BraTS-PED-00005-000").rename(tmp_path / "BraTS-GLI-00005-000")
    with pytest.raises(UserError, match="several years"):
        read_dataset(tmp_path)


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        ({"0": "background", "1": "NETC", "2": "SNFH", "3": "ET"}, "brats23"),
        ({"background": 0, "edema": 1, "non-enhancing tumor": 2, "enhancing tumour": 3}, "msd"),
        ({"1": "necrosis", "2": "edema", "3": "non-enhancing", "4": "enhancing"}, None),  # two codes of the core
    ],
)
def test_label_maps_from_words(labels: dict, wanted: str | None) -> None:
    found = from_names({str(key): str(value) for key, value in labels.items()})
    assert (found.name if found else None) == wanted


SPOILT: dict[str, tuple[Callable[[CaseFiles], object], str]] = {
    "a constant channel": (lambda c: save(c.images[1], (volume(1) > 0) * np.int16(7)), r"is one value, 7, .* \(T1w\)"),
    "an empty channel": (lambda c: save(c.images[1], volume(1) * np.int16(0)), r"is zero everywhere in a channel"),
    "a channel twice": (lambda c: shutil.copy(c.images[1], c.images[2]), "T1w and T1Gd are the same volume"),
    "metres": (lambda c: [save(path, volume(n), AFFINE * 1e-3) for n, path in enumerate(c.images)],
               r"voxels of 0\.001 x 0\.001 x 0\.001 mm: correct its header"),
    "an identity": (lambda c: save(c.label, label(), np.eye(4)), "states no place of its own: copy the affine"),
    "other axes": (lambda c: save(c.label, label()[::-1], AFFINE @ np.diag([-1.0, 1, 1, 1])), "reorient it"),
    "turned a little": (lambda c: save(c.label, label(), AFFINE + np.eye(4, k=1) * 0.05), "mm apart: resample it"),
    "between codes": (lambda c: save(c.label, label() + np.float32(0.4)), "with nearest neighbours"),
    "no number": (lambda c: save(c.label, np.where(label() > 1, np.nan, 1.0)), "with nearest neighbours"),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILT)
def test_what_would_be_learnt_wrongly_is_refused(what: str, case: CaseFiles) -> None:
    read_scan(case, KNOWN["brats18"])
    spoil, words = SPOILT[what]
    spoil(case)
    with pytest.raises(UserError, match=words):
        read_scan(case, KNOWN["brats18"])


def test_what_only_rounds_is_taken(case: CaseFiles) -> None:
    assert case.label is not None
    moved = AFFINE.copy()
    moved[0, 3] = 0.02  # of a millimetre, where voxels have one
    save(case.label, label().astype(np.float32) * np.float32(1.0015), moved)
    np.testing.assert_array_equal(read_scan(case, KNOWN["brats18"]).label_XYZ, label())


def test_vectors_and_channels_first(tmp_path: Path) -> None:
    stack = np.stack([volume(n) for n in range(4)], -1)
    path = save(tmp_path / "a.nii.gz", stack[:, :, :, None])
    found = read_scan(CaseFiles("a", (path,), None), KNOWN["msd"])
    np.testing.assert_array_equal(found.image_CXYZ, np.moveaxis(stack, -1, 0))
    save(path, np.moveaxis(stack, -1, 0))
    with pytest.raises(UserError, match="its channels first: move that axis to the end"):
        read_scan(CaseFiles("a", (path,), None), KNOWN["msd"])


def test_packed_or_not_whatever_the_name_says(case: CaseFiles) -> None:
    for path, change in ((case.images[0], gzip.decompress), (case.images[1], lambda content: content)):
        path.write_bytes(change(path.read_bytes()))
    plain = case.images[1].with_suffix("")
    case.images[1].rename(plain)
    found = read_scan(CaseFiles("a", (case.images[0], plain, *case.images[2:]), None), KNOWN["msd"])
    np.testing.assert_array_equal(found.image_CXYZ[:2], [volume(0), volume(1)])


def test_listings_from_windows(phantoms: Path, tmp_path: Path) -> None:
    """Marked as UTF-8, with its kind of paths, and modality as a list."""
    data = Path(shutil.copytree(phantoms, tmp_path / "data"))
    listing = json.loads((data / "dataset.json").read_text())
    listing["modality"] = ["FLAIR", "T1w", "T1gd", "T2w"]
    for entry in listing["training"]:
        entry.update({key: ".\\" + value.removeprefix("./").replace("/", "\\") for key, value in entry.items()})
    (data / "dataset.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(listing).encode())
    assert [case.id for case in read_dataset(data).cases] == [case.id for case in read_dataset(phantoms).cases]
