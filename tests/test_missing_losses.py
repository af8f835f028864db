"""Losses that were not measured are gaps, and those that are not finite are named."""

import re
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import TASKS
from hypothesis import given, settings
from hypothesis import strategies as st
from test_values import write_losses

from opsig_cli.analysis.coverage import coverage
from opsig_cli.studies.filled import coverage_of, filled
from opsig_cli.trajectory.file import open_trajectory


def swinging(steps=120, samples=40):
    """Losses that fall with noise, and of which samples 0 to 3 swing at period two against 4 to 7."""
    draw = np.random.default_rng(0)
    losses = np.exp(-np.arange(steps) / 40)[:, None] * (0.5 + draw.random(samples))
    losses += 0.05 * draw.random((steps, samples))
    swing = np.where(np.arange(steps) % 2, 0.6, -0.6)[:, None]
    losses[:, :4] += 1 + swing
    losses[:, 4:8] += 1 - swing
    return losses


def in_batches(losses, size=10):
    """Each sample at the one step of every epoch whose batch has it."""
    draw, seen = np.random.default_rng(1), np.full(losses.shape, np.nan)
    per_epoch = losses.shape[1] // size
    for step in range(len(losses)):
        if step % per_epoch == 0:
            order = draw.permutation(losses.shape[1])
        batch = order[step % per_epoch * size :][:size]
        seen[step, batch] = losses[step, batch]
    return seen


def test_a_loss_that_was_not_measured_is_a_gap_and_no_divergence(opsig, tmp_path):
    whole = opsig("mine", write_losses(tmp_path / "whole.h5", swinging()), "--top", 8)
    losses = swinging()
    losses[60, 9] = np.nan
    run = write_losses(tmp_path / "gap.h5", losses)
    found = opsig("mine", run, "--top", 8)
    assert "1 of 4,800 losses were not measured" in found.err
    assert "not finite" not in found.err
    for left, right in zip(whole.records, found.records, strict=True):
        assert left["sample"] == right["sample"]
        assert left["score"] == pytest.approx(right["score"], rel=1e-3)
    grouped = opsig("cluster", run)
    members = {r["sample"]: r["side"] for r in grouped.records if r["kind"] == "member" and r["pair"] == 1}
    assert [members[sample] for sample in range(8)] == [members[0]] * 4 + [-members[0]] * 4
    assert opsig("report", run, "-q").code == 0
    assert "not finite" not in (tmp_path / "gap.html").read_text()


def test_samples_seen_once_an_epoch_are_a_measured_run_with_gaps(opsig, tmp_path):
    losses = in_batches(swinging())
    run = write_losses(tmp_path / "sparse.h5", losses)
    found = opsig("mine", run, "--top", 8, "--figure", tmp_path / "m.png")
    assert found.code == 0, found.err
    assert "3,600 of 4,800 losses were not measured" in found.err
    assert "not finite" not in found.err
    for record in found.records:
        column = losses[:, record["sample"]]
        at, before = record["step"], record["previous_step"]
        assert record["change"] == pytest.approx(column[at] - column[before], abs=1e-6)
        assert np.isnan(column[before + 1 : at]).all()
    assert {r["sample"] for r in found.records} == set(range(8))
    for command in ("cluster", "report"):
        outcome = opsig(command, run)
        assert outcome.code == 0, outcome.err
        assert "losses were not measured" in outcome.err
    (compared,) = opsig("compare", run).records
    assert compared["loss"] == pytest.approx(np.nanmean(losses[-1]), rel=1e-6)


