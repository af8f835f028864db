"""What `cluster` prints of groups and pairs, and from which samples, steps and checkpoints."""

import h5py
import numpy as np
import pytest
from conftest import TASKS

from opsig_cli import Recorder

OWN = ("--task", f"{TASKS}:Tiny")


def test_groups_come_from_the_window_that_was_mined_or_asked_for(opsig, tiny_run):
    mined = opsig("mine", tiny_run, "--top", 60, "--window", "10:25").out
    piped = opsig("cluster", "-", *OWN, stdin=mined)
    assert piped.out == opsig("cluster", "-", *OWN, "--window", "10:25", stdin=mined).out
    assert piped.out != opsig("cluster", "-", *OWN, "--window", "0:59", stdin=mined).out
    assert all(10 < r["rise_step"] <= 25 for r in piped.records if r["kind"] == "pair")
    one = opsig("mine", tiny_run, "--top", 60, "--step", 9).out  # one change is no window to group by
    assert opsig("cluster", "-", *OWN, stdin=one).code == 0
    opsig("cluster", tiny_run, *OWN, "--window", "10:11").fails(1, "too few steps", "Widen --window")
    opsig("cluster", tiny_run, *OWN, "--window", "10-11").fails(2, "--window '10-11' is not a range")


def test_mine_and_cluster_chain(opsig, tiny_run):
    mined = opsig("mine", tiny_run, "--top", 60)
    grouped = opsig("cluster", "-", *OWN, stdin=mined.out)
    assert grouped.code == 0
    pairs = [r for r in grouped.records if r["kind"] == "pair"]
    members = [r for r in grouped.records if r["kind"] == "member"]
    groups = [r for r in grouped.records if r["kind"] == "group"]
    assert pairs
    assert {r["group"] for r in groups} == {m["group"] for m in members}
    for pair in pairs:
        for group, size, side in zip(pair["groups"], pair["sizes"], (1, -1), strict=True):
            found = [m for m in members if m["group"] == group and m["pair"] == pair["pair"]]
            assert len(found) == size
            (record,) = [r for r in groups if r["group"] == group]
            assert {m["side"] for m in found} == {side}
            if record["pair"] == pair["pair"]:
                assert record["side"] == side
                assert {record["partner"], group} == set(pair["groups"])
        assert pair["opposition"] < 0
        assert ("pull against each other" in pair["sentence"]) == (pair["verdict"] == "established")


def test_cluster_twice_gives_the_same_bytes(opsig, tiny_run):
    first, second = (opsig("cluster", tiny_run, *OWN) for _ in range(2))
    assert first.out == second.out


def test_losses_alone_can_be_grouped_without_the_task_and_say_what_they_cannot_tell(opsig, tiny_run):
    outcome = opsig("cluster", tiny_run, "--by", "loss")
    assert outcome.code == 0
    pairs = [r for r in outcome.records if r["kind"] == "pair"]
    assert pairs
    for record in outcome.records:
        if record["kind"] in ("pair", "group"):
            assert record["by"] == "loss"
            assert "of the movement here is period two" in record["caveat"]
    assert "Gradients tell" in outcome.err


def test_a_file_with_losses_alone_is_grouped_by_them_and_says_so(opsig, tmp_path):

    generator = np.random.default_rng(0)
    shared = np.cumsum(generator.standard_normal(300))
    sides = np.repeat([1.0, -1.0, 0.0], [10, 10, 20])
    losses = 60 + np.outer(shared, sides) + 0.3 * generator.standard_normal((300, 40))
    with Recorder(tmp_path / "run.h5", samples=40) as recorder:
        for step, row in enumerate(losses):
            recorder.record(step, losses=row.astype(np.float32))
    found = opsig("cluster", tmp_path / "run.h5")
    assert found.code == 0, found.err
    assert "holds no checkpoints, so samples are grouped by their losses alone" in found.err
    assert found.out == opsig("cluster", tmp_path / "run.h5", "--by", "loss").out
    (pair,) = [r for r in found.records if r["kind"] == "pair"]
    members = [r for r in found.records if r["kind"] == "member"]
    sides = {frozenset(r["sample"] for r in members if r["group"] == group) for group in pair["groups"]}
    assert sides == {frozenset(range(10)), frozenset(range(10, 20))}
    assert pair["p_value"] == 0.01  # the least that the rounds can give
    assert (pair["verdict"], pair["silencing"]) == ("unclear", None)  # losses alone establish nothing
    assert "move together by chance" in pair["caveat"]
    opsig("cluster", tmp_path / "run.h5", "--by", "gradient").fails(1, "holds no checkpoints", "Use --by loss")


def test_a_sketch_says_its_band_and_what_is_found_is_exact(opsig, tiny_run):
    exact = opsig("cluster", tiny_run, *OWN).records
    found = opsig("cluster", tiny_run, *OWN, "--sketch", 4096).records
    sides = [[(r["sample"], r["group"]) for r in records if r["kind"] == "member"] for records in (exact, found)]
    assert sides[0] == sides[1]
    for one, other in zip(exact, found, strict=True):
        if one["kind"] == "pair":
            found_on = exact[-1]["found_on"]
            assert other["sketch_error"] == pytest.approx(3 * (2 / 4096 / len(found_on)) ** 0.5)
            assert other["opposition"] == pytest.approx(one["opposition"], abs=1e-9)
    opsig("cluster", tiny_run, *OWN, "--sketch", 9).fails(2, "--sketch 9 has an error band", "Give at least")
    opsig("cluster", tiny_run, "--by", "loss", "--sketch", 999).fails(2, "--sketch is of gradients")


