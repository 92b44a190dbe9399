"""Prediction of raw image files: the same probabilities as the rows of training, and every file accounted for."""

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from launch_helpers import run_main

from medcls.recipes import ClsRecipe
from medlaunch.run import run
from medtrain.results import read_rows


@pytest.fixture(scope="module")
def runs(
    image_cache: Path, tiny_images: Callable[..., ClsRecipe], tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """Two members of one cancer at different sizes, and one of another cancer."""
    place = tmp_path_factory.mktemp("runs")
    for name, sets in (("a", ("evaluate.flips=true",)), ("b", ("data.size=48", "train.seed=1")),
                       ("other", ("data.cancer=Brain Cancer",))):  # fmt: skip
        run(tiny_images(*sets), image_cache, place / name)
    return [place / name for name in ("a", "b", "other")]


def table(path: Path) -> dict[str, dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return {line["image"]: line for line in csv.DictReader(file)}


def test_files_get_the_probabilities_of_the_rows(runs: list[Path], pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.csv"
    assert run_main("predict", "--members", runs[0], "--image", pictures, "--out", out) == 0
    found = table(out)
    assert len(found) == 101  # the truth file is no image, and says so
    assert found["phantom_truth.csv"]["note"] == "not an image"
    for row in read_rows(runs[0] / "cases.csv"):
        line = found[row.case]
        assert float(line["p:oral_scc"]) == pytest.approx(row.scores["p:oral_scc"], abs=2e-6)
        assert line["prediction"] == ("oral_normal", "oral_scc")[round(row.scores["predicted"])]
        assert line["note"] == ""


def test_members_are_averaged_with_weights(runs: list[Path], pictures: Path, tmp_path: Path) -> None:
    folder = pictures / "Oral Cancer" / "oral_scc"
    for name, members, extra in (("a", runs[:1], ()), ("b", runs[1:2], ()), ("ab", runs[:2], ("--weights", 1, 3))):
        arguments = ("--members", *members, "--image", folder, "--out", tmp_path / f"{name}.csv", *extra)
        assert run_main("predict", *arguments) == 0
    a, b, both = (table(tmp_path / f"{name}.csv") for name in ("a", "b", "ab"))
    for image, line in both.items():
        mean = (float(a[image]["p:oral_scc"]) + 3 * float(b[image]["p:oral_scc"])) / 4
        assert float(line["p:oral_scc"]) == pytest.approx(mean, abs=3e-6)


def test_linked_folders_are_seen_once(runs: list[Path], pictures: Path, tmp_path: Path) -> None:
    chosen = tmp_path / "chosen"
    (chosen / "later").mkdir(parents=True)
    (chosen / "linked").symlink_to(pictures / "Oral Cancer" / "oral_scc")
    (chosen / "later" / "up").symlink_to(chosen)
    (chosen / "later" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert run_main("predict", "--members", runs[0], "--image", chosen, "--out", tmp_path / "p.csv") == 0
    files = [path.name for path in (pictures / "Oral Cancer" / "oral_scc").iterdir()]
    assert list(table(tmp_path / "p.csv")) == [f"linked/{name}" for name in sorted(files)]


def test_refusals(runs: list[Path], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    one = next(iter((pictures / "Oral Cancer" / "oral_scc").iterdir()))
    out = tmp_path / "p.csv"
    shutil.copy(one, tmp_path / "=1+1.jpg")
    for members, image, target, words in [
        (runs[:1], one, tmp_path / "p", "must end in .csv"),
        ([runs[0], runs[2]], one, out, "knows other classes"),
        (runs[:1], tmp_path / "empty", out, "holds no file"),
        (runs[:1], tmp_path / "absent", out, "is not there"),
        (runs[:1], tmp_path / "=1+1.jpg", out, "spreadsheets take '=1+1.jpg' for a formula: rename it"),
        (runs[:1], tmp_path, out, "spreadsheets take '=1+1.jpg' for a formula: rename it"),
        (runs[:1], pictures / "phantom_truth.csv", out, "nor any other file there"),
    ]:
        assert run_main("predict", "--members", *members, "--image", image, "--out", target) == 2
        assert words in capsys.readouterr().err
        assert not target.exists()
    shutil.copytree(runs[0], tmp_path / "run")
    (tmp_path / "run" / "checkpoint_best.pt").write_bytes(b"x")
    assert run_main("predict", "--members", tmp_path / "run", "--image", one, "--out", out) == 2
    assert "damaged" in capsys.readouterr().err


def test_images_that_can_not_be_read_are_missing_and_the_table_is_no_image(
    runs: list[Path], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for path in sorted((pictures / "Oral Cancer" / "oral_scc").iterdir())[:3]:
        shutil.copy(path, folder / path.name)
    words = ("predict", "--members", runs[0], "--image", folder, "--out", folder / "p.csv")
    for _ in range(2):  # the second time the table lies among the images
        assert run_main(*words) == 0
        assert "3 files in" in capsys.readouterr().out
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 cut off")
    assert run_main(*words) == 3
    assert "4 files in" in (told := capsys.readouterr().out)
    assert "1 of them could not be read" in told
    assert table(folder / "p.csv")["broken.jpg"]["note"]
