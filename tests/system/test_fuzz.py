"""Readers of files from elsewhere either succeed or say what is wrong, in bounded time and memory, whatever the bytes.

A few seconds a reader; `MEDTRAIN_FUZZ_S=300 python -m pytest tests/system/test_fuzz.py -s` takes that many for all of
them. What fails is made as small as it gets and kept under tests/corpus/, where every later run replays it.
"""

import contextlib
import hashlib
import os
import resource
import signal
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from fuzz_readers import READERS, Reader
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

CORPUS = Path(__file__).resolve().parents[1] / "corpus"
KEPT = sorted(CORPUS.glob("*/*.bin"))
BUDGET_S = float(os.environ.get("MEDTRAIN_FUZZ_S", "0")) / len(READERS) or 2.0
SEED = int(os.environ.get("MEDTRAIN_FUZZ_SEED", "0"))
# Of one input, far above what any takes on a loaded machine.
PATIENCE_S, SPARE = 30, 4 << 30
NUMBERS = (0, 1, -1, 127, 128, 255, 256, 32767, -32768, 2**31 - 1, -(2**31), 2**32 - 1, 2**63 - 1)


@st.composite
def mutated(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A valid file with some bytes flipped, overwritten, cut out, doubled, cut off, or taken from another file."""
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 2, 3, 6)))):
        start = draw(st.integers(0, max(0, len(content) - 1)))
        stop = min(len(content), start + draw(st.integers(1, 64)))
        how = draw(st.sampled_from(("flip", "byte", "number", "delete", "double", "cut", "splice", "insert")))
        if how == "flip" and content:
            content[start] ^= 1 << draw(st.integers(0, 7))
        elif how == "byte" and content:
            content[start] = draw(st.integers(0, 255))
        elif how == "number":
            size, order = draw(st.sampled_from((2, 4, 8))), draw(st.sampled_from(("little", "big")))
            value = draw(st.sampled_from(NUMBERS)) % (1 << 8 * size)
            content[start : start + size] = value.to_bytes(size, order)
        elif how == "delete":
            del content[start:stop]
        elif how == "double":
            content[start:start] = content[start:stop] * draw(st.integers(1, 20))
        elif how == "cut":
            del content[start:]
        elif how == "splice":
            other = draw(st.sampled_from(seeds))
            at = draw(st.integers(0, max(0, len(other) - 1)))
            content[start:stop] = other[at : at + stop - start]
        elif how == "insert":
            content[start:start] = draw(st.binary(max_size=24))
    return bytes(content)


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """At most SPARE bytes more than now, and an alarm that ends what takes PATIENCE_S seconds."""

    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"more than {PATIENCE_S} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="ascii") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (taken + SPARE, hard))
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def attempt(reader: Reader, folder: Path, content: bytes) -> bool:
    """Whether the bytes were read; False where the reader said in one line that they can not be."""
    if not reader.apart:
        return _attempt(reader, folder, content)
    child = os.fork()
    if not child:
        code = 2
        try:
            code = 0 if _attempt(reader, folder, content) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    ended = time.monotonic() + PATIENCE_S
    while not (found := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > ended:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.0005)
    code = os.waitstatus_to_exitcode(found[1])
    assert code in (0, 1), f"ended with {code}"
    return code == 0


def _attempt(reader: Reader, folder: Path, content: bytes) -> bool:
    signal.alarm(PATIENCE_S)
    try:
        reader.read(folder, content)
    except reader.told as error:
        text = str(error).replace(str(folder), "")
        assert len(text.splitlines()) == 1, text
        assert len(text) < 300, text
        return False
    finally:
        signal.alarm(0)
    return True


@pytest.mark.parametrize("path", KEPT, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_what_once_failed(path: Path, tmp_path: Path) -> None:
    reader = READERS[path.parent.name]
    reader.seeds(tmp_path)
    with bounded(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attempt(reader, tmp_path, path.read_bytes())


@pytest.mark.parametrize("name", READERS)
def test_fuzz(name: str, tmp_path: Path) -> None:
    reader = READERS[name]
    seeds = list(reader.seeds(tmp_path))
    for content in seeds:
        assert attempt(reader, tmp_path, content), "a valid file must be read"
    counts, last = {True: 0, False: 0}, [b""]
    ended = time.monotonic() + BUDGET_S

    @settings(max_examples=100, deadline=None, database=None, phases=(Phase.generate, Phase.shrink),
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(mutated(seeds))
    def once(content: bytes) -> None:
        last[0] = content
        (tmp_path / "current.bin").write_bytes(content)  # should the process die of it
        counts[attempt(reader, tmp_path, content)] += 1

    rounds = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while time.monotonic() < ended:
            try:
                with bounded():
                    hypothesis.seed(SEED + rounds)(once)()
            except BaseException:  # the last one is the smallest
                place = CORPUS / name / f"{hashlib.blake2b(last[0], digest_size=6).hexdigest()}.bin"
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(last[0])
                print(f"kept as {place}")
                raise
            rounds += 1
    told = f"{name}: {sum(counts.values())} inputs, {counts[True]} read, {counts[False]} refused"
    print(f"{time.strftime('%Y-%m-%d')} {told}, in {BUDGET_S:.0f} s, hypothesis {hypothesis.__version__}")
    assert counts[False] > 0
