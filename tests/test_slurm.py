"""The scripts of docs/clusters on a real SLURM of one machine; see tests/slurm.sh. Run as root, with OPSIG_SLURM=1."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from opsig_cli import open_trajectory

HERE = Path(__file__).parent
SCRIPTS = HERE.parent / "docs" / "clusters"
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(
        "OPSIG_SLURM" not in os.environ, reason="sets up a SLURM (apt-get install slurm-wlm); OPSIG_SLURM=1"
    ),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A cluster of this machine, and a folder with a run that it can see."""
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([HERE / "slurm.sh", "up", folder / "cluster"], check=True, timeout=120)
    environment = os.environ | {
        "SLURM_CONF": str(folder / "cluster" / "slurm.conf"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }

    def call(*command: object) -> str:
        done = subprocess.run(
            [str(c) for c in command], cwd=folder, env=environment, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, done.stdout + done.stderr + logs(folder)
        return done.stdout

    call(
        "opsig",
        "train",
        "--task",
        "digits",
        "--steps",
        12,
        "--learning-rate",
        0.1,
        "--checkpoint-every",
        2,
        "-o",
        "run.h5",
        "-q",
    )
    try:
        yield folder, call
    finally:
        subprocess.run([HERE / "slurm.sh", "down", folder / "cluster"], check=False)


def logs(folder: Path) -> str:
    return "".join(f"\n== {log.name}\n{log.read_text()}" for log in folder.glob("*.log"))


def test_an_array_tracks_a_run_and_a_job_merges_its_parts(slurm):
    folder, call = slurm
    shutil.copy(folder / "run.h5", folder / "alone.h5")
    call("opsig", "track", "alone.h5", "-q")
    call("sbatch", "--wait", SCRIPTS / "track-array.sh", "run.h5")
    call("sbatch", "--wait", SCRIPTS / "merge.sh", "run.h5")
    assert (folder / "merge.log").read_text().count('"taken"') == 4
    with open_trajectory(folder / "run.h5") as merged, open_trajectory(folder / "alone.h5") as alone:
        assert np.array_equal(merged.losses(), alone.losses())


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_processes_of_a_job_measure_together(slurm, launcher):
    folder, call = slurm
    for name in ("one", "two"):
        shutil.copy(folder / "run.h5", folder / f"{name}.h5")
    command = ["--at", "iterate", "--steps", "8:12:2", "--format", "csv", "-q"]
    call("opsig", "sharpness", "one.h5", *command)
    if launcher == "torchrun":
        call("sbatch", "--wait", SCRIPTS / "torchrun.sh", "sharpness", "two.h5", *command)
    else:
        call("srun", "-n", 2, "opsig", "sharpness", "two.h5", *command)
    with open_trajectory(folder / "one.h5") as one, open_trajectory(folder / "two.h5") as two:
        assert len(two.steps("sharpness")) == 2
        assert np.array_equal(one.rows("sharpness/eigenvalue", 0, 2), two.rows("sharpness/eigenvalue", 0, 2))
