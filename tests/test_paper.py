"""docs/paper.md: its commands are ones that opsig has, and its pictures are there and small."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
TEXT = (DOCS / "paper.md").read_text()
COMMANDS = list(runpy.run_path(str(DOCS / "paper.py"))["commands"](TEXT))


def calls():
    """Every call of opsig in the document, as words."""
    for command in COMMANDS:
        for part in re.split(r"\||&&|;", re.sub(r"'[^']*'", "''", command.line)):
            if "opsig " in part:
                yield tuple(shlex.split(part.replace('"', "'").partition("opsig ")[2].partition(">")[0]))


@pytest.mark.parametrize("words", sorted(set(calls())), ids=" ".join)
def test_every_command_of_the_document_is_one_that_there_is(opsig, monkeypatch, words):
    monkeypatch.setenv("COLUMNS", "300")
    name = words[:2] if words[0] == "simulate" else words[:1]
    shown = opsig(*name, "--help")
    assert shown.code == 0
    for option in (word for word in words if re.match(r"--?[a-z]", word)):
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", shown.out), option


def test_the_document_covers_the_paper():
    headings = re.findall(r"^#+ (.*)", TEXT, re.MULTILINE)
    spoken = " ".join(headings)
    for needed in ("Fig. 1", "Fig. 2", "Fig. 3", "Fig. 4", "Fig. 5", "Fig. 6a", "Fig. 6b", "3.1", "3.2", *(
        f"App. {letter}" for letter in "BCDEFGH"
    )):  # fmt: skip
        assert needed in spoken, needed
    assert any(not command.runs for command in COMMANDS)  # what needs a GPU


def test_every_picture_is_made_by_a_command_shown_and_small():
    made = {Path(word).name for words in calls() for word in words if word.endswith(".png")}
    shown = set(re.findall(r"\]\(paper/([^)]*)\)", TEXT))
    files = {path.name: path.stat().st_size for path in (DOCS / "paper").glob("*")}
    assert shown == set(files)
    assert shown <= made
    assert max(files.values()) < 250_000
    assert sum(files.values()) < 2_000_000


def test_the_script_lists_what_it_runs():
    listed = subprocess.run(
        [sys.executable, DOCS / "paper.py", "--list", "--only", "fig-4"], capture_output=True, text=True, check=True
    )
    assert "simulate valley" in listed.stdout
    assert "probe" not in listed.stdout
