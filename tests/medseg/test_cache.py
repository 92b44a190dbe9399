import errno
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest

from medseg.cache import Cache, Case, assemble, part_fits, write_part
from medtrain.errors import UserError


def make(folder: Path, *, compressed: bool = False) -> tuple[Path, dict[str, Case]]:
    rng = np.random.default_rng(0)
    cases = {}
    for name in ("a", "b b'ü"):
        image = rng.standard_normal((2, 19, 18, 7)).astype(np.float16)
        label = rng.integers(0, 4, (19, 18, 7)).astype(np.uint8)
        arrays = {"label_native": label.repeat(2, 0), "voxels_1": np.zeros((0, 3), np.int16)}
        cases[name] = Case(image_CDHW=image, label_DHW=label, arrays=arrays, facts={"n": 1})
        write_part(folder / f"{name}.h5", cases[name], recipe="r", compressed=compressed)
    out = folder / "c.h5"
    parts = [(name, folder / f"{name}.h5") for name in cases]
    assemble(out, parts, channels=["x", "y"], labels={"name": "msd"}, spacing_mm=1.0, preparation={})
    return out, cases


@pytest.mark.parametrize("compressed", [False, True])
def test_what_is_written_is_read(tmp_path: Path, compressed: bool) -> None:
    path, cases = make(tmp_path, compressed=compressed)
    cache = Cache(path)
    assert cache.ids == sorted(cases)
    for name, case in cases.items():
        assert np.array_equal(cache.read(name, "image"), case.image_CDHW)
        assert np.array_equal(cache.read(name, "label_native"), case.arrays["label_native"])
        assert cache.array(name, "voxels_1").shape == (0, 3)
        assert cache.facts(name) == {"n": 1}
        patch = cache.patch(name, "image", (1, 2, 3), (6, 8, 5))
        assert np.array_equal(patch, case.image_CDHW[:, 1:6, 2:8, 3:5])
        assert patch.flags.c_contiguous
        assert isinstance(cache.array(name, "image"), np.ndarray) is not compressed
    assert all(intact for _, intact in cache.verify())


@pytest.mark.parametrize("compressed", [False, True])
def test_a_patch_is_zero_outside_of_the_volume(tmp_path: Path, compressed: bool) -> None:
    path, cases = make(tmp_path, compressed=compressed)
    cache, case = Cache(path), cases["a"]
    image, label = np.pad(case.image_CDHW, [(0, 0), *[(9, 9)] * 3]), np.pad(case.label_DHW, 9)
    for start, stop in [((-3, 2, -1), (6, 8, 9)), ((-1, -1, -1), (20, 19, 8)), ((15, 0, 0), (25, 18, 7)),
                        ((-9, 0, 0), (-2, 3, 3)), ((20, 0, 0), (22, 3, 3))]:  # fmt: skip
        box = tuple(slice(a + 9, b + 9) for a, b in zip(start, stop, strict=True))
        for name, whole in (("image", image), ("label", label)):
            patch = cache.patch("a", name, start, stop)
            assert np.array_equal(patch, whole[(..., *box)])
            assert patch.dtype == whole.dtype
            assert patch.flags.c_contiguous


def test_patches_come_from_the_shared_memory_map(tmp_path: Path) -> None:
    path, _ = make(tmp_path)
    cache = Cache(path)
    assert not cache.array("a", "image").flags.owndata
    assert cache.file["cases/a/image"].id.get_offset() % 4096 == 0


def test_verify_names_the_changed_case(tmp_path: Path) -> None:
    path, _ = make(tmp_path)
    with h5py.File(path, "r+") as file:
        file["cases/a/label"][0, 0, 0] += 1
    assert dict(Cache(path).verify()) == {"a": False, "b b'ü": True}


def test_a_part_of_another_preparation_or_cut_short_does_not_fit(tmp_path: Path) -> None:
    make(tmp_path)
    part = tmp_path / "a.h5"
    assert part_fits(part, "r")
    assert not part_fits(part, "other")
    assert not part_fits(tmp_path / "absent.h5", "r")
    part.write_bytes(part.read_bytes()[:500])
    assert not part_fits(part, "r")


