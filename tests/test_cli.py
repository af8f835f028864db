"""The command line as users and scripts call it: pipes, formats, exit codes, and the mistakes people make."""

import json
import os
import re
import shutil
import subprocess
import sys

import h5py
import numpy as np
import pytest
from conftest import TASKS, start_opsig, train_tiny

from opsig_cli import Recorder
from opsig_cli.trajectory.schema import SCHEMA_VERSION

COMMANDS = (
    "train",
    "import",
    "analyse",
    "branch",
    "track",
    "mine",
    "cluster",
    "info",
    "verify",
    "repack",
    "sharpness",
    "probe",
    "compare",
    "report",
    "simulate linear",
    "simulate valley",
)
OWN = ("--task", f"{TASKS}:Tiny")


def test_help_needs_no_torch_and_little_time():
    code = (
        "import sys, resource; sys.argv = ['opsig', '--help']\n"
        "from opsig_cli.main import run\n"
        "try: run()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'sklearn', 'scipy', 'matplotlib', 'h5py'} & set(sys.modules), sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_info_and_mine_need_no_torch(tiny_run):
    for command in (["info"], ["mine"], ["mine", "--step", "5"]):
        code = (
            f"import sys; sys.argv = ['opsig', *{command!r}, {str(tiny_run)!r}]\n"
            "from opsig_cli.main import run\n"
            "run()\n"
            "assert not {'torch', 'sklearn', 'scipy'} & set(sys.modules)\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(opsig, command):
    outcome = opsig(*command.split(), "--help")
    assert outcome.code == 0
    assert "Example: opsig" in outcome.out


def test_version(opsig):
    assert re.fullmatch(r"opsig \d+\.\d+\.\d+\n", opsig("--version").out)


def test_records_are_json_lines_in_a_pipe_and_nan_is_null(opsig, tiny_run):
    outcome = opsig("mine", tiny_run, "--top", 5)
    assert outcome.code == 0
    assert [r["rank"] for r in outcome.records] == [1, 2, 3, 4, 5]
    first = outcome.records[0]
    assert set(first) == {
        "trajectory", "rank", "sample", "step", "previous_step", "direction", "loss_before", "loss_after", "change",
        "score", "score_name", "label", "prediction_before", "prediction_after", "share", "movement",
        "rising", "window",
    }  # fmt: skip
    assert first["change"] == pytest.approx(first["loss_after"] - first["loss_before"])
    assert first["direction"] == ("up" if first["change"] > 0 else "down")
    assert {first["label"], first["prediction_before"]} <= {"red", "green", "blue"}


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
    from opsig_cli import Recorder

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
    assert bool(tests["replayed_from"]) == bool(tests["replays"])
    none = opsig("cluster", tiny_run, *OWN, "--budget", 0).records[-1]
    assert (none["replays"], none["replayed_from"]) == (0, [])
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


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("mine run.h5 --top -1", "'--top': Input should be greater than or equal to 1. See "),
        ("mine run.h5 --tpo 3", "No such option: --tpo"),
        ("mine", "Missing argument 'RUN'. See "),
        ("mine run.h5 other.h5", "unexpected extra argument"),
        ("clutser run.h5", "No such command 'clutser'. Did you mean 'cluster'? See "),
        ("simulate hill", "No such command 'hill'. See "),
        ("cluster run.h5 --figure a.png --figure=a.pdf", "--figure is given twice"),
    ],
)
def test_a_line_that_cannot_be_parsed_is_answered_in_one(opsig, line, said):
    opsig(*line.split()).fails(2, said)


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


def test_tables_and_csv(opsig, tiny_run):
    table = opsig("mine", tiny_run, "--top", 2, "--format", "table").out
    assert "predicted" in table
    assert " -> " in table
    csv = opsig("mine", tiny_run, "--top", 2, "--format", "csv").out.splitlines()
    assert len(csv) == 3
    assert csv[0].startswith("trajectory,rank,sample")
    pairs = opsig("cluster", tiny_run, *OWN, "--format", "table").out
    assert "against" in pairs
    assert opsig("info", tiny_run, "--format", "table").code == 0
    opsig("info", tiny_run, "--format", "yaml").fails(2, "no format is called 'yaml'", "json")


def test_info_says_what_is_there(opsig, tiny_run):
    (record,) = opsig("info", tiny_run).records
    assert record["steps"] == 60
    assert record["samples"] == 60
    assert record["checkpoints"] == 21
    assert record["state"] == "complete"
    assert record["parameters"] == 5 * 16 + 16 + 16 * 16 + 16 + 16 * 3 + 3
    assert {"losses", "checkpoints", "scalars"} <= set(record["groups"])


