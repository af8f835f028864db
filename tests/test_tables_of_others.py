"""Tables of losses as spreadsheets, loggers and people write them: all of them give the same run, or one line."""

import csv
import gzip
import json

import numpy as np
import pytest

from opsig_cli import open_trajectory

S, T = 6, 9
LOSSES = np.random.default_rng(0).random((T, S)) + 1
LONG = [(t, s, LOSSES[t, s]) for t in range(T) for s in range(S)]
HEADER = ("step", "sample", "loss")


def table(rows, header=HEADER, separator=",", end="\n") -> str:
    lines = [header, *rows] if header else rows
    return "".join(separator.join(map(str, line)) + end for line in lines)


def wide(*header, separator=","):
    return table([(t, *LOSSES[t]) for t in range(T)], header, separator)


def commas(rows):
    return [(t, s, str(loss).replace(".", ",")) for t, s, loss in rows]


def jsonl(objects) -> str:
    return "".join(json.dumps(line) + "\n" for line in objects)


SAME = {
    "long.csv": table(LONG),
    "unsorted.csv": table([LONG[i] for i in np.random.default_rng(1).permutation(len(LONG))]),
    "with a mark and CRLF.csv": "\ufeff" + table(LONG, end="\r\n"),
    "semicolons.csv": table(LONG, separator=";"),
    "decimal commas.csv": table(commas(LONG), separator=";"),
    "decimal commas.tsv": table(commas(LONG), separator="\t"),
    "bars.csv": table(LONG, separator="|"),
    "a spreadsheet's first line.csv": "sep=;\n" + table(LONG, separator=";"),
    "a comment.csv": "# exported today\n" + table(LONG),
    "numpy's header.csv": "# " + table([(f"{t:.18e}", f"{s:.18e}", x) for t, s, x in LONG]),
    "units.csv": table(LONG, ("Step", "Sample ID", "Loss [nats]")),
    "the index of a frame.csv": table([(i, *line) for i, line in enumerate(LONG)], ("", *HEADER)),
    "an exported run.csv": table([(t, 1.7e9, *rest) for t, *rest in LONG], ("_step", "_timestamp", "id", "train/loss")),
    "floating steps.csv": table([(f"{t}.0", *rest) for t, *rest in LONG]),
    "wide.csv": wide("step", *[f"loss_{s}" for s in range(S)]),
    "wide of numbers.csv": wide("Step", *range(S)),
    "wide with words.csv": wide("step", *[f"sample {s}" for s in range(S)], separator=";"),
    "objects.jsonl": jsonl({"step": t, "sample": s, "loss": x} for t, s, x in LONG),
    "lists.jsonl": jsonl({"step": t, "samples": list(range(S)), "losses": list(LOSSES[t])} for t in range(T)),
    "by sample.jsonl": jsonl({"step": t, "losses": dict(enumerate(LOSSES[t]))} for t in range(T)),
    "cut off.jsonl": jsonl({"step": t, "sample": s, "loss": x} for t, s, x in LONG) + '{"step": 9, "sam',
    "cut off.csv": table(LONG) + "9,",
}


def imported(opsig, folder, name, text):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return opsig("import", "--losses", folder / name, "-o", folder / "run.h5")


@pytest.mark.parametrize("name", SAME)
def test_one_run_in_every_form_is_one_run(opsig, tmp_path, name):
    done = imported(opsig, tmp_path, name, SAME[name])
    assert done.code == 0, done.err
    assert ("is cut off in its middle, and left out" in done.err) == name.startswith("cut off")
    with open_trajectory(tmp_path / "run.h5") as run:
        np.testing.assert_allclose(run.losses(), LOSSES, rtol=1e-6)
        assert run.samples.tolist() == list(range(S))