def test_every_group_carries_its_evidence(opsig, tiny_run):
    records = opsig("cluster", tiny_run, *OWN).records
    groups = [r for r in records if r["kind"] == "group"]
    assert [g["group"] for g in groups] == list(range(1, len(groups) + 1))
    for group in groups:
        assert 0 < group["p_value"] <= 1
        assert 0 <= group["stability"] <= 1
        assert 0 <= group["stability_checkpoints"] <= 1
        assert sum(group["labels"].values()) == group["size"]
        assert group["sentence"].startswith(f"G{group['group']} (")
        if group["pair"] is None:
            assert "no group pulls against it" in group["sentence"]
    with h5py.File(tiny_run) as file:
        step = groups[0]["rise_step"]
        change = np.diff(file["losses/loss"][step - 1 : step + 1].astype(float), axis=0)[0]
    for group in groups:
        members = list({
            r["sample"] for r in records if r["kind"] == "member" and r["group"] == group["group"] and r["mined"]
        })  # fmt: skip
        assert group["change"] == pytest.approx(change[members].mean())
        assert group["movement"] == pytest.approx(np.abs(change[members]).sum() / np.abs(change).sum())
        if change.sum() >= 0.1 * np.abs(change).sum():
            assert group["share"] == pytest.approx(change[members].sum() / change.sum())
        else:
            assert group["share"] is None


def test_pairs_carry_their_evidence(opsig, tiny_run):
    pairs = [r for r in opsig("cluster", tiny_run, *OWN).records if r["kind"] == "pair"]
    for pair in pairs:
        assert -1 <= pair["opposition"] < 0 < pair["cohesion"] <= 1
        assert 0 < pair["p_value"] <= 1
        assert 0 <= pair["stability"] <= 1
        assert pair["opposition_error"] > 0
        low, high = pair["opposition_interval"]
        assert low < pair["opposition"] < high
        assert pair["verdict"] in ("established", "likely", "unclear", "refuted")
        assert sum(map(len, pair["labels"])) >= 2


def test_groups_are_found_on_some_checkpoints_and_tested_on_others(opsig, tiny_run):
    tests = opsig("cluster", tiny_run, *OWN).records[-1]
    assert tests["kind"] == "tests"
    assert len(tests["held_out"]) > 1
    assert not set(tests["held_out"]) & set(tests["found_on"])
    assert set(tests["replayed_from"]) <= set(tests["held_out"])
    opsig("cluster", tiny_run, *OWN, "--test", "all").fails(2, "--test is one of replay, held-out, none, not 'all'")


def test_a_planted_pair_swings_by_itself(opsig, tmp_path):
    """Silence of its sides ends its swing, that of as many others does not; without that test it is established by
    its curvature and what held-out checkpoints show, and without any test it is not."""
    task = "planted:pairs=1,side=12,samples=300,size=14,patch=4,seed=3"
    run = tmp_path / "run.h5"
    train = ("train", "--task", task, "--model", "mlp:width=16", "--learning-rate", 0.15, "--steps", 120)
    assert opsig(*train, "--checkpoint-every", 8, "--track", "-o", run).code == 0
    records = opsig("cluster", run, "--truth").records
    (planted,) = [r for r in records if r["kind"] == "pair" and r["sizes"] == [12, 12]]
    assert planted["verdict"] == "established"
    assert planted["silencing"] > 0.9 > 0.4 > planted["silencing_control"]
    assert all(0.5 > one["swing_ratio"] >= one["silent"] / one["controls"] for one in planted["silenced"])
    assert f"Silencing both sides removes {planted['silencing']:.0%} of their swing" in planted["sentence"]
    agreed = next(r for r in records if r["kind"] == "agreement")
    assert (agreed["pair_precision"], agreed["pair_recall"]) == (1, 1)
    tests = next(r for r in records if r["kind"] == "tests")
    assert 0 < tests["replays"] * 5 == tests["replayed_steps"] <= 400
    for arguments, verdict in ((("--test", "none"), "unclear"), (("--budget", 0), "established")):
        others = [r for r in opsig("cluster", run, *arguments).records if r["kind"] == "pair"]
        (other,) = [r for r in others if r["sizes"] == [12, 12]]
        assert (other["verdict"], other["silenced"]) == (verdict, [])
        assert (other["curvature_ratio"] or 1) < 0.2 if "--budget" in arguments else other["curvature_ratio"] is None
        assert other["opposition"] == pytest.approx(planted["opposition"])


def test_a_spike_is_taken_apart_into_groups_that_sum_to_it(opsig, tiny_run):
    parts = [r for r in opsig("cluster", tiny_run, *OWN, "--explain", 9).records if r["kind"] == "explain"]
    with h5py.File(tiny_run) as file:
        change = float((file["losses/loss"][9] - file["losses/loss"][8]).sum())
    assert sum(p["change"] for p in parts) == pytest.approx(change, rel=1e-4)
    assert sum(p["share"] for p in parts) == pytest.approx(1)
    assert sum(p["size"] for p in parts) == 60
    assert parts[-1]["group"] is None
    sizes = [abs(p["change"]) for p in parts[:-1]]
    assert sizes == sorted(sizes, reverse=True)
    opsig("cluster", tiny_run, *OWN, "--explain", 99).fails(1, "no change of losses at step 99")
    assert "all others" in opsig("cluster", tiny_run, *OWN, "--explain", 9, "--format", "table").out
