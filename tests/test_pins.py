"""constraints.txt pins everything that is installed for the project, and can be renewed."""

import pins

TEXT = """# tested together
Torch==2.0.0  # with its own CUDA

numpy==1.0
absent==3.1
# what these need
zlib-ng==1
# tests
pytest==8.0
"""
INSTALLED = {"torch": "2.1.0", "numpy": "1.0", "pytest": "9.0", "zlib-ng": "1", "attrs": "25.1"}


def test_everything_that_is_installed_is_pinned_to_its_version() -> None:
    installed = pins.closure(pins.asked_for())
    assert {"torch", "numpy", "nibabel", "h5py", "pytest", "typing-extensions"} <= set(installed)
    assert pins.problems(installed, pins.FILE.read_text(encoding="utf-8")) == []


def test_what_torch_pins_for_cuda_is_left_to_it() -> None:
    pinned = pins.pins(pins.FILE.read_text(encoding="utf-8"))
    assert not [name for name in pinned if name.startswith(("nvidia-cu", "cuda-"))]
    # the project's own need, but torch's CUDA build of that version takes exactly this one
    assert (pinned["torch"], pinned["triton"]) == ("2.13.0", "3.7.1")


def test_differences_are_told() -> None:
    assert pins.problems(INSTALLED, TEXT) == [
        "attrs==25.1 is not pinned", "pytest is pinned to 8.0, installed is 9.0",
        "torch is pinned to 2.0.0, installed is 2.1.0",
    ]  # fmt: skip


def test_it_is_renewed_with_its_comments() -> None:
    text = pins.renewed(INSTALLED, TEXT)
    assert pins.problems(INSTALLED, text) == []
    assert text == TEXT.replace("2.0.0", "2.1.0").replace("8.0", "9.0").replace("zlib-ng", "attrs==25.1\nzlib-ng")
    assert pins.renewed(INSTALLED, text) == text
    assert pins.renewed({"a": "1"}, "# nothing\n") == "# nothing\n# what these need\na==1\n"
