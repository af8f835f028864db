"""A few of the faults that benchmarks/faults.py has by the thousand; in a process that has not run autograd."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

LONG_FORM = Path(__file__).parent.parent / "benchmarks" / "faults.py"


@pytest.mark.timeout(900)
def test_commands_lose_mix_and_hide_nothing_whatever_call_fails():
    first = random.randrange(1, 300)
    options = ["--every", "300", "--first", str(first), "--kind", "kill,EIO,short"]
    done = subprocess.run([sys.executable, str(LONG_FORM), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("experiments") > 25
    assert not found, done.stdout
