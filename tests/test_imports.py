"""The direction of imports: each package imports only what stands left of it; optional libraries in one file each."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"medtrain": "medtrain", "medseg": "medseg", "medcls": "medcls", "launch": "medlaunch", "slurm": "medslurm"}
ALLOWED = {
    "medkernels": {"medkernels"},
    "medtrain": {"medtrain"},
    "medseg": {"medkernels", "medtrain", "medseg"},
    "medcls": {"medtrain", "medcls"},
    "medlaunch": {"medkernels", "medtrain", "medseg", "medcls", "medslurm", "medlaunch"},
    "medslurm": {"medslurm"},
}
FILES = [(name, path) for folder, name in FOLDERS.items() for path in sorted((ROOT / folder).glob("*.py"))]
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
FILES += [("medkernels", path) for path in KERNELS]


def imported(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize(("package", "path"), FILES, ids=lambda value: getattr(value, "name", value))
def test_imports_only_leftwards(package: str, path: Path) -> None:
    ours = {name.split(".")[0] for name in imported(path)} & set(ALLOWED)
    assert ours <= ALLOWED[package]


def test_setup_names_every_package() -> None:
    """An installation that is not editable would lack one that is left out."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    named = next(ast.literal_eval(call.value) for call in ast.walk(tree)
                 if isinstance(call, ast.keyword) and call.arg == "packages")  # fmt: skip
    kernels = [f"medkernels.{path.parent.name}" for path in (ROOT / "kernels").glob("*/__init__.py")]
    assert sorted(named) == sorted([*ALLOWED, *kernels])


def test_dali_is_imported_in_pipelines_only() -> None:
    users = {str(path.relative_to(ROOT)) for _, path in FILES if any(n.startswith("nvidia") for n in imported(path))}
    assert users == {"medtrain/pipeline.py", "medseg/pipeline.py", "medcls/pipeline.py"}


def test_triton_is_imported_beside_the_kernels_only() -> None:
    users = {path.name for _, path in FILES if any(name.split(".")[0] == "triton" for name in imported(path))}
    assert users == {"fused.py", "parts.py", "whole.py", "rows.py", "weights.py", "points.py"}


def test_kernels_import_torch_and_triton_only() -> None:
    import sys

    for path in KERNELS:
        others = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names)
        assert others <= {"torch", "triton", "medkernels"}, path


def test_simpleitk_is_imported_in_one_file() -> None:
    users = {path.name for _, path in FILES if "SimpleITK" in imported(path)}
    assert users == {"warp.py"}


@pytest.mark.parametrize(("library", "file"), [("timm", "backbones.py"), ("cv2", "keypoints.py pixels.py")])
def test_libraries_of_images_are_imported_where_they_belong(library: str, file: str) -> None:
    users = {path.name for _, path in FILES if any(name.split(".")[0] == library for name in imported(path))}
    assert users == set(file.split())


@pytest.mark.parametrize("modules", ["medseg.recipes, medseg.door", "medcls.recipes, medcls.door", "medlaunch.sweep"])
def test_what_login_nodes_run_imports_no_torch(modules: str) -> None:
    import subprocess
    import sys

    code = f"import {modules}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("path", [path for _, path in FILES], ids=lambda path: path.name)
def test_no_script_bears_a_standard_library_name(path: Path) -> None:
    import sys

    assert path.stem not in sys.stdlib_module_names


def test_files_and_functions_stay_small() -> None:
    for path in [p for _, p in FILES] + sorted((ROOT / "tests").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"
