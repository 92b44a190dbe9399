"""Damaged and hostile scans and listings: one sentence that names the file, exit code 2, nothing half-written."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hostile import (
    CASE,
    IMAGE,
    LABEL,
    LISTING,
    SHAPE,
    brats_folder,
    dim,
    label,
    listing,
    msd_folder,
    nested,
    nifti,
    rewritten,
    scan,
    with_header,
)
from launch_helpers import check_refused, in_this_process, run_main

from medseg.cache import Cache
from medseg.geometry import Grid, paste, to_nifti
from medseg.preparation import Preparation, prepare_dataset

Change = Callable[[Path], object]


def image(change: Callable[[bytes], bytes], *, packed: bool = True, place: str = IMAGE) -> Change:
    """Change the image's bytes."""
    return lambda data: rewritten(data / place, change, packed=packed)


def header(place: str = IMAGE, **fields: Any) -> Change:
    """Change fields of the image's header."""
    return image(lambda raw: with_header(raw, **fields), place=place)


def voxels(array: np.ndarray, place: str = IMAGE) -> Change:
    """Put another array in a file's place."""
    return image(lambda raw: nifti(array), place=place)


def labels(values: np.ndarray) -> Change:
    """Put another array in the label's place."""
    return voxels(values, LABEL)


def with_value(value: float, dtype: Any) -> np.ndarray:
    codes = label().astype(dtype)
    codes[5, 5, 5] = value
    return codes


def folder_instead(data: Path, place: str = IMAGE) -> None:
    (data / place).unlink()
    (data / place).mkdir()


def extension(size: int) -> Change:
    """A header extension that says it has `size` bytes."""
    code = np.array([size, 6], np.int32).tobytes() + bytes(16)
    return image(lambda raw: with_header(raw[:348], vox_offset=352 + 24) + b"\1\0\0\0" + code + raw[352:])


RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
AFFINE = np.eye(4)
NAN, INF = float("nan"), float("inf")
SCANS: dict[str, tuple[Change, str]] = {
    "more voxels than there are": (header(dim=dim(10, 12, 9, 4)), "cut short"),
    "2^60 voxels": (header(dim=dim(32767, 32767, 32767, 4)), "voxels"),
    "many voxels of zeros, packed": (
        lambda d: (d / IMAGE).write_bytes(gzip.compress(with_header(nifti(scan()), dim=dim(999, 999, 99, 4)))),
        "cut short",
    ),
    "no axis": (header(dim=np.zeros(8, np.int16)), "shape|damaged"),
    "an axis of length 0": (header(dim=dim(10, 0, 8, 4)), "shape|damaged"),
    "a negative axis": (header(dim=dim(10, -12, 8, 4)), "shape|damaged"),
    "nine axes": (header(dim=np.array([9, *[1] * 7], np.int16)), "shape|damaged"),
    "unknown type": (header(datatype=7777), "damaged|type"),
    "another type than it is": (header(datatype=64, bitpix=64), "cut short"),
    "RGB": (lambda d: rewritten(d / IMAGE, lambda raw: nifti(np.zeros((*SHAPE, 4), RGB))), "voxels"),
    "complex": (voxels(scan().astype(np.complex64)), "complex64 voxels"),
    "128-bit floats": (header(dim=dim(10, 12, 4, 1), datatype=1536, bitpix=128), "float128 voxels|data code 1536"),
    "slope NaN": (header(scl_slope=NAN, scl_inter=1.0), "scl_slope|damaged"),
    "slope infinite": (header(scl_slope=INF), "scl_slope|damaged"),
    "intercept NaN": (header(scl_slope=1.0, scl_inter=NAN), "scl_inter|damaged"),
    "intercept infinite": (header(scl_slope=1.0, scl_inter=INF), "scl_inter|damaged"),
    "slope beyond float32": (header(scl_slope=3e38), "NaN or infinite"),
    "offset beyond the file": (header(vox_offset=1e9), "cut short|damaged"),
    "offset NaN": (header(vox_offset=NAN), "damaged|vox_offset"),
    "offset infinite": (header(vox_offset=INF), "damaged|vox_offset"),
    "offset negative": (header(vox_offset=-16.0), "damaged|vox_offset"),
    "offset in the header": (header(vox_offset=16.0), "damaged|vox_offset"),
    "wrong magic": (header(magic=b"xyz"), "damaged|NIfTI"),
    "a pair's header": (header(magic=b"ni1"), "damaged|NIfTI"),
    "header of 100 bytes": (header(sizeof_hdr=100), "damaged|NIfTI"),
    "five axes": (voxels(scan()[..., None, :].repeat(2, 3)), "not \\(X, Y, Z, 4\\)"),
    "one channel, with an axis of length 1": (voxels(scan(1)), "all four channels"),
    "three axes": (voxels(scan()[..., 0]), "not \\(X, Y, Z, 4\\)"),
    "three channels": (voxels(scan(3)), "not \\(X, Y, Z, 4\\)"),
    "one voxel thick": (voxels(scan()[:1]), "grid|zero everywhere"),
    "NaN everywhere": (voxels(np.full((*SHAPE, 4), NAN, np.float32)), "NaN or infinite"),
    "one infinite voxel": (voxels(np.where(scan() == scan().max(), INF, scan()).astype(np.float32)), "NaN or inf"),
    "zero everywhere": (voxels(np.zeros((*SHAPE, 4), np.int16)), "zero everywhere"),
    "one channel zero": (voxels(scan() * np.array([1, 1, 0, 1], np.int16)), "zero everywhere"),
    "affine singular": (header(sform_code=1, srow_y=np.zeros(4, np.float32)), "not invertible"),
    "affine NaN": (header(sform_code=1, srow_x=np.full(4, NAN, np.float32)), "not invertible"),
    "affine infinite": (header(sform_code=1, srow_x=np.full(4, INF, np.float32)), "not invertible"),
    "quaternion NaN": (header(sform_code=0, qform_code=1, quatern_b=NAN), "not invertible|damaged"),
    "voxels of no size": (header(sform_code=0, qform_code=1, pixdim=np.zeros(8, np.float32)), "not invertible|damaged"),
    "empty": (lambda d: (d / IMAGE).write_bytes(b""), "damaged|empty"),
    "empty when unpacked": (lambda d: (d / IMAGE).write_bytes(gzip.compress(b"")), "damaged|cut short"),
    "half a header": (image(lambda raw: raw[:200]), "damaged|cut short"),
    "header only": (image(lambda raw: raw[:352]), "cut short"),
    "truncated gzip": (image(lambda raw: raw[: len(raw) // 2], packed=False), "cut short"),
    "a flipped bit in gzip": (image(lambda raw: raw[:90] + bytes([raw[90] ^ 4]) + raw[91:], packed=False), "damaged"),
    "wrong gzip checksum": (image(lambda raw: raw[:-8] + b"\0\0\0\0" + raw[-4:], packed=False), "damaged"),
    "garbage after gzip": (image(lambda raw: raw + b"garbage", packed=False), "damaged"),
    "a text": (lambda d: (d / IMAGE).write_text("a text\nof two lines\n"), "damaged"),
    "a folder": (folder_instead, "is not there|not a file"),
    "a pipe": (lambda d: ((d / IMAGE).unlink(), os.mkfifo(d / IMAGE)), "is not there|not a file"),
    "label of fractions": (labels(with_value(1.5, np.float32)), "between codes"),
    "label NaN": (labels(with_value(NAN, np.float32)), "between codes"),
    "label of unknown codes": (labels(with_value(200, np.uint8)), "label code 200"),
    "label 256": (labels(with_value(256, np.int16)), "label code 256"),
    "label negative": (labels(with_value(-1, np.int16)), "label code -1"),
    "label of another shape": (labels(label()[:, 1:]), "one grid"),
    "label of four axes": (labels(label()[..., None].repeat(2, -1)), "one grid"),
    "label on another grid": (header(LABEL, sform_code=1, srow_x=np.array([9, 0, 0, 0], np.float32)), "another grid"),
    "label empty": (lambda d: (d / LABEL).write_bytes(b""), "damaged|empty"),
    "label a folder": (lambda d: folder_instead(d, LABEL), "is not there|not a file"),
}  # fmt: skip


def json_text(**changes: Any) -> Change:
    """Other values in dataset.json."""
    return lambda data: (data / LISTING).write_text(json.dumps(listing(**changes)))


def one_case(image: Any = f"./{IMAGE}", label: Any = f"./{LABEL}") -> Change:
    """Other paths in dataset.json."""
    return json_text(training=[{"image": image, "label": label}])


def text(content: str | bytes) -> Change:
    """Another dataset.json."""
    return lambda data: (data / LISTING).write_bytes(content if isinstance(content, bytes) else content.encode())


def link(data: Path, inside: str, outside: str) -> None:
    """Move what lies at `inside` out of the data folder, and put a link in its place."""
    place = data.parent / outside
    place.parent.mkdir(parents=True, exist_ok=True)
    (data / inside).rename(place)
    (data / inside).symlink_to(place)


LISTINGS: dict[str, tuple[Change, str]] = {
    "not JSON": (text("{"), "MSD form"),
    "empty": (text(""), "MSD form"),
    "nested 100000 deep": (text(nested(100000)), "MSD form"),
    "nested in a value": (text(json.dumps(listing())[:-1] + f', "x": {nested(99999)}}}'), "MSD form"),
    "not UTF-8": (text(b'{"training": "\xff\xfe"}'), "MSD form"),
    "a number of 10000 digits": (text(f'{{"training": {"9" * 10000}}}'), "MSD form"),
    "a list": (text("[]"), "MSD form"),
    "null": (text("null"), "MSD form"),
    "200 MB of spaces": (lambda d: os.truncate(d / LISTING, 200 << 20), "MB|MSD form"),
    "no training": (text(json.dumps({k: v for k, v in listing().items() if k != "training"})), "MSD form"),
    "training a number": (json_text(training=3), "MSD form"),
    "training a text": (json_text(training="abc"), "MSD form"),
    "training an object": (json_text(training={"image": "x"}), "MSD form"),
    "training NaN": (json_text(training=NAN), "MSD form"),
    "training null": (json_text(training=None), "MSD form"),
    "training empty": (json_text(training=[]), "no training case"),
    "a case is a text": (json_text(training=["x"]), "MSD form"),
    "an image is a list": (one_case([IMAGE]), "MSD form"),
    "an image is a number": (one_case(7), "MSD form"),
    "an image is NaN": (one_case(NAN), "MSD form"),
    "an image is null": (one_case(None), "MSD form"),
    "a path of 5000 letters": (one_case("x" * 5000 + ".nii.gz"), "not there"),
    "a path with a line break": (one_case("x\ny.nii.gz"), "not there"),
    "a path with a zero byte": (one_case("x\0y.nii.gz"), "not there"),
    "a path with half a character": (one_case("x\ud800y.nii.gz"), "MSD form|not there"),
    "a path with an escape sequence": (one_case("x\x1b[31m.nii.gz"), "not there"),
    "an empty path": (one_case(""), "not there|MSD form"),
    "a path out of the folder": (one_case("../other/x.nii.gz"), "outside the data folder"),
    "a path out of the folder, inside": (one_case(f"imagesTr/../../data/../{IMAGE}"), "outside the data folder"),
    "an absolute path": (one_case("/etc/passwd"), "outside the data folder"),
    "a label out of the folder": (one_case(label="../x.nii.gz"), "outside the data folder"),
    "an image is a link that leaves": (lambda d: link(d, IMAGE, "elsewhere/x.nii.gz"), "leaves the data folder"),
    "a label is a link that leaves": (lambda d: link(d, LABEL, "elsewhere/x.nii.gz"), "leaves the data folder"),
    "a folder is a link that leaves": (lambda d: link(d, "imagesTr", "elsewhere"), "leaves the data folder"),
    "a link to itself": (lambda d: ((d / IMAGE).unlink(), (d / IMAGE).symlink_to(d / IMAGE)), "not there"),
    "two files are not there": (lambda d: ((d / IMAGE).unlink(), (d / LABEL).unlink()), "and 1 more are missing"),
    "twice the same case": (json_text(training=listing()["training"] * 2), "two cases named"),
    "not NIfTI by name": (one_case(LISTING), "NIfTI file by name"),
    "a case without a name": (
        lambda d: ((d / IMAGE).rename(d / ".nii.gz"), one_case(".nii.gz")(d)),
        "no name of a case",
    ),
    "a case named .": (lambda d: ((d / IMAGE).rename(d / "..nii.gz"), one_case("..nii.gz")(d)), "no name of a case"),
    "modality a list": (json_text(modality=["T1w", "FLAIR", "T1gd", "T2w"]), "where FLAIR belongs"),
    "modality empty": (json_text(modality={}), "MSD form|channels"),
    "a channel's name is long": (json_text(modality={"0": "x" * 9999, "1": "a", "2": "b", "3": "c"}), "channel"),
    "1000 channels": (json_text(modality={str(n): "FLAIR" for n in range(1000)}), "channels"),
    "labels a list": (json_text(labels=["a"]), "MSD form"),
    "labels of 9999 digits": (
        json_text(labels={"1": "edema", "2": "necrosis", "9" * 9999: "enhancing tumour"}),
        "--label-map",
    ),
    "a label above 255": (json_text(labels={"1": "edema", "2": "necrosis", "300": "enhancing"}), "--label-map"),
    "tumour is 0": (json_text(labels={"0": "edema", "2": "necrosis", "3": "enhancing"}), "--label-map"),
    "10000 labels": (json_text(labels={str(n): "x" for n in range(10000)}), "--label-map"),
    "a label's name is long": (json_text(labels={"1": "x" * 9999}), "--label-map"),
    "dataset.json is a folder": (lambda d: ((d / LISTING).unlink(), (d / LISTING).mkdir()), "dataset.json"),
}


def _refused(change: Change, words: str, data: Path, named: str, out: Path, capfd: Any) -> None:
    change(data)
    code = run_main("prepare", "brats", "--data", data, "--out", out / "c.h5", "--workers", 1)
    check_refused(code, capfd.readouterr().err, named, words, out)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medseg.preparation.in_processes", in_this_process)


@pytest.mark.parametrize("name", SCANS)
def test_scans(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change, words = SCANS[name]
    _refused(change, words, msd_folder(tmp_path / "data"), f"{CASE}.nii.gz", tmp_path / "out", capfd)


@pytest.mark.parametrize("name", LISTINGS)
def test_listings(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change, words = LISTINGS[name]
    _refused(change, words, msd_folder(tmp_path / "data"), str(tmp_path / "data"), tmp_path / "out", capfd)


def case(name: str) -> str:
    return f"BraTS_1/BraTS_1_{name}.nii.gz"


BRATS: dict[str, tuple[Change, str]] = {
    "a channel is missing": (lambda d: (d / case("t1ce")).unlink(), "no T1Gd file"),
    "the label is missing": (lambda d: (d / case("seg")).unlink(), "no \\*_seg file"),
    "two of a channel": (
        lambda d: (d / "BraTS_1/BraTS_1_t1.nii").write_bytes(nifti(scan()[..., 0])),
        "two T1w files of one case",
    ),
    "a channel of another case": (
        lambda d: (d / "BraTS_1/again_t1.nii").write_bytes(nifti(scan()[..., 0])),
        "again\\* has no FLAIR file",
    ),
    "a channel of another shape": (voxels(scan()[1:, ..., 0], case("t2")), "register the channels"),
    "a channel of four axes": (voxels(scan(), case("flair")), "a file of its own"),
    "a channel on another grid": (header(case("t2"), sform_code=1, srow_x=np.array([-1, 0, 0, 0])), "another grid"),
    "a channel cut short": (image(lambda raw: raw[:90], packed=False, place=case("t1")), "cut short"),
    "a channel is a folder": (lambda d: folder_instead(d, case("t1")), "has no T1w file"),
    "a channel is a link that leaves": (lambda d: link(d, case("t1"), "elsewhere/x.nii.gz"), "leaves the data folder"),
    "a channel is a broken link": (
        lambda d: ((d / case("t1")).unlink(), (d / case("t1")).symlink_to(d / "none")),
        "not there",
    ),
    "two folders of one name": (
        lambda d: ((d / "b").mkdir(), brats_folder(d / "b")),
        "two cases named BraTS_1",
    ),
    "a folder with a line break": (lambda d: (d / "BraTS_1").rename(d / "a\nb"), "no name of a case"),
    "a folder that is not UTF-8": (
        lambda d: os.rename(os.fsencode(d / "BraTS_1"), os.fsencode(d) + b"/a\xff"),
        "no name of a case",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BRATS)
def test_case_folders(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change, words = BRATS[name]
    _refused(change, words, brats_folder(tmp_path / "data"), str(tmp_path / "data"), tmp_path / "out", capfd)


TOLERATED: dict[str, Change] = {
    "nothing": lambda data: None,
    "bits unlike the type": header(bitpix=32),
    "extension of 2 GB": extension(2**31 - 16),
    "extension of less than nothing": extension(-8),
    "no slope, as nibabel writes it": header(scl_slope=NAN, scl_inter=NAN),
    "no slope, as the standard says": header(scl_slope=0.0, scl_inter=5.0),
    "other byte order": image(lambda raw: nib.Nifti1Header(raw[:348]).as_byteswapped(">").binaryblock
                              + b"\0" * 4 + scan().astype(">i2").tobytes("F")),
    "vectors": voxels(scan()[..., None, :]),
    "not packed, but so named": image(lambda raw: nifti(scan()), packed=False),
    "links that stay": lambda d: ((d / IMAGE).rename(d / "x.gz"), (d / IMAGE).symlink_to(d / "x.gz")),
    "axes of length 1": lambda d: (voxels(scan()[..., None])(d), labels(label()[..., None, None])(d)),
    "no compression": lambda d: ((d / "imagesTr" / f"{CASE}.nii").write_bytes(nifti(scan())),
                                 one_case(f"imagesTr/{CASE}.nii")(d)),
}  # fmt: skip


@pytest.mark.parametrize("name", TOLERATED)
def test_what_does_no_harm_changes_nothing(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = msd_folder(tmp_path / "data")
    TOLERATED[name](data)
    assert run_main("prepare", "brats", "--data", data, "--out", tmp_path / "c.h5", "--workers", 1) == 0
    assert capfd.readouterr().err == ""
    wanted = scan()[1:-1, 1:-1, 1:-1].astype(np.float32)
    image = Cache(tmp_path / "c.h5").read(CASE, "image").astype(np.float32)[:, 1:-1, 1:-1, 1:-1]
    spread = wanted.std((0, 1, 2))
    assert np.abs(image - np.moveaxis((wanted - wanted.mean((0, 1, 2))) / spread, 3, 0)).max() < 2e-3


def test_channels_with_a_fourth_axis_of_length_1(tmp_path: Path) -> None:
    """A flat axis is dropped from each file; the answer has the three axes of the scan."""
    plain, flat = brats_folder(tmp_path / "plain"), brats_folder(tmp_path / "flat")
    for path in flat.rglob("*.nii.gz"):
        array = np.asarray(nib.load(path).dataobj)
        path.write_bytes(gzip.compress(nifti(array[..., None]), 1))
    opened = [Cache(prepare_dataset(data, tmp_path / f"{data.name}.h5", Preparation())) for data in (plain, flat)]
    for name in ("image", "label"):
        assert np.array_equal(*(cache.read("BraTS_1", name) for cache in opened))
    grid = Grid.from_dict(opened[1].facts("BraTS_1")["grid"])
    answer = to_nifti(paste(opened[1].read("BraTS_1", "label"), grid), grid)
    assert answer.shape == grid.shape_XYZ == SHAPE


def test_links_out_of_the_folder_by_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = msd_folder(tmp_path / "data")
    link(data, IMAGE, "elsewhere/x.nii.gz")
    monkeypatch.setenv("MEDTRAIN_FOLLOW_LINKS", "1")
    assert run_main("prepare", "brats", "--data", data, "--out", tmp_path / "c.h5", "--workers", 1) == 0
