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

from opsig_cli.trajectory.schema import SCHEMA_VERSION

COMMANDS = (
    "train",
    "import",
    "analyse",
    "branch",
    "track",
    "merge",
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


# -- mistakes


def test_a_damaged_row_is_named_and_left_out(opsig, tiny_run, tmp_path):
    path = shutil.copy(tiny_run, tmp_path)
    with h5py.File(path, "r+") as file:
        file["losses/loss"][30, 7] += 100
    found = opsig("mine", path, "--score", "change", "--quiet")
    assert found.code == 0
    assert "1 of 61 rows of losses is damaged and left out: step 30" in found.err
    assert all(record["step"] != 30 for record in found.records)


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
