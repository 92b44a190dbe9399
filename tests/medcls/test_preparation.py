"""Folders to cache: bytes as they are, resumable, every file accounted for."""

import io
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from launch_helpers import in_this_process, run_main
from PIL import Image

from medcls import preparation
from medcls.cache import ImageCache, digest
from medcls.preparation import Preparation, prepare_folder
from medtrain.errors import UserError


@pytest.fixture
def folder(pictures: Path, tmp_path: Path) -> Path:
    """A copy of the phantom images that a test may spoil."""
    return Path(shutil.copytree(pictures, tmp_path / "data"))


def test_the_cache_holds_the_files_as_they_are(pictures: Path, image_cache: Path) -> None:
    cache = ImageCache(image_cache)
    assert len(cache.ids) == 100
    assert cache.classes[0] == ("Brain Cancer", "brain_glioma")
    assert cache.cancers == ["Brain Cancer", "Oral Cancer"]
    for n, path in enumerate(cache.ids):
        assert cache.encoded(n).tobytes() == (pictures / path).read_bytes()
        assert "/".join(cache.classes[cache.target[n]]) == str(Path(path).parent)
        assert tuple(cache.size[n]) == Image.open(pictures / path).size[::-1]
    assert cache.histogram.shape == (100, 160)
    assert all(intact for _, intact in cache.verify())
    assert cache.facts["bad"] == cache.facts["conflicts"] == cache.facts["converted"] == []


def test_workers_and_chunks_do_not_matter(
    folder: Path, image_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "CHUNK", 7)
    made = ImageCache(prepare_folder(folder, tmp_path / "c.h5", workers=2))
    assert made.fingerprint == ImageCache(image_cache).fingerprint
    assert np.array_equal(made.histogram, ImageCache(image_cache).histogram)
    assert not (tmp_path / "c.h5.parts").exists()


def test_a_broken_off_preparation_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preparation, "CHUNK", 20)
    real = preparation.in_processes

    def two_and_a_power_cut(function: object, jobs: list, workers: int, what: str) -> object:
        for n, result in enumerate(real(function, jobs, 1, what=what)):  # type: ignore[arg-type]
            if n == 2:
                raise RuntimeError("power cut")
            yield result

    monkeypatch.setattr(preparation, "in_processes", two_and_a_power_cut)
    with pytest.raises(RuntimeError, match="power cut"):
        prepare_folder(folder, tmp_path / "c.h5")
    assert not (tmp_path / "c.h5").exists()
    kept = len(list((tmp_path / "c.h5.parts").glob("[!.]*.h5")))
    assert kept >= 2
    monkeypatch.setattr(preparation, "in_processes", real)
    prepare_folder(folder, tmp_path / "c.h5")
    assert f"{kept} of 5 parts are prepared already" in capsys.readouterr().out
    assert len(ImageCache(tmp_path / "c.h5").ids) == 100


