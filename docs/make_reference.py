"""Write the reference pages that come from the code: docs/commands/*.md and docs/python.md.

    python docs/make_examples.py    # what the examples print, in docs/outputs
    python docs/make_reference.py

A test runs this and fails where a page differs from what the code says.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

import opsig_cli
from opsig_cli.main import app

DOCS = Path(__file__).parent
GROUPS = {
    "Reading": ("open_trajectory", "Trajectory"),
    "Analysing": ("mine", "cluster", "sharpness", "branch", "Records"),
    "Recording": ("Recorder", "State", "Tensor"),
    "Tasks and errors": ("Task", "OpsigError"),
}
"""The sections of docs/python.md; together they name everything that is public."""


def commands(group: Any, path: str = "opsig") -> Iterator[tuple[str, Any]]:
    """Every command with the words that call it, in the order in which `opsig --help` lists them."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def command_page(words: str, command: Any) -> str:
    """A command's help as Markdown."""
    context = command.make_context(words, [], resilient_parsing=True)
    about, _, example = inspect.cleandoc(command.help).partition("\nExample: ")
    lines = [f"# {words}", "", about.strip(), "", "```sh", example.strip(), "```", ""]
    if (output := DOCS / "outputs" / f"{page_name(words)}.txt").exists():
        lines += [
            "On a small run this prints, and on stderr ends with:",
            "",
            "```text",
            output.read_text().rstrip(),
            "```",
            "",
        ]
    arguments, options = [], []
    for parameter in command.get_params(context):
        kind = parameter.metavar or ""
        if parameter.opts[0].startswith("-"):
            names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
            options.append((f"{names} `{kind}`" if kind else names, parameter))
        else:
            arguments.append((f"`{kind or parameter.name}`", parameter))
    for title, rows in (("Argument", arguments), ("Option", options)):
        if rows:
            lines += [f"| {title.lower()} | meaning |", "|---|---|"]
            lines += [f"| {cell(name)} | {cell(meaning(parameter))} |" for name, parameter in rows]
            lines.append("")
    return "\n".join(lines)


def page_name(words: str) -> str:
    """The name of a command's page, given the words that call it."""
    return words.removeprefix("opsig ").replace(" ", "-")


def meaning(parameter: Any) -> str:
    """What a parameter is for, with its default where the words do not give it."""
    words = parameter.help or ""
    default = parameter.default
    if parameter.required:
        words += " Required."
    elif isinstance(default, str | int | float) and not isinstance(default, bool) and "Default" not in words:
        words += f" Default: {default}."
    return words.strip()


def cell(text: str) -> str:
    """Text in a cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ")


def python_page() -> str:
    """The public functions and classes as Markdown."""
    lines = ["# Python", "", inspect.cleandoc(opsig_cli.__doc__ or ""), ""]
    lines += ["[From a notebook](notebook.md) shows them at work.", ""]
    for title, names in GROUPS.items():
        lines += [f"## {title}", ""]
        for name in names:
            lines += [f"### {name}", "", *described(getattr(opsig_cli, name), f"opsig_cli.{name}")]
            if inspect.isclass(getattr(opsig_cli, name)):
                lines += members(getattr(opsig_cli, name))
    return "\n".join(lines).rstrip() + "\n"


def members(of: type) -> Iterator[str]:
    """The documented public members of a class, those that it inherits from one of ours included."""
    seen = set()
    for owner in of.__mro__:
        if not owner.__module__.startswith("opsig_cli"):
            continue
        for name, member in vars(owner).items():
            if name.startswith("_") or name in seen or not inspect.getdoc(member):
                continue
            seen.add(name)
            if isinstance(member, property):
                yield from ("", f"`.{name}`", "", text_of(member))
            elif inspect.isfunction(member):
                yield from ("", *described(member, f".{name}"))
    yield ""


def described(thing: Any, name: str) -> list[str]:
    """Signature and docstring."""
    return ["```python", name + signature(thing), "```", "", text_of(thing), ""]


def signature(thing: Any) -> str:
    """The signature as it is written, without self; nothing for a class that is not called."""
    if inspect.isclass(thing) and (issubclass(thing, BaseException) or getattr(thing, "_is_protocol", False)):
        return ""
    written = inspect.signature(thing)
    kept = [parameter for name, parameter in written.parameters.items() if name != "self"]
    text = str(written.replace(parameters=kept))
    text = re.sub(r"<function (\w+) at 0x[0-9a-f]+>", r"\1", text)
    # Annotations come as quoted text; defaults keep their quotes.
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", text).replace("opsig_cli.", "")


def text_of(thing: Any) -> str:
    """The docstring as Markdown: an example becomes a block of code."""
    text = inspect.getdoc(thing) or ""
    return re.sub(r"((?:^>>>.*\n?(?:(?!>>>|\n).*\n?)*)+)", r"```python\n\1\n```\n", text, flags=re.MULTILINE).strip()


def pages() -> dict[str, str]:
    """Every generated page by its path below docs/."""
    found = list(commands(typer.main.get_command(app)))
    made = {f"commands/{page_name(words)}.md": command_page(words, command) for words, command in found}
    made["python.md"] = python_page()
    return made


if __name__ == "__main__":
    for place, page in pages().items():
        (DOCS / place).write_text(page)
