"""The benchmarks' README shows what was recorded."""

from pathlib import Path

from bench.record import RESULTS, newest


def test_the_readme_shows_the_newest_rows() -> None:
    assert newest() in Path(RESULTS).with_name("README.md").read_text(encoding="utf-8")
