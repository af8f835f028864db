"""A small sample of benchmarks/damaged.py: damaged files through the commands that read them."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "damaged.py"


def test_damaged_files_give_the_answer_without_their_damaged_rows_or_a_refusal():
    first = 229355490
    command = [sys.executable, SCRIPT, "--files", "6", "--first", str(first), "--heavy", "1", "--processes", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "6 files, 54 answers, 0 failures" in done.stdout
    assert "same alone 1" in done.stdout