def test_a_closed_pipe_is_silent(tiny_run):
    command = f"{sys.executable} -m opsig_cli.main mine {tiny_run} --top 60 --quiet | head -c 10"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_label_cannot_steer_the_terminal(opsig, tmp_path):
    evil = "class Evil(Tiny):\n    def label(self, i):\n        return '\\x1b[2Jred'\n"
    (tmp_path / "evil.py").write_text(TASKS.read_text() + "\n\n" + evil)
    run = tmp_path / "run.h5"
    opsig("train", "--task", f"{tmp_path}/evil.py:Evil", "-o", run, "--steps", 20, "--track")
    assert "\x1b[2J" not in opsig("mine", run, "--format", "table").out


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


# -- mistakes


def test_a_damaged_row_is_named_and_left_out(opsig, tiny_run, tmp_path):
    path = shutil.copy(tiny_run, tmp_path)
    with h5py.File(path, "r+") as file:
        file["losses/loss"][30, 7] += 100
    found = opsig("mine", path, "--score", "change", "--quiet")
    assert found.code == 0
    assert "1 of 61 rows of losses is damaged and left out: step 30" in found.err
    assert all(record["step"] != 30 for record in found.records)


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


def test_no_such_file(opsig):
    for command in ("track", "mine", "cluster", "info"):
        opsig(command, "nowhere.h5").fails(1, "nowhere.h5 does not exist")


def test_a_file_that_is_not_hdf5_or_not_a_trajectory(opsig, tmp_path):
    (tmp_path / "text.h5").write_text("hello" * 100)
    opsig("info", tmp_path / "text.h5").fails(1, "text.h5", "not a readable HDF5 file", "opsig import makes")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    opsig("info", tmp_path / "other.h5").fails(1, "not an opsig trajectory")


def test_a_newer_schema_is_refused_naming_both(opsig, tmp_path):
    with h5py.File(tmp_path / "new.h5", "w", libver=("v110", "v110")) as file:
        file.attrs["schema_version"] = np.bytes_(b"7.1")
    opsig("info", tmp_path / "new.h5").fails(1, "schema 7.1", ".".join(map(str, SCHEMA_VERSION)))


def test_a_missing_group_names_the_command_that_makes_it(opsig, tmp_path):
    arguments = train_tiny(tmp_path / "run.h5")
    arguments.remove("--track")
    opsig(*arguments)
    opsig("mine", tmp_path / "run.h5").fails(1, "losses/loss", "Run: opsig track")


def test_a_task_that_cannot_be_imported(opsig, tmp_path):
    (tmp_path / "broken.py").write_text("import nothing_of_the_kind\n")
    (tmp_path / "empty.py").write_text("class Empty: pass\n")
    start = ("train", "-o", tmp_path / "run.h5", "--task")
    opsig(*start, f"{tmp_path}/broken.py:Task").fails(1, "cannot be imported", "nothing_of_the_kind")
    opsig(*start, f"{tmp_path}/empty.py:Task").fails(1, "has no 'Task'")
    opsig(*start, f"{tmp_path}/empty.py:Empty").fails(1, "no method model()")
    opsig(*start, f"{tmp_path}/absent.py:Task").fails(1, "does not exist")
    opsig(*start, "no.such.module:Task").fails(1, "cannot be imported")
    opsig(*start, "imagenet").fails(2, "no task is called 'imagenet'", "fashion-mnist", "planted")
    opsig(*start, f"{TASKS}:Tiny:colour=3").fails(2, "no option 'colour'", "samples, shared")
    opsig(*start, f"{TASKS}:Tiny:samples=many").fails(2, "not an integer")
    opsig(*start, f"{TASKS}:Tiny", "--model", "mlp").fails(2, "brings its own model")
    opsig(*start, f"{TASKS}:Tiny", "--optimizer", "lion").fails(2, "no optimizer is called 'lion'", "momentum")
    opsig(*start, f"{TASKS}:Tiny", "--batch-size", 8).fails(2, "gd is full batch")
    opsig(*start, f"{tmp_path}/empty.py").fails(2, f"names no class. Write --task {tmp_path}/empty.py:NAME")
    opsig("train", "-o", tmp_path / "run.h5").fails(2, "--task is missing")
    assert not (tmp_path / "run.h5").exists()


def test_a_dataset_of_another_length_is_refused(opsig, tiny_run):
    opsig("cluster", tiny_run, "--task", f"{TASKS}:Tiny:samples=50").fails(1, "60 samples", "now has 50")


