"""What the tests share: the command line as users call it, and small runs."""

import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # tiny tensors: more threads only wait for each other, long on a busy machine

TASKS = Path(__file__).parent / "tasks" / "tiny.py"


def pytest_runtest_setup(item):
    """Tests marked long are run where they are asked for."""
    if item.get_closest_marker("long") and "long" not in item.config.option.markexpr:
        pytest.skip("takes long: -m long")


@dataclass
class Outcome:
    """What a command left: its exit code, stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def records(self) -> list[dict]:
        return [json.loads(line) for line in self.out.splitlines()]

    def fails(self, code: int, *words: str) -> None:
        """Assert that the command ended with this code and one line on stderr that holds the words."""
        lines = [line for line in self.err.splitlines() if not line.startswith("device:")]
        assert self.code == code, self.err
        assert len(lines) == 1, self.err
        for word in words:
            assert word in lines[0], lines[0]


@pytest.fixture
def opsig(monkeypatch, capsys):
    """Call the command line in this process: opsig("mine", path, stdin="...")."""
    from opsig_cli.main import run

    def call(*arguments: object, stdin: str = "") -> Outcome:
        monkeypatch.setattr(sys, "argv", ["opsig", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        try:
            run()
            code = 0
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else 1
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


def start_opsig(*arguments: object, **keywords) -> subprocess.Popen:
    """The command line in a process of its own."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "opsig_cli.main", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **keywords,
    )  # fmt: skip


def train_tiny(path: Path, *more: object, task: str = "Tiny", steps: int = 60) -> list[object]:
    """Arguments of a short tracked run on a task of tests/tasks/tiny.py."""
    return [
        "train",
        "--task",
        f"{TASKS}:{task}",
        "-o",
        path,
        "--steps",
        steps,
        "--learning-rate",
        0.5,
        "--track",
        *more,
    ]


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """A short tracked run, made once; tests copy it before they change it."""
    path = tmp_path_factory.mktemp("runs") / "tiny.h5"
    process = start_opsig(*train_tiny(path))
    _, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    return path


@pytest.fixture
def run(tiny_run, tmp_path):
    """The short run, to be changed, in an empty folder."""
    return shutil.copy(tiny_run, tmp_path / "run.h5")
