"""The phantom series: reproducible bytes, a valid MSD folder, and the contrasts a glioma network relies on."""

import json

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from medseg.phantom import make_case, write_dataset

SHAPE, SPACING_MM = (48, 56, 40), 4.0


@pytest.fixture(scope="module")
def cases():
    return [make_case(7, index, shape=SHAPE, spacing_mm=SPACING_MM) for index in range(40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("phantom"), cases=3, seed=7, shape=SHAPE, spacing_mm=SPACING_MM)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lesion_mean(case, channel, *codes):
    return case.image_XYZC[..., channel][np.isin(case.label_XYZ, codes)].mean()


def to_ras(array, affine):
    return nib.apply_orientation(array, nib.io_orientation(affine))


def test_same_seed_writes_the_same_bytes_with_any_number_of_workers(folder, tmp_path):
    again = write_dataset(tmp_path / "new", cases=3, seed=7, shape=SHAPE, spacing_mm=SPACING_MM, workers=2)
    assert contents(again) == contents(folder)


def test_a_case_does_not_depend_on_the_number_of_cases(folder, tmp_path):
    fewer = contents(write_dataset(tmp_path, cases=2, seed=7, shape=SHAPE, spacing_mm=SPACING_MM))
    more = contents(folder)
    assert all(fewer[name] == more[name] for name in fewer if name != "dataset.json")


def test_another_seed_and_another_index_give_other_cases(cases):
    other = make_case(8, 0, shape=SHAPE, spacing_mm=SPACING_MM)
    assert not np.array_equal(other.label_XYZ, cases[0].label_XYZ)
    assert not np.array_equal(cases[1].label_XYZ, cases[0].label_XYZ)


def test_dataset_json_lists_every_case_in_msd_form(folder):
    description = json.loads((folder / "dataset.json").read_text())
    assert description["name"] == "PHANTOM"
    assert list(description["modality"].values()) == ["FLAIR", "T1w", "t1gd", "T2w"]
    assert list(description["labels"]) == ["0", "1", "2", "3"]
    assert description["numTraining"] == len(description["training"]) == 3
    listed = {entry[kind].removeprefix("./") for entry in description["training"] for kind in ("image", "label")}
    assert listed | {"dataset.json"} == set(contents(folder))


def test_files_hold_the_case_of_their_index(folder, cases):
    for index in range(3):
        image = nib.load(folder / "imagesTr" / f"PHANTOM_{index:03d}.nii.gz")
        label = nib.load(folder / "labelsTr" / f"PHANTOM_{index:03d}.nii.gz")
        assert image.get_data_dtype() == np.int16
        assert label.get_data_dtype() == np.uint8
        assert np.array_equal(np.asanyarray(image.dataobj), np.rint(cases[index].image_XYZC))
        assert np.array_equal(np.asanyarray(label.dataobj), cases[index].label_XYZ)
        for nifti in (image, label):
            assert nifti.header.get_xyzt_units()[0] == "mm"
            assert np.allclose(nifti.affine, cases[index].affine, atol=1e-3)
            assert np.allclose(nifti.get_qform(), cases[index].affine, atol=1e-3)


def test_progress_counts_every_case(tmp_path):
    calls = []
    write_dataset(tmp_path, cases=2, shape=(24, 28, 24), spacing_mm=8, progress=lambda *call: calls.append(call))
    assert calls == [(1, 2), (2, 2)]


def test_an_interrupted_rewrite_leaves_no_dataset_json(tmp_path):
    write_dataset(tmp_path, cases=1, shape=(24, 28, 24), spacing_mm=8)

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path, cases=3, shape=(24, 28, 24), spacing_mm=8, progress=stop)
    assert not (tmp_path / "dataset.json").exists()


def test_another_dataset_is_not_overwritten(tmp_path):
    (tmp_path / "dataset.json").write_text('{"name": "BRATS"}')
    with pytest.raises(FileExistsError, match="not a phantom"):
        write_dataset(tmp_path, cases=1, shape=SHAPE)
    assert set(contents(tmp_path)) == {"dataset.json"}