def test_a_sample_that_is_not_finite_while_the_others_are_is_named_first(opsig, tmp_path):
    losses = swinging()
    losses[:, 17] = np.nan
    losses[50:, 23] = np.inf
    run = write_losses(tmp_path / "run.h5", losses, [f"kind {i % 3}" for i in range(40)])
    named = "not finite while other losses are: sample 17 (label kind 2) from step 0 on, sample 23 (label kind 2)"
    for command in ("mine", "cluster"):
        found = opsig(command, run)
        assert found.code == 0, found.err
        assert [(r["kind"], r["sample"], r["label"], r["step"]) for r in found.records[:2]] == [
            ("not_finite", 17, "kind 2", 0), ("not_finite", 23, "kind 2", 50),
        ]  # fmt: skip
        assert found.err.startswith(f"note: {named}")
        assert "losses were not measured" not in found.err
        assert opsig(command, run, "--format", "table").out.startswith("samples whose loss is not finite")
    mined = opsig("mine", run, "--top", 40)
    assert 17 not in {r["sample"] for r in mined.records if "rank" in r}
    assert opsig("cluster", "-", stdin=mined.out).code == 0
    assert opsig("report", run, "-q").code == 0
    assert "sample 17 (label kind 2) from step 0 on" in (tmp_path / "run.html").read_text()
    opsig("mine", write_losses(tmp_path / "one.h5", losses[:1])).fails(1, "sample 17 from step 0 on", "at least two")


def test_a_run_that_diverges_ends_at_the_step_where_most_losses_do(opsig, tmp_path):
    for seen in (swinging(), in_batches(swinging())):
        losses = seen.copy()
        losses[80:] = np.nan
        losses[79, 5] = np.inf
        run = write_losses(tmp_path / f"{np.isnan(seen).any()}.h5", losses)
        found = opsig("mine", run, "--top", 3)
        assert found.code == 0, found.err
        assert re.search(r"from step (79|80) on losses are not finite: only the steps before it", found.err)
        assert found.records[-1]["window"][0] == 0
        assert found.records[-1]["window"][1] in (78, 79)
    opsig("mine", write_losses(tmp_path / "never.h5", np.full((5, 4), np.nan))).fails(1, "not finite at step 0")


def test_the_whole_loss_is_not_said_to_rise_where_it_never_does(opsig, tmp_path):
    falls = np.exp(-np.arange(40) / 9)[:, None] * np.linspace(1, 2, 12)
    run = write_losses(tmp_path / "a.h5", falls)
    assert "the whole loss never rose" in opsig("mine", run).err
    assert opsig("report", run, "-q").code == 0
    page = (tmp_path / "a.html").read_text()
    assert "never rose" in page
    assert "rises most" not in page
    assert "largest rise" not in page.lower()


@settings(max_examples=60, deadline=None)
@given(
    cut=st.lists(st.integers(1, 29), max_size=4, unique=True),
    holes=st.lists(st.tuples(st.integers(0, 29), st.integers(0, 4)), max_size=40),
    start=st.integers(0, 29),
)
def test_what_is_held_is_the_last_loss_that_was_measured(tmp_path_factory, cut, holes, start):
    losses = np.random.default_rng(0).random((30, 5)).astype(np.float32)
    for row, column in holes:
        losses[row, column] = np.nan
    expected = losses.copy()
    for column in expected.T:
        known = np.flatnonzero(np.isfinite(column))
        for row in range(30):
            before = known[known <= row]
            column[row] = column[before[-1]] if len(before) else column[known[0]] if len(known) else 0
    path = write_losses(tmp_path_factory.mktemp("held") / "run.h5", losses)
    with open_trajectory(path) as run:
        whole = coverage((part for part in np.split(losses, sorted(cut))), 5)
        assert coverage_of(run).gaps == whole.gaps
        run = filled(run, replace(whole, diverged=None))
        np.testing.assert_array_equal(run.rows("losses/loss", start, 30), expected[start:])
        np.testing.assert_array_equal(run.series("losses/loss", np.array([3, 1]), start), expected[start:, [3, 1]])
        blocks = [rows for _, rows in run.blocks("losses/loss", start)]
        np.testing.assert_array_equal(np.concatenate(blocks), expected[start:])


@pytest.mark.parametrize("seed", range(4))
def test_losses_with_random_holes_end_no_command_in_a_traceback(tmp_path, seed, monkeypatch):
    monkeypatch.syspath_prepend(str(TASKS.parents[2] / "benchmarks"))
    monkeypatch.setattr(sys, "argv", [])
    import missing  # pyright: ignore[reportMissingImports]

    assert missing.problems(seed, tmp_path) == []