def planted(path: Path, change: str) -> None:
    """Another file's content under the label of a part, in one of HDF5's ways."""
    other = path.with_name("private.h5")
    with h5py.File(path, "r+") as file, h5py.File(other, "w") as aside:
        shape, dtype = file["label"].shape, file["label"].dtype
        file.copy("label", aside, "x")
        del file["label"]
        if change == "an external link":
            file["label"] = h5py.ExternalLink(str(other), "/x")
        elif change == "a soft link":
            file["label"] = h5py.SoftLink("/label_native")
        elif change == "external storage":
            file.create_dataset("label", shape, dtype, external=[(str(other), 0, 1 << 30)])
        elif change == "virtual storage":
            layout = h5py.VirtualLayout(shape, dtype)
            layout[...] = h5py.VirtualSource(str(other), "x", shape)
            file.create_virtual_dataset("label", layout)
        else:  # a group "cases" that is another cache's
            aside.create_group("cases")
            aside.copy("x", "cases/a")
            file["cases"] = h5py.ExternalLink(str(other), "/cases")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("an external link", "label is a link to another place"),
        ("a soft link", "label is a link to another place"),
        ("external storage", "label lies in another file"),
        ("virtual storage", "label lies in another file"),
        ("cases elsewhere", "cases is a link to another place"),
    ],
)
def test_a_part_that_leads_to_another_file_is_taken_by_nobody(tmp_path: Path, change: str, words: str) -> None:
    out, _ = make(tmp_path)
    before, part = out.read_bytes(), tmp_path / "a.h5"
    assert part_fits(part, "r")
    planted(part, change)
    assert not part_fits(part, "r")
    with pytest.raises(UserError, match=rf"a\.h5 is damaged \(.*{words}.*\): remove it, and prepare again"):
        assemble(out, [("a", part)], channels=[], labels={}, spacing_mm=0, preparation={})
    assert out.read_bytes() == before


def test_a_failed_assembly_leaves_nothing(tmp_path: Path) -> None:
    part = tmp_path / "a.h5"
    part.write_bytes(b"no HDF5")
    with pytest.raises(OSError, match="file"):
        assemble(tmp_path / "c.h5", [("a", part)], channels=[], labels={}, spacing_mm=0, preparation={})
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5"]


@pytest.mark.parametrize(
    ("change", "words"),
    [("absent", "not there"), ("cut", "cut short"), ("foreign", "another program"), ("version", "version 99")],
)
def test_a_wrong_file_is_named(tmp_path: Path, change: str, words: str) -> None:
    path, _ = make(tmp_path)
    if change == "absent":
        path.unlink()
    elif change == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        with h5py.File(path, "r+") as file:
            file.attrs["format" if change == "foreign" else "version"] = "x" if change == "foreign" else 99
    with pytest.raises(UserError, match=words) as caught:
        Cache(path)
    assert str(path) in str(caught.value)


def test_an_unknown_case_is_named(tmp_path: Path) -> None:
    path, _ = make(tmp_path)
    with pytest.raises(UserError, match="no case 'z'"):
        Cache(path).facts("z")


def test_what_the_system_refuses_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = make(tmp_path, compressed=True)
    cache = Cache(path)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Unable to open file")

    monkeypatch.setattr(h5py, "File", refuse)
    with pytest.raises(UserError, match=r"c\.h5 can not be read \(Permission denied\)"):
        Cache(path)

    class Broken:
        shape = (2, 19, 18, 7)

        def __getitem__(self, _: object) -> None:
            raise OSError(errno.EIO, "Can't read data")

    monkeypatch.setattr(cache, "_view", lambda case, name: Broken())
    with pytest.raises(UserError, match=r"case a can not be read \(Input/output error\)"):
        cache.read("a", "image")
    with pytest.raises(UserError, match=r"case a can not be read \(Input/output error\)"):
        cache.patch("a", "image", (0, 0, 0), (2, 2, 2))


def test_a_chunk_is_unpacked_within_bounds_before_it_is_read(tmp_path: Path) -> None:
    """Only the chunks that a box touches, so that a cache opens as fast as ever."""
    label = np.random.default_rng(0).integers(0, 4, (100, 70, 5)).astype(np.uint8)
    case = Case(image_CDHW=np.ones((2, 100, 70, 5), np.float16), label_DHW=label, arrays={}, facts={})
    write_part(tmp_path / "a.h5", case, recipe="r", compressed=True)
    out = tmp_path / "c.h5"
    assemble(out, [("a", tmp_path / "a.h5")], channels=["x", "y"], labels={}, spacing_mm=1.0, preparation={})
    with h5py.File(out, "r+") as file:
        assert file["cases/a/label"].chunks == (64, 64, 5)
        file["cases/a/label"].id.write_direct_chunk((64, 64, 0), zlib.compress(bytes(1 << 25)))
    cache = Cache(out)
    assert cache.array("a", "label").shape == label.shape
    for _ in range(2):
        assert np.array_equal(cache.patch("a", "label", (10, 10, 0), (100, 64, 5)), label[10:, 10:64])
        assert np.array_equal(cache.patch("a", "label", (10, 50, 0), (64, 70, 5)), label[10:64, 50:])
        for start in ((60, 60, 0), (99, 69, 4)):
            with pytest.raises(
                UserError, match=r"case a is damaged \(.*label has a chunk that unpacks to another size"
            ):
                cache.patch("a", "label", start, (100, 70, 5))
        for box in (..., 0, (..., 0), (slice(None), slice(None), slice(None))):
            with pytest.raises(ValueError, match="another size"):
                cache.array("a", "label")[box]
    assert dict(cache.verify()) == {"a": False}
