"""The synthetic pictures: reproducible bytes, copies that are as listed, classes told by shape and not by colour."""

import ast
import csv
import re
from collections import Counter

import imagehash
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import cross_val_score

from medcls.phantom import CANCERS, COPY_KINDS, make_image, write_dataset

CLASSES = [(cancer, kind) for cancer, kinds in CANCERS.items() for kind in kinds]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("pictures"), images=12, size=96, seed=3, copies=0.5)


@pytest.fixture(scope="module")
def truth(folder):
    with open(folder / "phantom_truth.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def grey(path):
    return np.asarray(Image.open(path).convert("L")).astype(float)  # JPEG blurs colour more


def difference(a, b):
    return np.abs(a - b).mean()


def test_same_arguments_write_the_same_bytes_with_any_number_of_workers(folder, tmp_path):
    again = write_dataset(tmp_path / "new", images=12, size=96, seed=3, copies=0.5, workers=3)
    assert contents(again) == contents(folder)


def test_a_picture_is_a_function_of_its_arguments():
    for cancer, kind in CLASSES:
        image = make_image(1, cancer, kind, 4, size=64)
        assert (image.shape, image.dtype) == ((64, 64, 3), np.uint8)
        assert np.array_equal(image, make_image(1, cancer, kind, 4, size=64))
        for other in ((2, cancer, kind, 4), (1, cancer, kind, 5)):
            assert not np.array_equal(image, make_image(*other, size=64))


def test_folders_and_counts(folder, truth):
    names = {f"{c}/{kind}/{kind}_{number:04d}.jpg" for c, kind in CLASSES for number in range(1, 13)}
    assert set(contents(folder)) == names | {"phantom_truth.csv"}
    assert Counter(row["path"].split("/")[1] for row in truth) == {kind: 6 for _, kind in CLASSES}
    copies = {row["path"] for row in truth}
    assert {row["source"] for row in truth} <= names - copies
    assert all(row["source"].rsplit("/", 1)[0] == row["path"].rsplit("/", 1)[0] for row in truth)
    assert max(Counter(row["source"] for row in truth).values()) <= 3


def test_every_copy_relates_to_its_source_as_listed(folder, truth):
    assert {row["kind"] for row in truth} == set(COPY_KINDS)
    for row in truth:
        copy, source = grey(folder / row["path"]), grey(folder / row["source"])
        assert (contents(folder)[row["path"]] == contents(folder)[row["source"]]) == (row["kind"] == "exact")
        cancer, kind, name = row["source"].split("/")
        made = Image.fromarray(make_image(3, cancer, kind, int(name[-8:-4]) - 1, size=96)).convert("L")
        assert difference(source, np.asarray(made)) < 6
        if row["kind"] == "flip":
            assert min(difference(copy, np.flip(source, axis)) for axis in (0, 1)) < 6 < difference(copy, source)
        elif row["kind"] == "turn":
            assert min(difference(copy, np.rot90(source, turns)) for turns in (1, 2, 3)) < 6 < difference(copy, source)
        elif row["kind"] in ("brightness", "jpeg"):
            assert difference(copy, np.clip(copy.mean() / source.mean() * source, 0, 255)) < 13
        elif row["kind"] == "resize":
            assert difference(copy, source.reshape(48, 2, 48, 2).mean((1, 3))) < 6
        elif row["kind"] != "exact":
            assert difference(copy, source) > 1


def test_originals_are_far_apart_however_they_are_turned():
    for cancer, kind in CLASSES:
        images = [make_image(0, cancer, kind, index) for index in range(16)]
        views = [[np.rot90(i, t) for i in images] for t in range(4)]
        views += [[np.flip(i, 1) for i in view] for view in views]
        hashes = [[imagehash.phash(Image.fromarray(i), 16).hash.ravel() for i in view] for view in views]
        distance = (np.array(hashes)[:, :, None] != np.array(hashes[0])).sum(axis=-1).min(axis=0)
        assert distance[~np.eye(16, dtype=bool)].min() > 32


def test_a_file_that_is_there_is_not_remade_and_the_list_comes_last(tmp_path):
    def stop(done, total):
        assert total == 6
        raise KeyboardInterrupt

    small = {"images": 2, "size": 32, "cancers": ["Brain Cancer"]}
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path, **small, progress=stop)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jpg")}
    assert before
    assert not (tmp_path / "phantom_truth.csv").exists()
    write_dataset(tmp_path, **small)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    with pytest.raises(FileExistsError, match="other arguments"):
        write_dataset(tmp_path, **{**small, "images": 9}, copies=0.5)


def brightest_place(image):
    """Where in the head the brightest blobs of two widths lie, and how far they stand out."""
    grey = ndimage.gaussian_filter(image.mean(axis=-1), 1.5)
    head = ndimage.find_objects(grey > 0.35 * np.percentile(grey, 90), max_label=1)[0]
    y, x = (2 * (i - s.start + 0.5) / (s.stop - s.start) - 1 for i, s in zip(np.indices(grey.shape), head, strict=True))
    brain = np.hypot(x, y) < 0.8
    grey = np.where(brain, grey / np.median(grey[brain]), 1)
    blobs = [ndimage.gaussian_filter(grey, width) - ndimage.gaussian_filter(grey, 2 * width) for width in (2.5, 5)]
    return np.ravel([(abs(x.flat[b.argmax()]), y.flat[b.argmax()], b.max(), b.min()) for b in blobs])


def wavelengths(image):
    """Logarithm of the power per spatial frequency: how regular and how large the nuclei are."""
    grey = image.mean(axis=-1)
    power = np.fft.fftshift(np.abs(np.fft.fft2(grey - grey.mean())) ** 2) / grey.var()
    ring = np.hypot(*(np.indices(power.shape) - 48)).astype(int)
    return np.log(np.bincount(ring.ravel(), power.ravel())[1:40])


@pytest.mark.parametrize(("cancer", "shape"), zip(CANCERS, (brightest_place, wavelengths), strict=True))
def test_shape_tells_the_class_and_colour_does_not(cancer, shape):
    kinds, model = CANCERS[cancer], RandomForestClassifier(100, random_state=0)
    images = [make_image(5, cancer, kind, index, size=96) for kind in kinds for index in range(80)]
    target = np.repeat(range(len(kinds)), 80)
    colours = [np.concatenate([np.histogram(image[..., c], 16, (0, 256))[0] for c in range(3)]) for image in images]
    by_colour, by_shape = (cross_val_score(model, f, target).mean() for f in (colours, [shape(i) for i in images]))
    assert by_colour < min(1 / len(kinds) + 0.22, by_shape - 0.12)


@pytest.mark.parametrize("name", ["seed=-1", "size=31", "images=0", "workers=0", "copies=0.9", "cancers=['Lung']"])
def test_impossible_requests_are_refused_before_anything_is_written(tmp_path, name):
    with pytest.raises(ValueError, match=re.escape(name)):
        write_dataset(tmp_path / "out", **{name.split("=")[0]: ast.literal_eval(name.split("=")[1])})
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="="):
        make_image(0, "Oral Cancer", "brain_menin", 0)
