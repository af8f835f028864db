"""What `probe` makes of inputs and of iterates."""

import shutil

import numpy as np
import pytest
from conftest import TASKS, start_opsig

OWN = ("--task", f"{TASKS}:Tiny")


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("digits") / "digits.h5"
    options = ("--model", "mlp:width=16", "--steps", 30, "--learning-rate", 0.5, "--checkpoint-every", 5)
    process = start_opsig("train", "--task", "digits", *options, "-o", path)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return path


def test_probes_are_what_the_model_makes_of_the_inputs(opsig, digits_run, tmp_path):
    np.save(tmp_path / "grey.npy", np.full((8, 8), 128, np.uint8))
    inputs = ("color:white", "color:#808080", str(tmp_path / "grey.npy"), "sample:3")
    options = [word for name in inputs for word in ("--input", name)]
    records = opsig("probe", digits_run, *options, "--figure", tmp_path / "p.png").records
    assert len(records) == 4 * 7
    last = {r["input"]: r for r in records if r["step"] == 30}
    np.testing.assert_allclose(last[inputs[1]]["logits"], last[inputs[2]]["logits"], rtol=1e-5)
    for record in records:
        assert sum(record["probabilities"]) == pytest.approx(1)
        assert record["probability"] == max(record["probabilities"])
        assert record["feature_norm"] > 0
    assert last["sample:3"]["predicted"] == "3"
    from opsig_torch import TorchBackend
    from opsig_zoo import Digits

    from opsig_cli.trajectory.file import open_trajectory
    from opsig_cli.trajectory.states import read_state

    session = TorchBackend().open(Digits(model="mlp:width=16"))
    with open_trajectory(digits_run) as run:
        state = read_state(run, 30)
    losses = session.losses([state])[0][0]
    assert losses[3] == pytest.approx(-np.log(last["sample:3"]["probabilities"][3]), rel=1e-4)
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_projections_along_the_first_crossing(opsig, digits_run, tmp_path):
    run = shutil.copy(digits_run, tmp_path / "run.h5")
    opsig("probe", run, "--projection").fails(1, "sharpness/eigenvector", "Run: opsig sharpness --at iterate")
    found = opsig("sharpness", run, "--at", "iterate").records
    assert any(r["eigenvalue"] > r["threshold"] for r in found), found
    records = opsig("probe", run, "--projection", "--against", digits_run, "--figure", tmp_path / "p.png").records
    crossing = records[0]["crossing_step"]
    iterates = [r for r in records if r["kind"] == "iterate"]
    here = [r for r in iterates if r["step"] == crossing]
    assert [r["projection"] for r in here] == pytest.approx([0, 0], abs=1e-6)
    assert len(iterates) == 14


def test_mistakes_about_probes(opsig, digits_run, tiny_run, tmp_path):
    opsig("probe", digits_run).fails(2, "either --input or --projection")
    opsig("probe", digits_run, "--input", "color:mauve").fails(2, "no such colour", "sky")
    opsig("probe", digits_run, "--input", "nothing.png").fails(1, "neither a file")
    opsig("probe", digits_run, "--input", "sample:99999").fails(1, "no sample 99999")
    (tmp_path / "x.png").write_text("no picture")
    opsig("probe", digits_run, "--input", tmp_path / "x.png").fails(1, "cannot be read")
    np.save(tmp_path / "x.npy", np.zeros((3, 3)))
    opsig("probe", digits_run, "--input", tmp_path / "x.npy").fails(1, "the task's pictures are (8, 8, 1)")
    opsig("probe", tiny_run, *OWN, "--input", "color:red").fails(1, "cannot be probed")