@pytest.mark.parametrize("word", ["", "nan", "NaN", "None", "null", "NULL", "N/A", "NA", "#N/A", "<NA>"])
def test_a_cell_without_a_number_is_a_gap(opsig, tmp_path, word):
    rows = [(t, s, word if (t, s) == (4, 2) else x) for t, s, x in LONG]
    assert imported(opsig, tmp_path, "gap.csv", table(rows)).code == 0
    with open_trajectory(tmp_path / "run.h5") as run:
        assert np.argwhere(np.isnan(run.losses())).tolist() == [[4, 2]]


REFUSED = {
    "empty.csv": ("", "empty.csv is empty"),
    "blank.csv": ("\n\n", "begins with an empty line"),
    "header.csv": (table([]), "has a header and no lines"),
    "no header.csv": (table(LONG, None), "has no header: its first line is 0,0,"),
    "old mac.csv": (table(LONG, end="\r"), "end in a carriage return alone"),
    "utf-16.csv": (table(LONG).encode("utf-16"), "is not text in UTF-8"),
    "not zipped.csv.gz": (table(LONG), "is not gzipped"),
    "two columns.csv": (table([(*line, 1) for line in LONG], (*HEADER, "loss")), "has two columns loss"),
    "twice.csv": (table([*LONG, LONG[3]]), "has two losses of sample 3 at step 0"),
    "a word.csv": (table([*LONG[:9], (1, 3, "low")]), "line 11: loss is 'low', which is not a number"),
    "the mean.csv": (table([(0, 1.5)], ("Step", "Value")), "a log of the run's own loss goes to --scalars"),
    "of layers.csv": (wide("step", *[f"layer{s}" for s in range(S)]), "has no column sample"),
    "a short line.csv": (table([(0, 1), *LONG]), "line 2 has 2 values, not 3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_table_of_losses_is_refused_in_one_line(opsig, tmp_path, name):
    text, words = REFUSED[name]
    imported(opsig, tmp_path, name, text).fails(1, words)


def test_zipped_tables_and_a_name_with_a_comma_and_a_line_break_are_read(opsig, tmp_path):
    with gzip.open(tmp_path / "log.csv.gz", "wt", newline="") as file:
        csv.writer(file).writerows([HEADER, *((t, f"image,{s}\nof it", x) for t, s, x in LONG)])
    assert opsig("import", "--losses", tmp_path / "log.csv.gz", "-o", tmp_path / "run.h5").code == 0
    found = opsig("mine", tmp_path / "run.h5", "--top", 1)
    assert found.records[0]["name"] == f"image,{found.records[0]['sample']}\nof it"
    assert f"sample {found.records[0]['sample']} (image,{found.records[0]['sample']}" in found.err


EXPORTED = '"Step","run-3 - _step","run-3 - train/loss","run-3 - train/loss__MAX"\n"3","3","0.5","0.9"\n'


@pytest.mark.parametrize("text", ["Step;train_loss\n3;0,5\n", EXPORTED])
def test_scalars_of_other_tables_are_read(opsig, tmp_path, text):
    (tmp_path / "losses.csv").write_text(table(LONG))
    (tmp_path / "scalars.csv").write_text(text)
    given = ("--losses", tmp_path / "losses.csv", "--scalars", tmp_path / "scalars.csv")
    assert opsig("import", *given, "-o", tmp_path / "run.h5").code == 0
    with open_trajectory(tmp_path / "run.h5") as run:
        assert run.row("scalars/train_loss", 3) == 0.5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('"Step","a - loss","b - loss"\n3,0.5,0.6\n', "has several columns of train_loss: a - loss and b - loss"),
        ('step,train_loss\n3,"1,234"\n', "train_loss is '1,234', which is not a number"),
    ],
)
def test_scalars_that_could_be_two_numbers_are_refused(opsig, tmp_path, text, words):
    (tmp_path / "losses.csv").write_text(table(LONG))
    (tmp_path / "scalars.csv").write_text(text)
    given = ("--losses", tmp_path / "losses.csv", "--scalars", tmp_path / "scalars.csv")
    opsig("import", *given, "-o", tmp_path / "run.h5").fails(1, words)
