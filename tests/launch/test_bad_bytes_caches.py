"""Damaged and hostile caches: one sentence that names the file, exit code 2, no run folder."""

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import TINY, TINY_IMAGES
from hostile import nested
from launch_helpers import check_refused, run_main

from medcls.cache import COLUMN_TYPES
from medtrain import hdf5
from medtrain.cache import checksum

Change = Callable[[Path], object]
CASE = "PHANTOM_000"


def edit(change: Callable[[Any], object], libver: Any = "latest") -> Change:
    """Change the opened HDF5 file."""

    def apply(path: Path) -> None:
        with h5py.File(path, "r+", libver=libver) as file:
            change(file)
            if "columns" in file.attrs:  # as a hostile writer would, who can count
                names = [name for name in COLUMN_TYPES if isinstance(file.get(name), h5py.Dataset)]
                sums = {name: checksum([(name, file[name][()])]) for name in names if file[name].chunks is None}
                file.attrs["columns"] = hdf5.text(json.dumps(sums))

    return apply


def attribute(name: str, value: Any, place: str = "/") -> Change:
    """Put another attribute in its place; None removes it."""

    def apply(file: Any) -> None:
        if value is None:
            del file[place].attrs[name]
        else:
            file[place].attrs[name] = hdf5.text(value) if isinstance(value, str) else value

    return edit(apply)


def replaced(name: str, value: Any, **options: Any) -> Change:
    """Another dataset under a name; None removes it."""

    def apply(file: Any) -> None:
        del file[name]
        if value is not None:
            file.create_dataset(name, data=value, **options)

    return edit(apply)


def changed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    """A dataset with other values, types or shapes."""

    def apply(file: Any) -> None:
        values = change(file[name][()])
        del file[name]
        file[name] = values

    return edit(apply)


def outside(name: str, make: Callable[[Any, str, Path], object]) -> Change:
    """What lies under a name is moved to another file, and `make` puts a way to it in its place."""

    def apply(path: Path) -> None:
        other = path.with_name("other.h5")
        with h5py.File(path, "r+") as file, h5py.File(other, "w") as aside:
            file.copy(name, aside, "x")
            del file[name]
            make(file, name, other)

    return apply


def external(file: Any, name: str, other: Path) -> None:
    file[name] = h5py.ExternalLink(str(other), "/x")


def virtual(file: Any, name: str, other: Path) -> None:
    with h5py.File(other) as aside:
        shape, dtype = aside["x"].shape, aside["x"].dtype
    layout = h5py.VirtualLayout(shape, dtype)
    layout[...] = h5py.VirtualSource(str(other), "x", shape)
    file.create_virtual_dataset(name, layout)


def raw(file: Any, name: str, other: Path) -> None:
    with h5py.File(other) as aside:
        shape, dtype = aside["x"].shape, aside["x"].dtype
    file.create_dataset(name, shape, dtype, external=[("/etc/passwd", 0, 1 << 40)])


def soft(name: str) -> Change:
    """A name that only points to another name, which does not have to be there."""
    return edit(lambda file: (file.move(name, "aside"), file.__setitem__(name, h5py.SoftLink("/aside"))))


def bomb(name: str, shape: tuple[int, ...], dtype: str) -> Change:
    """A dataset whose few chunks say they unpack to terabytes."""

    def apply(file: Any) -> None:
        del file[name]
        made = file.create_dataset(name, shape, dtype, chunks=tuple(min(64, n) for n in shape), compression="gzip",
                                   shuffle=True)  # fmt: skip
        made[tuple(slice(0, 1) for _ in shape)] = 1

    return edit(apply)


def repacked(name: str, chunk: bytes = b"", skipped: int = 0, **options: Any) -> Change:
    """A dataset packed as caches are, or by other options, whose first chunk has other bytes where any are given."""

    def apply(file: Any) -> None:
        values = file[name][()]
        del file[name]
        usual = {"chunks": tuple(min(64, n) for n in values.shape), "compression": "gzip", "shuffle": True}
        made = file.create_dataset(name, data=values, **{**usual, **options})
        if chunk:
            made.id.write_direct_chunk((0,) * values.ndim, chunk, filter_mask=skipped)

    return edit(apply)


