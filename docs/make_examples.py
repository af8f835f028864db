"""Run the example of every command and keep what a person sees of it, for the commands' pages: docs/outputs/*.txt.

    python docs/make_examples.py

A test runs them again and compares what they say, numbers aside.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import sys
import tempfile
from pathlib import Path

import typer.main
from make_reference import commands, page_name

from opsig_cli.main import app, run

OUTPUTS = Path(__file__).parent / "outputs"
LINES = 14
"""Lines of a table that are kept."""
SETTING = {
    "opsig merge": [
        "opsig sharpness run.h5 --metrics gradient_norm --steps 0:40 --part 1/2 -o part1.h5",
        "opsig sharpness run.h5 --metrics gradient_norm --steps 0:40 --part 2/2 -o part2.h5",
    ],
    "opsig compare": [
        "opsig train --task digits --steps 30 --track -o gd.h5",
        "opsig train --task digits --optimizer adam --learning-rate 0.003 --steps 30 --track -o adam.h5",
    ],
}
"""What an example needs beside run.h5."""
FIRST = "opsig train"
TASK = """
import torch
from torch.nn.functional import cross_entropy


class MyTask:
    classes = ("even", "odd")

    def model(self):
        return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))

    def dataset(self):
        x = torch.randn(120, 8, generator=torch.Generator().manual_seed(0))
        return torch.utils.data.TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long())

    def losses(self, model, batch):
        return cross_entropy(model(batch[0]), batch[1], reduction="none")
"""


def examples() -> dict[str, str]:
    """The example of every command, by the words that call it; the one that makes run.h5 first."""
    found = {words: (command.help or "").partition("Example: ")[2].strip() for words, command in
             commands(typer.main.get_command(app))}  # fmt: skip
    return {FIRST: found[FIRST]} | found


def played(line: str) -> str:
    """What a person sees of a command line on a terminal of 100 columns: its table, shortened, and how it ends."""
    out, err = "", ""
    for command in line.split(" | "):
        words = [part for word in shlex.split(command)[1:] for part in _globbed(word)]
        last = command == line.split(" | ")[-1] and "--format" not in words
        out, err = _call(words + (["--format", "table"] if last else []), out)
    shown = [text.rstrip() for text in out.rstrip().splitlines()]
    if len(shown) > LINES:
        shown = [*shown[:LINES], "..."]
    ends = [text for text in err.splitlines() if text.startswith(("wrote:", "found:", "next:"))]
    return "\n".join([*shown, "", *ends]).strip() + "\n"


def _globbed(word: str) -> list[str]:
    return sorted(map(str, Path(".").glob(word))) if "*" in word else [word]


def _call(words: list[str], stdin: str) -> tuple[str, str]:
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv, sys.stdin
    sys.argv, sys.stdin = ["opsig", *words], io.StringIO(stdin)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run()
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"opsig {shlex.join(words)}: {err.getvalue()}") from ended
    finally:
        sys.argv, sys.stdin = before
    return out.getvalue(), err.getvalue()


def _checkpoints() -> None:
    """A task of one's own and three checkpoints of it, for `import`."""
    import torch

    Path("mytask.py").write_text(TASK)
    Path("checkpoints").mkdir()
    scope: dict = {}
    exec(TASK, scope)
    torch.manual_seed(0)
    model = scope["MyTask"]().model()
    for step in (0, 10, 20):
        torch.save({"model": model.state_dict(), "step": step}, f"checkpoints/step{step}.pt")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)


def played_all() -> dict[str, str]:
    """What every example prints, by the name of its page, run in the current folder."""
    os.environ["COLUMNS"] = "100"
    found = {}
    _checkpoints()
    for words, line in examples().items():
        for setting in SETTING.get(words, ()):
            _call(shlex.split(setting)[1:], "")
        if words == "opsig import":  # run.h5 is for the others
            line = line.replace("-o run.h5", "-o imported.h5")
        text = played(line)
        found[page_name(words)] = text.replace("imported.h5", "run.h5")
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        made = played_all()
    OUTPUTS.mkdir(exist_ok=True)
    for name, text in made.items():
        (OUTPUTS / f"{name}.txt").write_text(text)
