import nibabel as nib
import numpy as np
import pytest

from medseg import geometry
from medseg.geometry import Grid

ORIENTATIONS = ["RAS", "LPS", "LAS", "PIR", "SAL", "ASR"]


def affine_of(codes: str) -> np.ndarray:
    """An affine of that orientation with unequal spacing, a small tilt and an offset."""
    spacing = np.diag([0.9, 1.1, 1.3, 1.0])
    turn = nib.orientations.inv_ornt_aff(
        nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes)),
        (7, 8, 9),
    )
    tilt = np.eye(4)
    tilt[:2, :2] = [[np.cos(0.1), -np.sin(0.1)], [np.sin(0.1), np.cos(0.1)]]
    affine = tilt @ turn @ spacing
    affine[:3, 3] += [3, -20, 11]
    return affine


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_canonical_equals_nibabel_and_inverts(codes: str) -> None:
    array = np.random.default_rng(0).random((7, 8, 9)).astype(np.float32)
    affine = affine_of(codes)
    flips_axes = geometry.orientation(affine)
    canonical = geometry.to_canonical(array, flips_axes)
    peer = nib.as_closest_canonical(nib.Nifti1Image(array, affine))
    assert np.array_equal(canonical, peer.get_fdata(dtype=np.float32))
    assert np.array_equal(geometry.from_canonical(canonical, flips_axes), array)


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_voxel_sizes_go_with_the_canonical_axes(codes: str) -> None:
    affine = affine_of(codes)
    image = nib.as_closest_canonical(nib.Nifti1Image(np.zeros((7, 8, 9), np.uint8), affine))
    flips_axes = geometry.orientation(affine)
    nothing = (0, 0, 0)
    grid = Grid((7, 8, 9), tuple(map(tuple, affine.tolist())), tuple(map(tuple, flips_axes.tolist())), nothing,
                nothing, nothing, "")  # fmt: skip
    assert grid.voxel_mm == pytest.approx(image.header.get_zooms(), rel=1e-5)


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_paste_puts_the_crop_back_where_it_was(codes: str) -> None:
    label = np.zeros((7, 8, 9), np.uint8)
    label[2:5, 3:7, 4:8] = np.random.default_rng(0).integers(0, 4, (3, 4, 4))
    affine = affine_of(codes)
    flips_axes = geometry.orientation(affine)
    canonical = geometry.to_canonical(label, flips_axes)
    start, stop = geometry.bounding_box(canonical > 0, minimum=1)
    crop = canonical[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))]
    header = nib.Nifti1Image(label, affine).header
    grid = Grid((7, 8, 9), tuple(map(tuple, affine)), tuple(map(tuple, flips_axes.tolist())), start, stop, crop.shape,
                header.binaryblock.hex())  # fmt: skip
    grid = Grid.from_dict(grid.to_dict())
    back = geometry.paste(crop, grid)
    assert np.array_equal(back, label)
    image = geometry.to_nifti(back, grid)
    assert np.allclose(image.affine, affine)
    assert image.shape == label.shape
    with pytest.raises(ValueError, match="crop box"):
        geometry.paste(crop[1:], grid)


def test_bounding_box_grows_to_the_minimum_inside_the_volume() -> None:
    mask = np.zeros((20, 30, 6), bool)
    mask[0:2, 14:20, 3] = True
    assert geometry.bounding_box(mask, minimum=10) == ((0, 12, 0), (10, 22, 6))
    assert geometry.bounding_box(mask, minimum=1) == ((0, 14, 3), (2, 20, 4))
    mask[:] = False
    mask[19, 29, 5] = True
    assert geometry.bounding_box(mask, minimum=10) == ((10, 20, 0), (20, 30, 6))


def test_resampling_keeps_edges_and_constant_volumes() -> None:
    constant = np.full((1, 9, 7, 5), 3.0, np.float32)
    assert np.allclose(geometry.resample_image(constant, (5, 4, 3)), 3)
    ramp = np.broadcast_to(np.arange(16, dtype=np.float32)[:, None, None], (16, 4, 4))[None]
    half = geometry.resample_image(ramp, (8, 2, 2))[0, :, 0, 0]
    # voxel i of the coarse grid covers voxels 2i and 2i + 1, whose mean is 2i + .5
    assert np.allclose(half[1:-1], 2 * np.arange(8)[1:-1] + 0.5, atol=1e-4)


def test_label_resampling_takes_the_largest_share() -> None:
    label = np.zeros((4, 4, 4), np.uint8)
    label[:2] = 3
    small = geometry.resample_label(label, (2, 2, 2))
    assert (small[0] == 3).all()
    assert (small[1] == 0).all()
