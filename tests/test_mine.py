"""What `mine` ranks by, over which steps, and what it says of each sample."""

import re

import h5py
import numpy as np
import pytest

from opsig_cli import Recorder


def test_shares_of_all_samples_at_a_step_sum_to_the_whole_change(opsig, tiny_run):
    records = opsig("mine", tiny_run, "--step", 9, "--top", 60).records
    assert sum(r["share"] for r in records) == pytest.approx(1)
    with h5py.File(tiny_run) as file:
        losses = file["losses/loss"][8:10]
    for record in records:
        assert record["change"] == pytest.approx(float(np.diff(losses[:, record["sample"]])[0]))


@pytest.mark.parametrize("score", ["change", "oscillation", "variation", "surprise"])
def test_scores_by_name(opsig, tiny_run, score):
    found = opsig("mine", tiny_run, "--score", score, "--top", 60)
    assert found.code == 0, found.err
    assert {r["score_name"] for r in found.records} == {score}
    with h5py.File(tiny_run) as file:
        losses = file["losses/loss"][()]
    for record in found.records[:5]:
        before, after = losses[record["previous_step"]], losses[record["step"]]
        assert record["change"] == after[record["sample"]] - before[record["sample"]]
        assert record["rising"] == np.mean(after > before)
    opsig("mine", tiny_run, "--score", "other").fails(2, "change, oscillation, variation, surprise")


def test_rises_and_falls_are_mined_apart(opsig, tiny_run):
    for score in ("change", "oscillation", "variation", "surprise"):
        for direction in ("up", "down"):
            found = opsig("mine", tiny_run, "--score", score, "--direction", direction).records
            assert found, (score, direction)
            assert {r["direction"] for r in found} == {direction}
    opsig("mine", tiny_run, "--direction", "left").fails(2, "--direction is one of both, up, down, not 'left'")


def test_each_sample_has_its_share_of_the_change_at_a_stated_step(opsig, tiny_run):
    found = opsig("mine", tiny_run, "--share", 9, "--top", 60, "--score", "variation")
    assert sum(r["share_at_step"] for r in found.records) == pytest.approx(1)
    assert {r["share_step"] for r in found.records} == {9}
    assert "carry 100% of all movement at step 9, and 100% of the change there" in found.err
    at_step = {r["sample"]: r["share"] for r in opsig("mine", tiny_run, "--step", 9, "--top", 60).records}
    assert {r["sample"]: r["share_at_step"] for r in found.records} == pytest.approx(at_step)
    opsig("mine", tiny_run, "--share", 99).fails(1, "no losses at step 99")
    opsig("mine", tiny_run, "--share", 0).fails(1, "the first with losses")


def test_the_window_is_chosen_by_the_run_and_said(opsig, tiny_run):
    err = opsig("mine", tiny_run).err
    assert re.search(r"the whole loss rose most at step \d+. Ranked by", err)
    assert "oscillation" in err or "one-step change" in err


def test_a_run_is_mined_up_to_where_its_losses_stop_being_finite(opsig, tmp_path):
    rng = np.random.default_rng(0)
    losses = 9 + np.cumsum(rng.standard_normal((60, 40)), axis=0)
    losses[50:] = np.nan
    for name, rows in (("broken.h5", losses), ("cut.h5", losses[:50])):
        with Recorder(tmp_path / name, samples=40) as recorder:
            for step, row in enumerate(rows):
                recorder.record(step, losses=row)
    for command in (("mine",), ("mine", "--score", "variation"), ("mine", "--window", "20:55"), ("cluster",)):
        broken, cut = (opsig(command[0], tmp_path / name, *command[1:]) for name in ("broken.h5", "cut.h5"))
        assert broken.code == 0, broken.err
        assert broken.out.replace("broken.h5", "cut.h5") == cut.out
        assert "from step 50 on losses are not finite: only the steps before it are looked at" in broken.err
        assert "not finite" not in cut.err
    opsig("mine", tmp_path / "broken.h5", "--window", "50:59").fails(1, "losses are not finite at step 50")
    opsig("mine", tmp_path / "broken.h5", "--step", 50).fails(1, "losses are not finite at step 50")