def packed_twice(name: str) -> Change:
    """A dataset that goes through deflate two times, of which h5py's `compression` tells nothing."""

    def apply(file: Any) -> None:
        values = file[name][()]
        del file[name]
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_chunk(tuple(min(64, n) for n in values.shape))
        for _ in range(2):
            plan.set_deflate(9)
        kind, space = h5py.h5t.py_create(values.dtype), h5py.h5s.create_simple(values.shape)
        h5py.Dataset(h5py.h5d.create(file.id, name.encode(), kind, space, plan))[...] = values

    return edit(apply)


def cut(share: float) -> Change:
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def flipped(at: float, count: int = 64) -> Change:
    """Some bytes turned over."""

    def apply(path: Path) -> None:
        content = bytearray(path.read_bytes())
        start = int(len(content) * at)
        for n in range(start, start + count):
            content[n] ^= 0xFF
        path.write_bytes(content)

    return apply


ANY: dict[str, tuple[Change, str]] = {
    "empty": (lambda p: p.write_bytes(b""), "not an HDF5 file"),
    "a text": (lambda p: p.write_text("hello"), "not an HDF5 file"),
    "a quarter": (cut(0.25), "cut short|damaged"),
    "all but the last bytes": (cut(0.999), "cut short|damaged"),
    "superblock": (flipped(0, 16), "not an HDF5 file"),
    "of another program": (attribute("format", None), "another program"),
    "an attribute in a heap": (edit(lambda f: f.attrs.__setitem__("format", "medtrain-cache")), "earlier version"),
    "format of another type": (attribute("format", np.arange(9)), "another program"),
    "of another version": (attribute("version", 7), "version 7"),
    "version a list": (attribute("version", [1, 2]), "version"),
    "version a text": (attribute("version", "x" * 4000), "version"),
    "no kind": (attribute("kind", None), "kind None"),
    "unknown kind": (attribute("kind", "x" * 4000), "kind x"),
}
A = f"cases/{CASE}"
VOLUMES: dict[str, tuple[Change, str]] = {
    "of the other kind": (attribute("kind", "image"), "cache of images"),
    "no channels": (attribute("channels", None), "damaged"),
    "channels not JSON": (attribute("channels", "["), "damaged"),
    "channels nested": (attribute("channels", nested(20000)), "damaged"),
    "channels a number": (attribute("channels", "4"), "damaged"),
    "three channels": (attribute("channels", '["a", "b", "c"]'), "channels"),
    "labels a list": (attribute("labels", "[]"), "damaged|labels"),
    "labels of one code": (attribute("labels", '{"name": "x", "edema": 1, "core": 1, "enhancing": 1}'), "labels"),
    "labels of texts": (attribute("labels", '{"name": "x", "edema": "a", "core": 1, "enhancing": 2}'), "labels"),
    "label 9999": (attribute("labels", '{"name": "x", "edema": 9999, "core": 1, "enhancing": 2}'), "labels"),
    "spacing NaN": (attribute("spacing_mm", float("nan")), "damaged"),
    "spacing a text": (attribute("spacing_mm", "wide"), "damaged"),
    "prepared by an older version": (attribute("preparation", '{"version": 0}'), "version 0, .* prepare it again"),
    "spacing another": (attribute("spacing_mm", 3.0), "spacing 3 mm"),
    "no cases": (edit(lambda f: f.__delitem__("cases")), "damaged"),
    "cases a dataset": (edit(lambda f: (f.__delitem__("cases"), f.__setitem__("cases", 3))), "damaged"),
    "cases elsewhere": (outside("cases", external), "damaged.*link"),
    "cases empty": (edit(lambda f: [f["cases"].__delitem__(k) for k in list(f["cases"])]), "can not be split"),
    "a case elsewhere": (outside(A, external), f"{CASE} is damaged.*link"),
    "a case that points": (soft(A), f"{CASE} is damaged.*link"),
    "a case is a dataset": (replaced(A, [1, 2]), f"{CASE} is damaged"),
    "a case with a line break": (edit(lambda f: f["cases"].move(CASE, "a\nb")), "damaged"),
    "no image": (replaced(f"{A}/image", None), f"{CASE} is damaged"),
    "no label": (replaced(f"{A}/label", None), f"{CASE} is damaged"),
    "no voxel samples": (replaced(f"{A}/voxels_1", None), f"{CASE} is damaged"),
    "no checksum": (attribute("checksum", None, A), f"{CASE} is damaged"),
    "an image elsewhere": (outside(f"{A}/image", external), f"{CASE} is damaged.*link"),
    "an image that points": (soft(f"{A}/image"), f"{CASE} is damaged.*link"),
    "a virtual image": (outside(f"{A}/image", virtual), f"{CASE} is damaged.*another file"),
    "raw bytes of another file": (outside(f"{A}/label", raw), f"{CASE} is damaged"),
    "an image of texts": (replaced(f"{A}/image", np.array([[[[b"x"]]]])), f"{CASE} is damaged"),
    "an image of doubles": (changed(f"{A}/image", lambda a: a.astype(np.float64)), f"{CASE} is damaged"),
    "an image of three axes": (changed(f"{A}/image", lambda a: a[0]), f"{CASE} is damaged"),
    "an image of two channels": (changed(f"{A}/image", lambda a: a[:2]), f"{CASE} is damaged"),
    "an image of other size": (changed(f"{A}/image", lambda a: a[:, 1:]), f"{CASE} is damaged"),
    "a label of other size": (changed(f"{A}/label", lambda a: a[:, 1:]), f"{CASE} is damaged"),
    "a label of floats": (changed(f"{A}/label", lambda a: a.astype(np.float32)), f"{CASE} is damaged"),
    "an image without bytes": (
        edit(lambda f: (f.__delitem__(f"{A}/image"), f.create_dataset(f"{A}/image", (4, 48, 56, 40), "f2"))),
        f"{CASE} is damaged",
    ),
    "an image of terabytes": (bomb(f"{A}/image", (4, 30000, 30000, 30000), "f2"), f"{CASE} is damaged.*unpacks"),
    "a label of terabytes": (bomb(f"{A}/label", (30000, 30000, 30000), "u1"), f"{CASE} is damaged.*unpacks"),
    "voxels that unpack to more": (
        repacked(f"{A}/voxels_1", zlib.compress(bytes(1 << 19))),
        f"{CASE} is damaged.*unpacks to another size",
    ),
    "voxels that unpack to less": (
        repacked(f"{A}/voxels_1", zlib.compress(b"abc")),
        f"{CASE} is damaged.*unpacks to another size",
    ),
    "voxels of three bytes": (repacked(f"{A}/voxels_1", b"abc", 2), f"{CASE} is damaged.*unpacks to another size"),
    "voxels of many bytes": (repacked(f"{A}/voxels_1", bytes(1 << 20), 2), f"{CASE} is damaged.*too long"),
    "voxels that do not unpack": (repacked(f"{A}/voxels_1", b"abc"), f"{CASE} is damaged.*can not be unpacked"),
    "a label packed twice": (packed_twice(f"{A}/label"), f"{CASE} is damaged.*in another way"),
    "a label packed by another library": (repacked(f"{A}/label", compression="lzf"), f"{CASE} is damaged.*another way"),
    "a label of fewer bits": (
        repacked(f"{A}/label", compression=None, shuffle=None, scaleoffset=0),
        f"{CASE} is damaged.*in another way",
    ),
    "a label in a larger chunk": (
        repacked(f"{A}/label", chunks=(256, 256, 256), maxshape=(None, None, None)),
        f"{CASE} is damaged.*in another way",
    ),
    "voxels outside": (changed(f"{A}/voxels_1", lambda a: a + 999), f"{CASE} is damaged"),
    "voxels below 0": (changed(f"{A}/voxels_1", lambda a: a - 999), f"{CASE} is damaged"),
    "voxels of two axes": (changed(f"{A}/voxels_1", lambda a: a[:, :2]), f"{CASE} is damaged"),
}
GRID: dict[str, tuple[Any, str]] = {
    "no facts": (None, "is damaged"),
    "facts not JSON": ("{", "is damaged"),
    "facts a list": ("[1]", "is damaged"),
    "facts nested": (nested(20000), "is damaged"),
    "no grid": ("{}", "its grid"),
    "a grid of texts": ('{"grid": {"start": "abc"}}', "its grid"),
    "a grid of another size": ({"stop": [9, 9, 9]}, "its grid"),
    "a grid backwards": ({"start": [90, 90, 90]}, "its grid"),
}


