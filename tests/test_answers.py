"""What a person reads last, and numbers that mean one thing: the ends of commands, shares, units, names, completion."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import TASKS
from test_report import swinging

import opsig_cli
from opsig_cli import Recorder
from opsig_cli.commands import completions
from opsig_cli.figures.canvas import columns, cut, typeset
from opsig_cli.studies import analysing, answers
from opsig_cli.trajectory.file import open_trajectory

OWN = ("--task", f"{TASKS}:Tiny")
DOCS = Path(__file__).parent.parent / "docs"


def ending(outcome) -> dict[str, str]:
    """The lines with which a command ends on stderr, by what they begin with."""
    lines = [line.partition(":") for line in outcome.err.splitlines()]
    return {name: text.strip() for name, _, text in lines if name in ("wrote", "found", "next")}


@pytest.fixture
def run(tiny_run, tmp_path, monkeypatch):
    """The small run, in the working directory."""
    monkeypatch.chdir(tmp_path)
    return shutil.copy(tiny_run, "run.h5")


@pytest.mark.parametrize(
    ("command", "found"),
    [
        ("mine run.h5 --top 5", r"5 samples, mostly .*; sample \d+ moves most, .* nats at step \d+"),
        ("cluster run.h5 --test none", r"no pair is established of \d+: pair \d+, G\d+ \(.*\) against G\d+ \(.*\), is"),
        ("sharpness run.h5 --steps 20:40", r"the learning rate( 0.5)? is (first above|below) the stability threshold"),
        ("sharpness run.h5 --slice 30", "along the top eigenvector at step 30 the loss of all samples"),
        ("info run.h5", "a run of 60 samples to step 60, complete, with losses, checkpoints"),
        ("verify run.h5", "run.h5 is intact"),
        ("repack run.h5", "every number the same"),
        ("track run.h5", "all 21 checkpoints had losses"),
        ("compare run.h5", "run.h5 has the lowest loss"),
        ("simulate valley", "sharpness crosses 2 / learning rate at step 39, and the losses spike at step 100"),
        ("simulate linear", "sharpness falls from 247.7 to 43.53 at time 0.05246 and ends at 500"),
    ],
)
def test_every_command_ends_with_what_it_found_and_what_to_do_next(opsig, run, command, found):
    own = OWN if command.split()[0] in ("cluster", "sharpness", "track") else ()
    outcome = opsig(*command.split(), *own)
    assert outcome.code == 0, outcome.err
    assert re.match(found, ending(outcome)["found"]) or re.search(found, ending(outcome)["found"])
    assert ending(outcome)["next"].startswith("opsig ")
    assert outcome.err.splitlines()[-1].startswith("next: ")
    assert "found:" not in outcome.out
    if command.split()[0] in ("mine", "cluster", "sharpness"):
        assert not ending(opsig(*command.split(), *own, "--quiet"))


def test_a_command_that_writes_a_file_says_which(opsig, run):
    assert "wrote: movers.png" in opsig("mine", run, "--top", 5, "--figure", "movers.png").err
    assert "wrote: new.h5" in opsig("train", *OWN, "--steps", 2, "-o", "new.h5").err
    assert "wrote: branch.h5" in opsig("branch", run, *OWN, "--from", 30, "--steps", 3, "-o", "branch.h5").err


def test_the_next_command_of_cluster_can_be_run(opsig, run):
    follow = ending(opsig("cluster", run, *OWN))["next"].split()
    assert follow[:2] == ["opsig", "branch"]
    again = opsig(*follow[1:], "--draws", 0)
    assert again.code == 0, again.err
    assert re.search(r"with drop pair:1 \(\d+ samples\), the others' loss", ending(again)["found"])


def test_the_next_command_names_a_task_of_ones_own_again(opsig, run):
    assert ending(opsig("mine", run))["next"] == f"opsig cluster {run} --task {OWN[1]}"
    assert ending(opsig("info", run))["next"] == f"opsig analyse {run} --task {OWN[1]}"


def test_a_branch_that_changes_nothing_is_said_to(opsig, run):
    outcome = opsig("branch", run, *OWN, "--from", 30, "--steps", 3, "-o", "b.h5", "--format", "table")
    assert "with nothing changed, as the run was trained, the loss" in ending(outcome)["found"]
    assert "unchanged  " not in outcome.out.splitlines()[3]
    assert outcome.err.count("device:") == 1


def test_analyse_does_all_and_measures_nothing_twice(opsig, run):
    first = opsig("analyse", run, *OWN)
    assert first.code == 0, first.err
    kinds = {record["kind"] for record in first.records}
    assert {"mover", "eigenvalue", "pair", "group", "member", "report"} <= kinds
    assert "wrote: run.html" in first.err
    assert Path("run.html").exists()
    again = opsig("analyse", run, *OWN)
    assert "measured already: 21 of 21 checkpoints" in again.err
    assert again.out == first.out
    mined = opsig("mine", run).records
    assert [{"kind": "mover"} | record for record in mined] == [r for r in first.records if r["kind"] == "mover"]


def test_analyse_of_losses_alone_says_why_there_is_no_sharpness(opsig, tmp_path):
    run = swinging(tmp_path / "losses.h5")
    outcome = opsig("analyse", run)
    assert outcome.code == 0, outcome.err
    assert "holds no checkpoints, without which there is no sharpness" in outcome.err


def test_what_is_affordable_is_every_so_many_checkpoints(tiny_run, monkeypatch):
    with open_trajectory(tiny_run) as trajectory:
        assert analysing.affordable_steps(trajectory) == ("0:60:1", "")
        cost = 60 * trajectory.shape("checkpoints/params")[1] * analysing.PRODUCTS
        monkeypatch.setattr(analysing, "AFFORDABLE", 10 * cost)
        assert analysing.affordable_steps(trajectory)[0] == "0:60:3"  # 7 of 21, at most 10
        monkeypatch.setattr(analysing, "AFFORDABLE", cost / 2)
        assert analysing.affordable_steps(trajectory)[0] is None


# -- numbers


def test_no_share_of_a_net_change_that_is_close_to_zero(opsig, tmp_path):
    losses = np.ones((20, 40))
    losses[10:, :20] += 1
    losses[10:, 20:] -= 0.99
    with Recorder(tmp_path / "run.h5", samples=40) as recorder:
        for step, row in enumerate(losses):
            recorder.record(step, losses=row)
    found = opsig("mine", tmp_path / "run.h5", "--step", 10, "--top", 40, "--share", 10)
    assert {record["share"] for record in found.records} == {None}
    assert sum(record["movement"] for record in found.records) == pytest.approx(1, rel=1e-5)
    assert "carry 100% of all movement at step 10\n" in found.err


def test_pairs_are_numbered_by_strength_whatever_is_tested(opsig, tmp_path):
    run = tmp_path / "run.h5"
    task = "planted:pairs=2,side=12,samples=240,size=14,patch=4,seed=3"
    train = ("--model", "mlp:width=16", "--learning-rate", 0.15, "--steps", 80, "--checkpoint-every", 8, "--track")
    assert opsig("train", "--task", task, *train, "-o", run).code == 0
    named = []
    for test in ("none", "held-out"):
        pairs = [r for r in opsig("cluster", run, "--test", test).records if r["kind"] == "pair"]
        assert [pair["pair"] for pair in pairs] == list(range(1, len(pairs) + 1))
        moved = [pair["apart_movement"] or 0 for pair in pairs]
        assert moved == sorted(moved, reverse=True)
        named.append([pair["groups"] for pair in pairs])
    assert named[0] == named[1]
    pair = pairs[0]
    with h5py.File(run) as file:
        step = pair["apart_step"]
        change = np.abs(np.diff(file["losses/loss"][step - 1 : step + 1].astype(float), axis=0)[0])
    members = {
        r["sample"] for r in opsig("cluster", run, "--test", "none").records
        if r["kind"] == "member" and r["mined"] and r["group"] in pair["groups"]
    }  # fmt: skip
    assert pair["apart_movement"] == pytest.approx(change[sorted(members)].sum() / change.sum())


@pytest.mark.parametrize(("task", "unit"), [("chebyshev", "squared error"), ("digits", "nats")])
def test_losses_have_the_unit_that_their_task_states(opsig, tmp_path, task, unit):
    run = tmp_path / "run.h5"
    assert opsig("train", "--task", task, "--steps", 3, "--track", "-o", run).code == 0
    with h5py.File(run) as file:
        assert file["losses/loss"].attrs["units"] == (b"nat" if unit == "nats" else unit.encode())
    outcome = opsig("mine", run, "--top", 2, "--figure", tmp_path / "a.svg")
    assert f" {unit} at step" in ending(outcome)["found"]
    assert f"loss ({unit})" in (tmp_path / "a.svg").read_text()


def test_a_task_that_states_no_unit_and_has_no_classes_is_given_none(opsig, tmp_path):
    assert opsig("train", "--task", f"{TASKS}:Conv", "--steps", 3, "--track", "-o", tmp_path / "run.h5").code == 0
    assert "nats" not in ending(opsig("mine", tmp_path / "run.h5", "--top", 2))["found"]
    (tmp_path / "bad.py").write_text(f"import sys; sys.path.insert(0, {str(TASKS.parent)!r})\nfrom tiny import Conv\n"
                                     "class Bad(Conv):\n    loss_unit = 3\n")  # fmt: skip
    outcome = opsig("train", "--task", f"{tmp_path}/bad.py:Bad", "--steps", 3, "-o", tmp_path / "x.h5")
    outcome.fails(1, "the task's loss_unit is 3")


def test_regression_samples_are_shown_by_their_inputs(opsig, tmp_path):
    (tmp_path / "line.py").write_text(
        "import torch\n"
        "class Line:\n"
        "    loss_unit = 'squared error'\n"
        "    def model(self): return torch.nn.Linear(2, 1)\n"
        "    def dataset(self):\n"
        "        x = torch.linspace(-1, 1, 20)[:, None].repeat(1, 2)\n"
        "        return torch.utils.data.TensorDataset(x, x[:, :1] ** 2)\n"
        "    def losses(self, model, batch): return (model(batch[0]) - batch[1]).square()[:, 0]\n"
    )
    run = tmp_path / "run.h5"
    assert opsig("train", "--task", f"{tmp_path}/line.py:Line", "--steps", 4, "--track", "-o", run).code == 0
    outcome = opsig("mine", run, "--top", 3, "--figure", tmp_path / "a.svg")
    assert outcome.records[0]["text"].startswith("x = ")
    assert "no picture" not in (tmp_path / "a.svg").read_text()
    assert re.search(r"x = [-+]1, [-+]1", "".join(r["text"] for r in opsig("mine", run, "--top", 20).records))


# -- who opposes this sample?


@pytest.mark.parametrize("by", ["both", "loss"])
def test_a_sample_is_answered_with_its_groups_opponents_and_allies(opsig, run, by):
    records = opsig("cluster", run, *OWN, "--by", by, "--test", "none").records
    member = next(r for r in records if r["kind"] == "member" and r["pair"] is not None)
    outcome = opsig(
        "cluster", run, *OWN, "--by", by, "--test", "none", "--sample", member["sample"], "--figure", "s.svg"
    )
    assert outcome.code == 0, outcome.err
    (own,) = [r for r in outcome.records if r["kind"] == "sample"]
    pairs = [r for r in records if r["kind"] == "pair" and member["group"] in r["groups"]]
    assert own["group"] == member["group"]
    assert [one["pair"] for one in own["against"]] == [pair["pair"] for pair in pairs]
    assert all(one["similarity"] < 0 for one in own["against"])
    assert own["similarity"] > 0
    near = [r for r in outcome.records if r["kind"] == "neighbour"]
    for relation, sign in (("opponent", -1), ("ally", 1)):
        sizes = [sign * r["similarity"] for r in near if r["relation"] == relation]
        assert sizes
        assert sizes == sorted(sizes, reverse=True)
        assert min(sizes) > 0
    assert member["sample"] not in {r["sample"] for r in near}
    assert ending(outcome)["found"] == own["sentence"]
    text = Path("s.svg").read_text()
    assert all(f"#{r['sample']}" in text for r in near)
    if by == "loss":
        with h5py.File(run) as file:
            losses = file["losses/loss"][()].astype(float)
        steps = records[-1] and opsig("cluster", run, *OWN, "--by", "loss").records
        assert steps
        changes = np.diff(losses, axis=0)
        assert np.corrcoef(changes[:, member["sample"]], changes[:, near[0]["sample"]])[0, 1] < 0


def test_an_unknown_sample_is_refused_before_anything_is_measured(opsig, run):
    opsig("cluster", run, *OWN, "--sample", 999).fails(1, "has no sample 999")


def test_a_spike_outside_of_the_window_is_said_to_be(opsig, run):
    outcome = opsig("cluster", run, *OWN, "--test", "none", "--window", "20:40", "--explain", 50)
    assert outcome.code == 0, outcome.err
    assert re.search(r"step 50 is outside of steps \d+ to 40, in which the groups were found", outcome.err)


# -- asking


def test_options_that_are_called_something_else_are_answered_with_their_name(opsig, run):
    opsig("train", "--lr", "0.1", "-o", "x.h5").fails(2, "opsig train has no option --lr. It is called --learning-rate")
    opsig("train", "--lr=0.1", "-o", "x.h5").fails(2, "--learning-rate")
    opsig("mine", run, "--plot", "a.png").fails(2, "It is called --figure")


def test_a_module_is_found_from_the_current_folder(opsig, tmp_path, monkeypatch):
    shutil.copy(TASKS, tmp_path / "tasks_of_mine.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    outcome = opsig("train", "--task", "tasks_of_mine:Tiny", "--steps", 2, "-o", "x.h5")
    assert outcome.code == 0, outcome.err


def test_values_are_completed_without_running_a_persons_code(opsig, run, monkeypatch):
    Path("mytask.py").write_text("class Other: pass\nclass Mine:\n" + "".join(
        f"    def {name}(self): ...\n" for name in ("model", "dataset", "losses")) + "raise SystemExit\n")  # fmt: skip
    assert completions.tasks("fash") == ["fashion-mnist"]
    assert "mytask.py:" in completions.tasks("")
    assert completions.tasks("mytask.py:") == ["mytask.py:Mine"]
    assert completions.scores("o") == ["oscillation"]
    assert completions.backends("t") == ["torch"]
    line = "opsig branch run.h5 --drop label:g"
    environment = os.environ | {"COMP_WORDS": line, "COMP_CWORD": "4", "_OPSIG_COMPLETE": "complete_bash"}
    code = "import sys; sys.argv = ['opsig']\nfrom opsig_cli.main import run\nrun()"
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert shown.stdout.split() == ["label:green"]
    monkeypatch.setenv("COMP_WORDS", line)
    found = opsig("cluster", run, *OWN, "--test", "none").records
    pairs, groups = ([r[kind] for r in found if r["kind"] == kind] for kind in ("pair", "group"))
    assert completions.names_of_samples("pair:") == [f"pair:{number}" for number in pairs]
    assert completions.names_of_samples("group:") == [f"group:{number}" for number in groups]


def test_python_is_spoken_to_in_arguments(tiny_run):
    with pytest.raises(opsig_cli.OpsigError, match=r"^step and window exclude each other"):
        opsig_cli.mine(tiny_run, step=3, window="1:2")
    with pytest.raises(opsig_cli.OpsigError, match=r"^by is one of gradient"):
        opsig_cli.cluster(tiny_run, by="luck")
    found = opsig_cli.cluster(tiny_run, by="loss")
    with pytest.raises(opsig_cli.OpsigError, match=r"no record is of the kind .pears.. Kinds: pair, group"):
        found.frame("pears")
    assert len(found.frame("explain")) == 0
    assert found.answer.next.startswith("opsig report")


# -- what is seen


def test_a_terminal_without_utf_8_is_spoken_to_in_ascii(tmp_path):
    labels = ["外套" if i % 2 else "Coat" for i in range(60)]
    run = swinging(tmp_path / "run.h5", labels=labels)
    arguments = ["opsig", "mine", str(run), "--format", "table"]
    code = f"import sys; sys.argv = {arguments!r}\nfrom opsig_cli.main import run\nrun()"
    shown = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, check=True
    )
    shown.stdout.decode("ascii")
    assert b"\\u5916\\u5957" in shown.stdout
    widths = {len(line) for line in shown.stdout.decode().splitlines() if "|" in line}
    assert len(widths) == 1


def test_signs_are_true_where_a_font_is_drawn():
    assert typeset("-0.38 +- 0.07 (run-2.h5 --top 3, a-1)") == "\N{MINUS SIGN}0.38 ± 0.07 (run-2.h5 --top 3, a-1)"
    assert columns("外a") == 3
    assert cut("外套外套", 5) == "外套\N{HORIZONTAL ELLIPSIS}"


def test_pictures_say_of_which_run_and_steps_they_are_and_number_their_samples(opsig, run):
    found = opsig("mine", run, "--top", 8, "--window", "10:30", "--figure", "a.svg").records
    text = Path("a.svg").read_text()
    assert "run.h5, steps 10 to 30: the 8 samples that move most, by" in text
    said = " ".join(re.sub("<[^>]*>", " ", text).split())
    assert "The run has losses of steps 0 to 60" in said
    assert all(f"#{record['sample']}, step {record['step']}<" in text for record in found)
    pairs = [
        r for r in opsig("cluster", run, *OWN, "--test", "none", "--figure", "b.svg").records if r["kind"] == "pair"
    ]
    text = Path("b.svg").read_text()
    assert "run.h5, steps 0 to 60: pairs of groups whose losses pull against each other" in text
    first = max(0, min(pairs[0]["apart_step"] - 20, 20))
    assert f"close-up, steps {first} to {first + 40}" in text


NEAR_A_THRESHOLD = ("analyse", "branch", "cluster", "report")
"""Examples whose verdicts may differ between processors; of their answers the beginning is held."""


def test_examples_of_the_commands_pages_say_what_the_commands_say(tmp_path, monkeypatch):
    """Numbers aside: they are another machine's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(DOCS))
    monkeypatch.setenv("COLUMNS", "100")
    spec = importlib.util.spec_from_file_location("make_examples", DOCS / "make_examples.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, printed in module.played_all().items():
        kept = (DOCS / "outputs" / f"{name}.txt").read_text()
        for words in ("found", "next", "wrote"):
            shapes = [
                [
                    re.sub(r"[-+]?\d[\d.,e+-]*%?", "#", line)
                    for line in text.splitlines()
                    if line.startswith(f"{words}:")
                ]
                for text in (kept, printed)
            ]
            told = 30 if name in NEAR_A_THRESHOLD else None
            assert [line[:told] for line in shapes[0]] == [line[:told] for line in shapes[1]], (
                f"{name}: run docs/make_examples.py and docs/make_reference.py"
            )


def test_answers_of_nothing_are_sentences_too():
    assert answers.mined([], "run.h5", "nats").found == "no sample moves"
    assert answers.sharp([], "run.h5", None, {}).found == "nothing was measured"
    assert json.dumps(answers.branched([], "run.h5").found) == '"nothing was changed"'


def test_what_the_shell_offers_is_what_there_is():
    """Written down once more, as completion imports no torch."""
    from opsig_torch.training import OPTIMIZERS
    from opsig_zoo.models import MODELS

    assert set(completions.OPTIMIZERS) == set(OPTIMIZERS)
    assert set(completions.MODELS) - {"gpt"} == set(MODELS) - {"gpt"}
