"""Pairs of a verdict or a number alone, tables on narrow terminals, and summaries of long imports."""

import io
import json
import shutil

import numpy as np
import pytest
from conftest import TASKS
from test_report import swinging

from opsig_cli import records
from opsig_cli.commands.import_ import summary
from opsig_cli.studies import answers
from opsig_cli.studies.clustering import tables
from opsig_cli.trajectory.file import open_trajectory

OWN = ("--task", f"{TASKS}:Tiny")


@pytest.fixture
def run(tiny_run, tmp_path, monkeypatch):
    """The small run, in the working directory."""
    monkeypatch.chdir(tmp_path)
    return shutil.copy(tiny_run, "run.h5")


def test_pairs_of_a_verdict_come_with_their_groups_and_members_alone(opsig, tmp_path):
    path = swinging(tmp_path / "run.h5")
    everything = opsig("cluster", path, "--by", "loss").records
    pairs = [r for r in everything if r["kind"] == "pair"]
    verdict = pairs[0]["verdict"]
    chosen = [r for r in pairs if r["verdict"] == verdict]
    found = opsig("cluster", path, "--by", "loss", "--verdict", verdict, "--figure", tmp_path / "a.svg")
    assert [r for r in found.records if r["kind"] == "pair"] == chosen
    groups = {group for pair in chosen for group in pair["groups"]}
    assert {r["group"] for r in found.records if r["kind"] == "group"} == groups
    members = [r for r in everything if r["kind"] == "member" and r["pair"] in {p["pair"] for p in chosen}]
    assert [r for r in found.records if r["kind"] == "member"] == members
    assert members
    other = next(v for v in ("refuted", "likely", "unclear", "established") if v not in {p["verdict"] for p in pairs})
    none = opsig("cluster", path, "--by", "loss", "--verdict", other, "--figure", tmp_path / "b.svg")
    assert none.code == 0
    assert {r["kind"] for r in none.records} == {"tests"}
    assert f"none is {other}" in none.err
    assert "none of the pairs that were found is of those asked for" in (tmp_path / "b.svg").read_text()


def test_a_pair_is_chosen_by_its_number_and_a_wrong_one_lists_what_there_is(opsig, tmp_path):
    path = swinging(tmp_path / "run.h5")
    mined = opsig("mine", path).out
    found = opsig("cluster", "-", "--by", "loss", "--pair", 1, stdin=mined).records
    assert [r["pair"] for r in found if r["kind"] == "pair"] == [1]
    outcome = opsig("cluster", path, "--by", "loss", "--pair", 99)
    assert outcome.code == 1
    assert "there is no pair 99. Pairs: 1" in outcome.err
    opsig("cluster", path, "--by", "loss", "--verdict", "sure").fails(2, "--verdict is one of established, likely")
    assert opsig("report", path, "--by", "loss", "--pair", 1, "-o", tmp_path / "a.html").code == 0
    page = (tmp_path / "a.html").read_text()
    assert 'id="pair-1"' in page
    assert 'id="pair-2"' not in page


def pair(number, labels=("Ankle boot", "Sneaker")):
    return {
        "kind": "pair", "pair": number, "family": None, "verdict": "established", "groups": [1, 2], "sizes": [331, 39],
        "labels": [{label: size} for label, size in zip(labels, (331, 39), strict=True)], "after": None, "by": "both",
        "opposition": -0.4, "alike": 0.98, "swing_ratio": 0.15, "movement": 0.37, "apart_movement": 0.37,
        "apart_step": 34, "rise_step": 30, "p_value": 0.01, "eigenvectors": None,
    }  # fmt: skip


