"""What a person sees on a terminal: tables and help at the width of 80 columns."""

import shutil

import numpy as np
import pytest
from conftest import TASKS

from opsig_cli import Recorder
from opsig_cli.report.words import rise_sentence

OWN = ("--task", f"{TASKS}:Tiny")
COMMANDS = [
    "mine run.h5 --top 5",
    "cluster run.h5",
    "cluster run.h5 --by loss",
    "cluster run.h5 --explain 9",
    "sharpness run.h5 -k 2",
    "sharpness run.h5 --metrics gradient_norm,curvature,sample_sharpness --random 2 --steps 30",
    "sharpness run.h5 --metrics trace,critical_sharpness --steps 0:30:5",
    "sharpness run.h5 --slice 30",
    "probe digits.h5 --input color:white --input sample:2",
    "probe run.h5 --projection",
    "compare run.h5 other.h5",
    "report run.h5 -o report.html",
    "info run.h5",
    "verify run.h5",
    "repack run.h5",
    "train -o new.h5 --steps 5 --replace",
    "simulate linear --at 0.1 --at 0.2",
    "simulate valley --at 3",
]


@pytest.fixture
def runs(tiny_run, tmp_path, monkeypatch):
    """The small run twice, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("run.h5", "other.h5"):
        shutil.copy(tiny_run, name)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_word_and_no_number_is_broken_at_80_columns(command, runs, opsig, monkeypatch):
    words = command.split()
    own = OWN if words[0] in ("cluster", "sharpness", "report", "train") else ()
    if "--projection" in words:
        assert opsig("sharpness", "run.h5", *OWN, "--at", "iterate").code == 0
    if "digits.h5" in words:
        assert opsig("train", "--task", "digits", "--steps", 10, "-o", "digits.h5").code == 0
    shown = {}
    for width in (400, 80):
        monkeypatch.setenv("COLUMNS", str(width))
        outcome = opsig(*words, *own, "--format", "table")
        assert outcome.code == 0, outcome.err
        shown[width] = outcome.out
    assert max(map(len, shown[80].splitlines())) <= 80
    assert "too narrow for" not in shown[80]
    assert words_of(shown[80]) <= words_of(shown[400])


def words_of(text: str) -> set[str]:
    """All words and numbers, without rules."""
    return set(text.replace("\u2500", " ").split())


def test_columns_that_do_not_fit_are_named(runs, opsig, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    shown = opsig("mine", "run.h5", "--top", 2, "--format", "table").out
    assert "too narrow for" in shown
    assert shown.splitlines()[1].startswith("rank  sample")


def test_the_established_pairs_of_a_table_come_first_and_in_words(opsig, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    run = tmp_path / "run.h5"
    train = (
        "train",
        "--task",
        "fashion-mnist:samples=500,size=14",
        "--model",
        "mlp:width=32",
        "--steps",
        150,
        "--track",
    )
    assert opsig(*train, "-o", run).code == 0
    pairs = [r for r in opsig("cluster", run).records if r["kind"] == "pair"]
    held = [pair for pair in pairs if pair["verdict"] == "established"]
    assert 0 < len(held) < len(pairs)
    table = opsig("cluster", run, "--format", "table").out
    rows = [line.split() for line in table.splitlines()]
    assert f"{len(held)} of {len(pairs)} opposing pairs established" in table
    order = [int(words[0]) for words in rows[3 : 3 + len(pairs)]]
    assert {pair["pair"] for pair in held} == set(order[: len(held)])
    prose = " ".join(table.split())  # which is broken into lines
    assert all((" ".join(pair["sentence"].split()) in prose) == (pair in held) for pair in pairs)


def test_help_names_no_types(opsig, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for command in ("train", "mine", "cluster", "sharpness", "compare", "simulate linear"):
        shown = opsig(*command.split(), "--help").out
        assert not any(word in shown for word in ("<bool>", "<int", "<float"))
        assert "--quiet" in shown or command.startswith("simulate")


def test_what_a_file_lacks_is_said_with_a_command_that_adds_it(opsig, tmp_path):
    losses = tmp_path / "losses.npy"
    np.save(losses, np.random.default_rng(0).random((30, 20), np.float32))
    run = tmp_path / "run.h5"
    assert opsig("import", "--losses", losses, "-o", run).code == 0
    opsig("sharpness", run).fails(1, "lacks checkpoints/params", "opsig import CHECKPOINT... --task TASK")


def test_a_run_without_checkpoints_is_not_sent_to_measure_losses_at_them(opsig, tmp_path):
    with Recorder(tmp_path / "run.h5", 3) as recorder:
        recorder.record(0, scalars={"accuracy": 0.5})
    refused = opsig("mine", tmp_path / "run.h5")
    refused.fails(1, "lacks losses/loss", "opsig train")
    assert "opsig track" not in refused.err
    assert "found: a run of 3 samples to step 0" in opsig("info", tmp_path / "run.h5").err


def test_a_rise_smaller_than_the_figures_shown_is_told_by_its_size():
    assert "by 0.0031 to 2.74 nats" in rise_sentence(93, 2.7369, 2.74, None, 0, None)
    assert "from 0.825 to 0.918 nats" in rise_sentence(93, 0.825, 0.918, None, 0, None)


def test_info_shows_a_person_only_what_the_optimizer_takes(opsig, runs):
    shown = opsig("info", "run.h5", "--format", "table").out.split()
    assert "learning_rate" in shown
    assert not {"momentum", "beta1", "sign_learning_rate", "dampening"} & set(shown)
    assert opsig("train", "--task", "digits", "--optimizer", "adam", "--steps", 1, "-o", "adam.h5").code == 0
    shown = opsig("info", "adam.h5", "--format", "table").out.split()
    assert {"beta1", "beta2", "epsilon"} <= set(shown)
