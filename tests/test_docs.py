"""The documentation: its generated pages are what the code says, its examples run, its links lead somewhere.

That the site builds without warnings is `make docs`'s to see.
"""

import doctest
import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

import opsig_cli

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def reference():
    spec = spec_from_file_location("make_reference", DOCS / "make_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_what_the_code_says():
    stale = [name for name, page in reference().pages().items() if (DOCS / name).read_text() != page]
    assert not stale, "run: python docs/make_reference.py"
    assert {f"commands/{path.name}" for path in (DOCS / "commands").iterdir()} < set(reference().pages()) | {
        "python.md"
    }


def test_the_python_page_names_everything_public():
    assert {name for names in reference().GROUPS.values() for name in names} == set(opsig_cli.__all__)


@pytest.mark.parametrize("name", ["notebook.md"])
def test_examples_on_a_page_run_as_they_stand(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (DOCS / name).read_text().replace("```", "")
    examples = doctest.DocTestParser().get_doctest(text, {}, name, name, 0)
    runner = doctest.DocTestRunner()
    runner.run(examples)
    assert len(examples.examples) > 5
    assert runner.failures == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_that_are_there(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_page_is_in_the_table_of_contents():
    index = (DOCS / "index.md").read_text()
    listed = {
        line.strip() for block in re.findall(r"```\{toctree\}(.*?)```", index, re.DOTALL) for line in block.split("\n")
    }
    assert {page.stem for page in DOCS.glob("*.md")} - {"index"} <= listed


def test_the_simulated_costs_are_what_the_script_prints():
    printed = subprocess.run(
        [sys.executable, DOCS / "clusters" / "cost.py"], capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() in (DOCS / "clusters.md").read_text()