def test_no_such_step_sample_or_window(opsig, tiny_run):
    opsig("mine", tiny_run, "--step", 999).fails(1, "no losses at step 999", "Nearest: 60")
    opsig("mine", tiny_run, "--step", 0).fails(1, "the first with losses")
    opsig("mine", tiny_run, "--window", "70:90").fails(1, "no losses between steps 70 and 90", "0 to 60")
    opsig("mine", tiny_run, "--window", "70:").fails(1, "no losses from step 70 on", "0 to 60")
    opsig("mine", tiny_run, "--window", "nine").fails(2, "not a range of steps")
    opsig("mine", tiny_run, "--window", "9:3").fails(2, "ends before it begins")
    opsig("mine", tiny_run, "--step", 3, "--window", "1:9").fails(2, "exclude each other")
    opsig("mine", tiny_run, "--score", "luck").fails(2, "no score is called 'luck'", "oscillation")
    record = json.dumps({"trajectory": str(tiny_run), "sample": 1234})
    opsig("cluster", "-", *OWN, stdin=record).fails(1, "no sample 1234", "0 to 59")


def test_stdin_without_records(opsig, tiny_run):
    opsig("cluster", "-").fails(1, "stdin holds no records", "opsig mine")
    opsig("cluster", "-", stdin="{}\nnonsense\n").fails(1, "line 2 is not a JSON object")
    opsig("cluster", "-", stdin="{}\n").fails(1, "must name one trajectory")
    opsig("cluster", "-", stdin='{"trajectory": "gone.h5", "sample": 1}\n').fails(1, "gone.h5 does not exist")
    one = json.dumps({"trajectory": str(tiny_run), "sample": 1})
    opsig("cluster", "-", *OWN, stdin=one).fails(1, "one sample cannot be grouped")


@pytest.mark.parametrize("sample", ["1.5", '"x"', "true", "NaN", "1e999", "[1]"])
def test_a_piped_sample_that_is_no_index_is_refused_with_its_line(opsig, tiny_run, sample):
    lines = f'{{"trajectory": "{tiny_run}", "sample": 1}}\n{{"trajectory": "{tiny_run}", "sample": {sample}}}\n'
    opsig("cluster", "-", stdin=lines).fails(1, "stdin line 2: sample is", "must be its index in the dataset")


def test_a_format_is_looked_at_before_the_work(opsig):
    opsig("cluster", "absent.h5", "--format", "xml").fails(2, "no format is called 'xml'")


def test_a_figure_that_cannot_be_written(opsig, tiny_run, tmp_path):
    opsig("mine", tiny_run, "--figure", tmp_path / "none" / "x.png").fails(1, "--figure")
    opsig("mine", tiny_run, "--figure", tmp_path / "x.docx").fails(1, "--figure", ".docx")


def test_a_full_disk_is_named_and_the_run_can_be_resumed(opsig, tmp_path):
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, resource.RLIM_INFINITY))\n"
        f"sys.argv = ['opsig', *{[str(a) for a in train_tiny(tmp_path / 'run.h5', steps=2000)]!r}]\n"
        "from opsig_cli.main import run\n"
        "run()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "run.h5" in done.stderr.splitlines()[-1]
    assert opsig("train", "-o", tmp_path / "run.h5", "--resume", *OWN).code == 0
    assert opsig("info", tmp_path / "run.h5").records[0]["state"] == "complete"


def test_a_second_writer_is_refused(tmp_path, opsig):
    process = start_opsig(*train_tiny(tmp_path / "run.h5", steps=100000))
    try:
        while not (tmp_path / "run.h5").exists():
            pass
        outcome = opsig("train", "-o", tmp_path / "run.h5", "--resume", *OWN)
        assert outcome.code == 1
        assert "Traceback" not in outcome.err
    finally:
        process.kill()
        process.communicate()


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


def test_threads_wait_without_spinning_and_are_as_many_as_were_asked_for(tmp_path):
    own = tmp_path / "own.py"
    own.write_text(
        f"import os, runpy\nTiny = runpy.run_path({str(TASKS)!r})['Tiny']\n"
        "assert os.environ['OMP_WAIT_POLICY'] == os.environ.get('EXPECTED', 'PASSIVE')\n"
    )
    clean = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")}
    command = [sys.executable, "-m", "opsig_cli.main", "train", "--task", f"{own}:Tiny", "--steps", "1"]
    for threads, more in ((1, {}), (2, {"OMP_WAIT_POLICY": "active", "EXPECTED": "active"})):
        arguments = ["--threads", str(threads), "-o", str(tmp_path / f"{threads}.h5")]
        done = subprocess.run([*command, *arguments], env=clean | more, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"cpu ({threads} thread{'s' * (threads > 1)})" in done.stderr