@pytest.mark.parametrize(
    "wrong",
    [{"cases": 0}, {"workers": 0}, {"seed": -1}, {"shape": (8, 56, 40)}, {"shape": (48, 56)}, {"spacing_mm": 0.0}],
)
def test_impossible_requests_are_refused_before_anything_is_written(tmp_path, wrong):
    with pytest.raises(ValueError, match="="):
        write_dataset(tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_codes_and_combinations_of_labels(cases):
    present = [frozenset(np.unique(case.label_XYZ).tolist()) - {0} for case in cases]
    assert all(codes and codes <= {1, 2, 3} for codes in present)
    assert {frozenset({1, 2, 3}), frozenset({1, 2}), frozenset({1, 3}), frozenset({2, 3})} <= set(present)


def test_background_is_exactly_zero_and_the_lesion_lies_in_the_brain(cases):
    for case in cases:
        brain = case.image_XYZC.min(axis=-1) > 0
        assert np.all(case.image_XYZC[~brain] == 0)
        assert case.image_XYZC[brain].min() >= 1
        assert 0.1 < brain.mean() < 0.4
        assert np.all(brain[case.label_XYZ > 0])
        assert 0.005 < (case.label_XYZ > 0).sum() / brain.sum() < 0.4
        maxima = case.image_XYZC.max(axis=(0, 1, 2))
        assert np.all((maxima > 399) & (maxima < 10001))


def test_lesions_show_in_the_channels_that_define_them(cases):
    for case in cases:
        brain = case.image_XYZC[..., 0] > 0
        healthy = np.median(case.image_XYZC[brain & (case.label_XYZ == 0)], axis=0)
        assert lesion_mean(case, 0, 1, 2, 3) > 1.2 * healthy[0]
        assert lesion_mean(case, 3, 1, 2, 3) > 1.1 * healthy[3]
        if np.any(case.label_XYZ == 3):
            assert lesion_mean(case, 2, 3) > 1.1 * healthy[2]
        if {2, 3} <= set(np.unique(case.label_XYZ)):
            assert lesion_mean(case, 2, 3) > 1.2 * lesion_mean(case, 2, 2)
            assert lesion_mean(case, 1, 2) < healthy[1]


def test_the_core_lies_inside_rim_and_oedema(cases):
    nested = [case for case in cases if set(np.unique(case.label_XYZ)) == {0, 1, 2, 3}]
    assert len(nested) > 10
    for case in nested:
        core = case.label_XYZ == 2
        shell = case.label_XYZ[ndimage.binary_dilation(core) & ~core]
        assert np.mean(shell == 3) > 0.6
        assert (case.label_XYZ > 0).sum() > np.isin(case.label_XYZ, (2, 3)).sum() > (case.label_XYZ == 3).sum()


def test_affines_vary_and_put_the_anatomy_upright(cases):
    codes = {"".join(nib.aff2axcodes(case.affine)) for case in cases}
    assert codes == {"LPS", "RAS", "PIR"}
    assert any(np.count_nonzero(np.abs(case.affine[:3, :3]) > 1e-6) > 3 for case in cases)
    for case in cases:
        edges_mm = np.linalg.norm(case.affine[:3, :3], axis=0)
        assert np.all(np.abs(edges_mm / SPACING_MM - 1) < 0.041)
        assert np.allclose(np.linalg.inv(case.affine) @ case.affine, np.eye(4))
        brain_XYZ = to_ras(case.image_XYZC[..., 0] > 0, case.affine)
        assert brain_XYZ.shape == SHAPE
        # Only the brain stem and cerebellum reach the lowest slices, and they sit behind the middle.
        lowest = np.argwhere(brain_XYZ)
        lowest = lowest[lowest[:, 2] < lowest[:, 2].min() + 4]
        assert lowest[:, 1].mean() < SHAPE[1] / 2
        assert np.ptp(lowest[:, 0]) < 0.8 * np.ptp(np.argwhere(brain_XYZ)[:, 0])