@pytest.mark.parametrize("way", ["link", "storage"])
def test_a_part_that_leads_to_another_file_is_made_anew(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(preparation, "in_processes", in_this_process)
    real, out, private = preparation._assemble, tmp_path / "c.h5", tmp_path / "private"
    monkeypatch.setattr(preparation, "_assemble", lambda work: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare_folder(folder, out)
    (part,) = (tmp_path / "c.h5.parts").glob("*.h5")
    with h5py.File(part, "r+") as file:
        size = file["bytes"].size
        private.write_bytes(bytes(size))
        del file["bytes"]
        if way == "link":
            with h5py.File(private, "w") as other:
                other["x"] = np.zeros(size, np.uint8)
            file["bytes"] = h5py.ExternalLink(str(private), "/x")
        else:
            file.create_dataset("bytes", (size,), np.uint8, external=[(str(private), 0, size)])
    with pytest.raises(UserError, match=r"is damaged .*bytes .*: remove it, and run this again"):
        preparation._images(part, {})
    with pytest.raises(UserError, match=r"is damaged .*bytes .*: remove it, and run this again"):
        preparation._read_part(part)
    monkeypatch.setattr(preparation, "_assemble", real)
    assert all(intact for _, intact in ImageCache(prepare_folder(folder, out)).verify())


def test_a_second_call_does_nothing_and_a_changed_file_is_read_anew(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "c.h5"
    before = ImageCache(prepare_folder(folder, out)).fingerprint
    stamp = out.stat().st_mtime_ns
    prepare_folder(folder, out)
    assert "already holds these 100 images" in capsys.readouterr().out
    assert out.stat().st_mtime_ns == stamp
    Image.new("RGB", (50, 40), "green").save(folder / "Oral Cancer/oral_scc/oral_scc_0001.jpg")
    assert ImageCache(prepare_folder(folder, out)).fingerprint != before


def test_a_cache_of_before_metadata_was_left_out_is_made_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preparation, "in_processes", in_this_process)
    with monkeypatch.context() as before:
        before.setattr(preparation, "Preparation", lambda: Preparation(silence=1))
        prepare_folder(folder, tmp_path / "c.h5")
    prepare_folder(folder, tmp_path / "c.h5")
    assert "it is made again" in capsys.readouterr().out


def spoil(folder: Path) -> None:
    """A truncated file, a text, an empty file, and one image under two classes."""
    one = folder / "Oral Cancer" / "oral_scc"
    content = (one / "oral_scc_0003.jpg").read_bytes()
    (one / "oral_scc_0003.jpg").write_bytes(content[: len(content) // 2])
    (one / "notes.txt").write_text("by hand")
    (one / "empty.png").write_bytes(b"")
    shutil.copy(one / "oral_scc_0005.jpg", folder / "Oral Cancer" / "oral_normal" / "same.jpg")


def test_bad_files_are_named_counted_and_never_in_the_cache(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(folder)
    assert run_main("prepare", "multicancer", "--data", folder, "--out", tmp_path / "c.h5") == 0
    printed = capsys.readouterr()
    for name in ("oral_scc_0003.jpg", "notes.txt", "empty.png"):
        assert f"set aside: Oral Cancer/oral_scc/{name}" in printed.err
    assert "same image under several classes: Oral Cancer/oral_normal/same.jpg" in printed.err
    assert "with a copy in training" in printed.out
    cache = ImageCache(tmp_path / "c.h5")
    assert len(cache.ids) == 100  # 103 files, three set aside
    assert cache.facts["files"] == 103
    listing = (tmp_path / "c.h5.set_aside.csv").read_text()
    assert listing.count("\n") == 4
    assert "notes.txt,not an image" in listing
    assert {Path(path).name for path, _ in cache.facts["bad"]} == {"oral_scc_0003.jpg", "notes.txt", "empty.png"}
    assert cache.facts["conflicts"] == [["Oral Cancer/oral_normal/same.jpg", "Oral Cancer/oral_scc/oral_scc_0005.jpg"]]


def test_strict_stops(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(folder)
    assert run_main("prepare", "multicancer", "--data", folder, "--out", tmp_path / "c.h5", "--strict") == 2
    assert "(and 2 more); repair it" in capsys.readouterr().err
    assert not (tmp_path / "c.h5").exists()


def test_a_class_of_bad_files_only_is_refused(folder: Path, tmp_path: Path) -> None:
    for path in (folder / "Oral Cancer" / "oral_scc").iterdir():
        path.write_bytes(b"x")
    with pytest.raises(
        UserError, match=r"Oral Cancer/oral_scc holds no image that can be read \(oral_scc_0001.jpg: not an image\)"
    ):
        prepare_folder(folder, tmp_path / "c.h5")


def test_odd_formats_are_counted(folder: Path, tmp_path: Path) -> None:
    Image.new("CMYK", (30, 30)).save(folder / "Oral Cancer/oral_scc/z.jpg")
    cache = ImageCache(prepare_folder(folder, tmp_path / "c.h5"))
    assert cache.facts["converted"] == [["Oral Cancer/oral_scc/z.jpg", "CMYK pixels"]]
    n = cache.ids.index("Oral Cancer/oral_scc/z.jpg")
    assert Image.open(io.BytesIO(cache.encoded(n).tobytes())).format == "PNG"


def test_a_flipped_byte_is_found_by_image(
    image_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copy(image_cache, tmp_path / "c.h5"))
    assert run_main("prepare", "verify", path) == 0
    with h5py.File(path, "r+") as file:
        file["bytes"][int(file["offsets"][4]) + 30] ^= 1
    assert run_main("prepare", "verify", path) == 2
    assert ImageCache(image_cache).ids[4] in capsys.readouterr().err


def test_caches_of_another_kind_and_strange_files(
    image_cache: Path, cache: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ("--out", tmp_path / "run")
    assert run_main("train", "multicancer_mobilenetv3_demo", "--cache", cache, *run) == 2
    assert "is a cache of volumes, this recipe needs one of images" in capsys.readouterr().err
    assert run_main("train", "brats_segresnet_demo", "--cache", image_cache, *run) == 2
    assert "is a cache of images, this recipe needs one of volumes" in capsys.readouterr().err
    (tmp_path / "x.h5").write_text("no")
    assert run_main("prepare", "multicancer", "--data", pictures, "--out", tmp_path / "x.h5") == 2
    assert "not overwritten" in capsys.readouterr().err
    assert (tmp_path / "x.h5").read_text() == "no"


def test_facts_are_json_and_checksums_are_of_the_stored_bytes(image_cache: Path) -> None:
    with h5py.File(image_cache, locking=False) as file:
        assert json.loads(file["facts"][()].tobytes())["files"] == 100
        start, stop = file["offsets"][:2]
        assert digest(file["bytes"][start:stop].tobytes()) == file["checksum"][0].tobytes()
        assert file["bytes"].chunks is None


def test_a_list_of_patients_joins_their_images(
    folder: Path, image_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = ImageCache(image_cache)
    scc = [path for path in before.ids if path.startswith("Oral Cancer/oral_scc")]
    rows = "".join(f"{path},patient {n // 4}\n" for n, path in enumerate(scc))
    (folder / "patients.csv").write_text(f"file,patient\n{rows}")
    out = prepare_folder(folder, tmp_path / "c.h5")
    cache = ImageCache(out)
    assert "5 patients are told by patients.csv, 80 of 100 images have none: no group split" in capsys.readouterr().out
    assert cache.ids == before.ids
    assert np.array_equal(cache.near, before.near)
    assert np.array_equal(before.near, before.group)
    number = {path: int(cache.group[n]) for n, path in enumerate(cache.ids)}
    for n in range(0, 20, 4):
        assert len({number[path] for path in scc[n : n + 4]}) == 1
    # near-duplicates stay together, and images of nobody known stay apart
    assert all(
        (cache.group[a] == cache.group[b]) or (before.group[a] != before.group[b])
        for a in range(100) for b in range(a)
    )  # fmt: skip
    brain = [n for n, path in enumerate(cache.ids) if path.startswith("Brain")]
    assert len({int(cache.group[n]) for n in brain}) == len({int(before.group[n]) for n in brain})
    (folder / "patients.csv").write_text(f"file,patient\n{rows.replace('patient 4', 'patient 3')}")
    prepare_folder(folder, out)
    assert "it is made again" in capsys.readouterr().out


def test_a_list_of_patients_above_the_images_is_not_passed_over(folder: Path, tmp_path: Path) -> None:
    above = tmp_path / "above"
    above.mkdir()
    folder.rename(above / "Multi Cancer")
    (above / "patients.csv").write_text("file,patient\n")
    with pytest.raises(UserError, match=r"above the folder of the images: move it to .*Multi Cancer"):
        prepare_folder(above, tmp_path / "c.h5")


def test_links_are_looked_at_again_where_they_are_allowed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = sorted((folder / "Oral Cancer" / "oral_scc").iterdir())[0]
    first.rename(tmp_path / first.name)
    first.symlink_to(tmp_path / first.name)
    out = prepare_folder(folder, tmp_path / "c.h5")
    assert "leaves the data folder; MEDTRAIN_FOLLOW_LINKS=1 allows it" in capsys.readouterr().err
    assert len(ImageCache(out).ids) == 99
    monkeypatch.setenv("MEDTRAIN_FOLLOW_LINKS", "1")
    assert len(ImageCache(prepare_folder(folder, out)).ids) == 100
