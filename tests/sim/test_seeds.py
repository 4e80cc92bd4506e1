"""Ten minutes of a cluster of twenty nodes under faults, for 300 seeds.

In processes of their own, which step back behind all else: tests beside them wait for real things.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SEEDS, MINUTES, NODES = 300, 10, 20


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_rule_is_broken_under_faults() -> None:
    command = (
        *("nice", "-n", "10", sys.executable, "-m", "tests.sim", "--seeds", str(SEEDS)),
        *("--minutes", str(MINUTES), "--nodes", str(NODES), "--jobs", str(os.cpu_count() or 1)),
    )
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout.splitlines()[-1] if done.stdout else "")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
