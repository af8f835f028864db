"""What `sharpness` measures, keeps in the file and prints."""

import shutil
import subprocess
import sys

import h5py
import pytest
from conftest import TASKS

OWN = ("--task", f"{TASKS}:Tiny")


def test_sharpness_fills_what_is_missing_and_keeps_it(opsig, tiny_run, tmp_path):
    run = shutil.copy(tiny_run, tmp_path / "run.h5")
    some = opsig("sharpness", run, *OWN, "-k", 2, "--steps", "0:30:5")
    assert some.code == 0
    assert {r["step"] for r in some.records} == {0, 15, 30}
    first = some.records[0]
    assert first["eigenvalue"] > some.records[1]["eigenvalue"]
    assert first["threshold"] == pytest.approx(2 / 0.5)
    assert first["converged"]
    assert sum(first["layer_fraction"].values()) == pytest.approx(1)
    whole = opsig("sharpness", run, *OWN, "-k", 2, "--figure", tmp_path / "s.png")
    assert "measured already: 3 of" in whole.err
    assert len(whole.records) == 42
    assert whole.records[0] == first
    assert (tmp_path / "s.png").stat().st_size > 10_000
    opsig("sharpness", run, *OWN, "-k", 3).fails(1, "holds 2 eigenvalues a step, not 3", "--replace")
    assert opsig("sharpness", run, *OWN).records == [r for r in whole.records if r["rank"] == 1]
    again = opsig("sharpness", run, *OWN, "--replace", "--steps", "15")
    assert [(r["step"], r["rank"]) for r in again.records] == [(15, 1)]
    assert opsig("verify", run).code == 0


def test_curvature_of_piped_samples_has_the_whole_curvature_for_its_mean(opsig, tiny_run, tmp_path):
    run = shutil.copy(tiny_run, tmp_path / "run.h5")
    (eigenvalue,) = [r["eigenvalue"] for r in opsig("sharpness", run, *OWN, "--steps", "60", "--at", "iterate").records]
    every = opsig("sharpness", run, *OWN, "--steps", "60", "--metrics", "gradient_norm,curvature").records
    assert sum(r["curvature"] for r in every) / 60 == pytest.approx(eigenvalue, rel=1e-3)
    mined = opsig("mine", run, "--top", 5).out
    metrics = ("--metrics", "gradient_norm,curvature,sample_sharpness", "--random", 5)
    chosen = opsig("sharpness", "-", *OWN, *metrics, "--figure", tmp_path / "f.png", stdin=mined).records
    assert {r["set"] for r in chosen} == {"chosen", "random"}
    assert len(chosen) == 10 * 21
    same = {r["sample"]: r for r in chosen if r["step"] == 60}
    for record in every:
        if record["sample"] in same:
            assert same[record["sample"]]["curvature"] == pytest.approx(record["curvature"], rel=1e-4, abs=1e-6)
            assert same[record["sample"]]["sample_sharpness"] >= record["curvature"] - 1e-4


def test_a_slice_shows_groups_along_the_top_eigenvector(opsig, tiny_run, tmp_path):
    groups = opsig("cluster", tiny_run, *OWN).out
    figure = ("--figure", tmp_path / "slice.png")
    records = opsig("sharpness", "-", *OWN, "--slice", 60, "--span", 0.5, *figure, stdin=groups).records
    assert len(records) == 41
    assert {"all samples", "G1", "G2"} <= set(records[0]["losses"])
    with h5py.File(tiny_run) as file:
        middle = float(file["losses/loss"][60].mean())
    assert records[20]["losses"]["all samples"] == pytest.approx(middle, rel=1e-4)


def test_cheap_curvature_and_mistakes_about_metrics(opsig, tiny_run, tmp_path):
    for metrics, words in (
        ("trace,critical_sharpness", ("standard error", "spectral density at step 30", "2 / learning rate")),
        ("critical_sharpness", ("2 / learning rate",)),
        ("trace", ("standard error", "spectral density at step 30")),
    ):
        figure = tmp_path / f"{metrics}.svg"
        drawn = ("--figure", figure, "--steps", "27:30")
        assert opsig("sharpness", tiny_run, *OWN, "--metrics", metrics, *drawn).code == 0
        assert all(word in figure.read_text() for word in words)
    (record,) = opsig("sharpness", tiny_run, *OWN, "--metrics", "trace,critical_sharpness", "--steps", "30").records
    assert record["trace"] > record["trace_error"] > 0
    assert record["critical_sharpness"] > 0
    assert record["threshold"] == 4
    assert sum(record["density_weights"]) == pytest.approx(419)
    opsig("sharpness", tiny_run, *OWN, "--metrics", "beauty").fails(2, "no metric is called 'beauty'", "curvature")
    both = opsig("sharpness", tiny_run, *OWN, "--metrics", "gradient_norm,trace")
    both.fails(2, "gradient_norm is of single samples and trace of the whole loss", "--metrics trace")
    opsig("sharpness", tiny_run, *OWN, "--steps", "70:80").fails(1, "no checkpoint at --steps 70:80", "0 to 60")
    opsig("sharpness", tiny_run, *OWN, "--steps", "a:b").fails(2, "is not a range of steps")


def test_critical_sharpness_says_when_it_does_not_go_along_the_update(opsig, tiny_run, tmp_path):
    run = shutil.copy(tiny_run, tmp_path / "run.h5")
    arguments = ("sharpness", run, *OWN, "--metrics", "critical_sharpness", "--steps", "30")
    assert "negative gradient" not in opsig(*arguments).err
    with h5py.File(run, "r+") as file:
        del file.attrs["settings_json"]
    found = opsig(*arguments)
    assert "does not say how it was trained: critical sharpness is along the negative gradient" in found.err
    assert found.records[0]["threshold"] is None


def test_sharpness_that_is_in_the_file_needs_no_torch_and_no_task(tiny_run, opsig, tmp_path):
    run = shutil.copy(tiny_run, tmp_path / "run.h5")
    arguments = ["sharpness", run, "--steps", "0:20"]
    measured = opsig(*arguments, *OWN)
    code = (
        f"import sys; sys.argv = ['opsig', *{[str(word) for word in arguments]!r}]\n"
        "from opsig_cli.main import run\n"
        "run()\n"
        "assert not {'torch', 'sklearn', 'scipy', 'matplotlib'} & set(sys.modules)\n"
    )
    again = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert again.stdout == measured.out