def column(change: Callable[[np.ndarray], Any], name: str) -> Change:
    return changed(name, change)


IMAGES: dict[str, tuple[Change, str]] = {
    "of the other kind": (attribute("kind", "volume"), "cache of volumes"),
    "no classes": (attribute("classes", None), "damaged"),
    "classes a number": (attribute("classes", "7"), "damaged"),
    "classes of three": (attribute("classes", '[["a", "b", "c"]]'), "damaged"),
    "fewer classes": (attribute("classes", '[["Oral Cancer", "a"], ["Oral Cancer", "b"]]'), "damaged"),
    "no preparation": (attribute("preparation", None), "damaged"),
    "prepared by an older version": (attribute("preparation", '{"version": 1}'), "version 1, .* prepare it again"),
    "prepared by no version": (attribute("preparation", "{}"), "version None, .* prepare it again"),
    "offsets negative": (column(lambda a: a - 5, "offsets"), "damaged"),
    "offsets beyond": (column(lambda a: a * 2, "offsets"), "damaged"),
    "offsets backwards": (column(lambda a: a[::-1].copy(), "offsets"), "damaged"),
    "offsets too few": (column(lambda a: a[:-1], "offsets"), "damaged"),
    "offsets of floats": (column(lambda a: a.astype(float), "offsets"), "damaged"),
    "classes negative": (column(lambda a: a - 1, "target"), "damaged"),
    "classes unknown": (column(lambda a: a + 9, "target"), "damaged"),
    "sizes 0": (column(lambda a: a * 0, "size"), "damaged"),
    "sizes of one side": (column(lambda a: a[:, :1], "size"), "damaged"),
    "paths twice": (column(lambda a: a[:1].repeat(len(a)), "path"), "damaged"),
    "paths not UTF-8": (column(lambda a: np.array([b"\xff%d" % n for n in range(len(a))]), "path"), "damaged"),
    "paths of numbers": (column(lambda a: np.arange(len(a)), "path"), "damaged"),
    "facts not JSON": (replaced("facts", np.frombuffer(b"{", np.uint8)), "damaged"),
    "facts nested": (replaced("facts", np.frombuffer(nested(20000).encode(), np.uint8)), "damaged"),
    "checksums too short": (column(lambda a: a[:, :4], "checksum"), "damaged"),
    "bytes elsewhere": (outside("bytes", external), "damaged.*link"),
    "bytes virtual": (outside("bytes", virtual), "damaged.*another file"),
    "bytes of another file": (outside("bytes", raw), "damaged"),
    "bytes of terabytes": (bomb("bytes", (1 << 42,), "u1"), "damaged.*packed"),
    "paths of terabytes": (bomb("path", (1 << 36,), "S99"), "damaged.*packed"),
    "a column that points": (soft("group"), "damaged.*link"),
}
for name in ("path", "target", "group", "size", "offsets", "checksum", "histogram", "facts", "bytes"):
    IMAGES[f"no {name}"] = (replaced(name, None), "damaged")