@pytest.mark.parametrize("columns", [80, 60, 52])
def test_no_side_of_a_pair_is_broken_on_a_narrow_terminal(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    rows = tables.pair_table([pair(1), pair(2)])
    out = io.StringIO()
    records.write([], "table", [records.Table("run.h5", rows, tables.narrow_rows(rows))], out)
    shown = out.getvalue()
    assert shown.count("G1: 331 x Ankle boot") == shown.count("G2: 39 x Sneaker") == 2
    assert max(map(len, shown.splitlines())) <= columns
    assert ("too narrow for: " in shown) == ("alike" not in shown.splitlines()[1])


def test_prose_is_broken_where_the_eye_follows(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    out = io.StringIO()
    records.write([], "table", [records.Table("", [{"pair": 1, "sentence": "a word and another " * 20}])], out)
    assert max(len(line.rstrip()) for line in out.getvalue().splitlines()) < 120


def test_a_long_import_is_one_row_and_every_record(opsig, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("losses.npy", np.random.default_rng(0).random((200, 30)))
    shown = opsig("import", "--losses", "losses.npy", "-o", "run.h5", "--format", "table").out
    assert len(shown.splitlines()) < 8
    assert "200" in shown
    written = opsig("import", "--losses", "losses.npy", "-o", "run.h5", "--replace").records
    assert len(written) == 200
    checkpoints = [{"step": step, "source": f"a/{step}.pt", "loss": 1 / (1 + step)} for step in range(50)]
    assert summary(checkpoints) == [
        {"source": "a", "steps": 50, "first": 0, "last": 49, "first loss": 1.0, "last loss": 1 / 50}
    ]


def test_the_next_command_names_a_file_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert answers.unused("branch.h5") == "branch.h5"
    for name in ("branch.h5", "branch-2.h5"):
        (tmp_path / name).touch()
    assert answers.unused("branch.h5") == "branch-3.h5"


def test_the_branch_that_is_proposed_sees_the_others_rise(opsig, run):
    pairs = opsig("cluster", run, *OWN).err
    follow = next(line for line in pairs.splitlines() if line.startswith("next:")).split()
    start, steps = int(follow[follow.index("--from") + 1]), int(follow[follow.index("--steps") + 1])
    found = opsig(*follow[2:], "--draws", 0)
    own = next(r for r in found.records if r["kind"] == "branch" and r["control"] is None)
    with open_trajectory(run) as trajectory:
        rises = np.diff(trajectory.series("losses/loss", np.arange(60)).mean(1))
    assert rises.max() > 0, "the run of this test has a rise"
    assert own["unchanged_rise_of_untouched"] > 0
    assert start < own["unchanged_rise_of_untouched_step"] <= start + steps


def test_all_labels_are_listed_where_they_are_few(opsig, run):
    outcome = opsig("branch", run, *OWN, "--from", 30, "--steps", 2, "--drop", "label:gren", "-o", "b.h5")
    assert "Labels: blue, green, red" in outcome.err


def test_a_threshold_of_full_batches_is_not_one_of_minibatches():
    top = [{"rank": 1, "step": 5, "eigenvalue": 3.0, "threshold": 20.0}]
    said = answers.sharp(top, "run.h5", None, {}, "batches of 32").found
    assert said.endswith("The threshold is that of full batches: batches of 32 can be unstable below it")
    assert "full batches" not in answers.sharp(top, "run.h5", None, {}).found


def test_rows_are_named_as_a_persons_log_names_them(opsig, tmp_path):
    log = tmp_path / "log.csv"
    lines = ["step,sample_id,loss"]
    lines += [
        f"{step},row-{n},{5 if (step, n) == (30, 4) else 1 + n / 50}"
        for step in range(40) for n in range(20) if (step + n) % 2 == 0
    ]  # fmt: skip
    log.write_text("\n".join(lines))
    opsig("import", "--losses", log, "--sightings", "-o", tmp_path / "run.h5")
    found = opsig("mine", tmp_path / "run.h5", "--step", 30, "--figure", tmp_path / "a.svg")
    assert "1 row carries all of what step 30 exceeds the expected: row-4" in found.err
    assert "row-4" in (tmp_path / "a.svg").read_text()
    after = opsig("mine", tmp_path / "run.h5", "--step", 32)
    assert "these 10 rows of step 32 do not exceed what was to be expected of them" in after.err
    assert json.loads(found.out.splitlines()[0])["name"] == "row-4"
