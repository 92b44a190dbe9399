"""No source unpickles, evaluates, or hands text to a shell; torch.load reads data only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("medtrain", "medseg", "medcls", "launch", "slurm")
FILES = [path for folder in FOLDERS for path in (ROOT / folder).glob("*.py")]
FORBIDDEN = {
    "eval", "exec", "compile", "os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler",
    "cloudpickle.load", "cloudpickle.loads", "joblib.load", "yaml.load", "yaml.unsafe_load", "tarfile.open",
    "shutil.unpack_archive", "marshal.loads", "subprocess.getoutput", "subprocess.getstatusoutput",
}  # fmt: skip


def called(node: ast.Call) -> str:
    """The dotted name of what is called."""
    parts = []
    inner: ast.expr = node.func
    while isinstance(inner, ast.Attribute):
        parts.append(inner.attr)
        inner = inner.value
    return ".".join([inner.id if isinstance(inner, ast.Name) else "?", *reversed(parts)])


def faults(text: str) -> list[str]:
    """What a source does that it may not."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        name, given = called(node), {word.arg: word.value for word in node.keywords}
        if name in FORBIDDEN or name.rsplit(".", 1)[-1] in ("extractall", "extract"):
            found.append(f"{name} in line {node.lineno}")
        if name == "torch.load" and ast.unparse(given.get("weights_only", ast.Constant(None))) != "True":
            found.append(f"torch.load without weights_only=True in line {node.lineno}")
        if name in ("np.load", "numpy.load") and "allow_pickle" in given:
            found.append(f"numpy.load of pickles in line {node.lineno}")
        if "shell" in given:
            found.append(f"{name} with shell= in line {node.lineno}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_sources_open_no_door(path: Path) -> None:
    assert faults(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    ["eval(x)", "import pickle\npickle.load(f)", "torch.load(p)", "torch.load(p, weights_only=False)",
     "subprocess.run(x, shell=True)", "z.extractall(p)", "yaml.load(f)", "np.load(p, allow_pickle=True)"],
)  # fmt: skip
def test_the_scan_finds_open_doors(text: str) -> None:
    assert len(faults(text)) == 1


def test_the_scan_lets_closed_doors_be() -> None:
    assert faults("torch.load(p, weights_only=True)\nsubprocess.run(['ls'])\nre.compile\nmodel.eval()") == []