def train(recipe: str, settings: tuple[str, ...], path: Path, out: Path) -> int:
    sets = [part for item in settings for part in ("--set", item)]
    return run_main("train", recipe, "--cache", path, "--out", out / "run", *sets)


def _refused(change: Change, words: str, source: Path, tmp_path: Path, capfd: Any, volume: bool) -> None:
    path, out = Path(shutil.copy(source, tmp_path / "bad.h5")), tmp_path / "out"
    change(path)
    recipe, sets = ("brats_segresnet_demo", (*TINY, "data.val_fraction=0", "data.holdout=PHANTOM_001"))
    if not volume:
        recipe, sets = "multicancer_mobilenetv3_demo", TINY_IMAGES
    check_refused(train(recipe, sets, path, out), capfd.readouterr().err, str(path), words, out)


@pytest.mark.parametrize("name", [*ANY, *VOLUMES])
def test_volumes(name: str, cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _refused(*(ANY | VOLUMES)[name], cache, tmp_path, capfd, True)


@pytest.mark.parametrize("name", GRID)
def test_ways_back(name: str, cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    value, words = GRID[name]
    place = "cases/PHANTOM_001"
    if isinstance(value, dict):
        with h5py.File(cache, locking=False) as file:
            facts = json.loads(file[place].attrs["facts"])
        value = json.dumps({**facts, "grid": {**facts["grid"], **value}})
    _refused(attribute("facts", value, place), words, cache, tmp_path, capfd, True)


@pytest.mark.parametrize("name", [*ANY, *IMAGES])
def test_images(name: str, image_cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _refused(*(ANY | IMAGES)[name], image_cache, tmp_path, capfd, False)
