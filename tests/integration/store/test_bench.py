"""The benchmark runs and ends as its readers expect."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_the_benchmark_ends_with_its_numbers() -> None:
    out = subprocess.run(
        [sys.executable, "-m", "tests.bench.store", "--rounds=1", "--tx=300", "--tasks=500"],
        cwd=ROOT,
        check=True,
        timeout=60,
        capture_output=True,
        text=True,
    ).stdout
    assert re.fullmatch(r"tx_per_s=\d+ tasks_per_s=\d+", out.splitlines()[-1])
