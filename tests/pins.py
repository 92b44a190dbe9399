"""The versions in constraints.txt against what is installed: `python tests/pins.py` tells what differs,
`python tests/pins.py --renew` writes the installed versions into the file and keeps its comments.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "constraints.txt"
PIN = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>\S+)")
# What torch itself pins, in its CUDA builds only: another build of torch must stay free to ask for others.
TORCHS_OWN = ("nvidia-", "cuda-", "triton")
ADDED = "# what these need"


def asked_for(setup: Path = ROOT / "setup.py") -> list[str]:
    """The requirements of the project and of all its extras, as setup.py lists them."""
    call = next(
        node for node in ast.walk(ast.parse(setup.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setup"
    )  # fmt: skip
    given = {word.arg: word.value for word in call.keywords}
    extras = ast.literal_eval(given["extras_require"])
    return [*ast.literal_eval(given["install_requires"]), *(name for names in extras.values() for name in names)]


def closure(requirements: Iterable[str]) -> dict[str, str]:
    """Every installed distribution that these need, by its canonical name, with its version without a local part."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(Requirement(text), "") for text in requirements]
    while waiting:
        requirement, parent = waiting.pop()
        name = canonicalize_name(requirement.name)
        if parent == "torch" and name.startswith(TORCHS_OWN):
            continue
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                installed = metadata.distribution(name)
            except metadata.PackageNotFoundError:
                continue
            found[name] = Version(installed.version).public
            needs = (Requirement(text) for text in installed.requires or ())
            waiting += [(r, name) for r in needs if r.marker is None or r.marker.evaluate({"extra": extra})]
    return found


def pins(text: str) -> dict[str, str]:
    """The versions that a constraints file pins."""
    matches = (PIN.fullmatch(line.split("#")[0].strip()) for line in text.splitlines())
    return {canonicalize_name(m["name"]): m["version"] for m in matches if m}


def problems(installed: Mapping[str, str], text: str) -> list[str]:
    """What the file does not pin, or pins to another version than the installed one."""
    pinned = pins(text)
    told = [f"{name}=={version} is not pinned" for name, version in installed.items() if name not in pinned]
    told += [
        f"{name} is pinned to {pinned[name]}, installed is {version}"
        for name, version in installed.items()
        if name in pinned and pinned[name] != version
    ]
    return sorted(told)


def renewed(installed: Mapping[str, str], text: str) -> str:
    """The file with the installed versions; comments, order, and pins of what is not installed stay."""
    lines, left = [], dict(installed)
    for line in text.splitlines():
        match = PIN.match(line)
        name = canonicalize_name(match["name"]) if match else ""
        version = left.pop(name, None)
        lines.append(PIN.sub(f"{match['name']}=={version}", line, count=1) if match and version else line)
    if left and ADDED not in lines:
        lines.append(ADDED)
    at = lines.index(ADDED) + 1 if left else len(lines)
    end = next((n for n in range(at, len(lines)) if not PIN.match(lines[n])), len(lines))
    added = [*lines[at:end], *(f"{name}=={version}" for name, version in left.items())]
    return "\n".join([*lines[:at], *sorted(added), *lines[end:]]) + "\n"


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--renew", action="store_true", help="write the installed versions into constraints.txt")
    options = parser.parse_args()
    installed, text = closure(asked_for()), FILE.read_text(encoding="utf-8")
    if options.renew:
        FILE.write_text(renewed(installed, text), encoding="utf-8")
        return 0
    told = problems(installed, text)
    print("\n".join(told) or f"{len(installed)} installed packages are pinned")
    return 2 if told else 0


if __name__ == "__main__":
    sys.exit(main())
