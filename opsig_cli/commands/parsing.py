"""What a command line that cannot be parsed is answered with: one line, which names the option that was meant."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from opsig_cli.errors import OpsigError, UsageError

CALLED = {
    "--lr": "--learning-rate", "--batch": "--batch-size", "--bs": "--batch-size", "--wd": "--weight-decay",
    "--epochs": "--steps", "--iterations": "--steps", "--num-steps": "--steps", "--max-steps": "--steps",
    "--gpu": "--device", "--cuda": "--device", "--out": "--output", "--plot": "--figure", "--save": "--figure",
    "--n": "--top", "--overwrite": "--replace", "--force": "--replace", "--opt": "--optimizer",
}  # fmt: skip
"""What options are called elsewhere, and here."""


MISTAKE: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError")
"""What the parser raises for a mistake: a class of click's, which typer has brought along under another name."""


@contextmanager
def in_one_line(ctx) -> Iterator[None]:
    """Raise the parser's own mistakes as a UsageError of ours, which is one line; it would draw a box around them."""
    try:
        yield
    except MISTAKE as error:
        if ctx.resilient_parsing or type(error).__name__ == "NoArgsIsHelpError":
            raise
        said = error.format_message()
        said += "" if said.endswith((".", "?", "!")) else "."
        raise UsageError(f"{said} See {ctx.command_path} --help") from error


class Commands(TyperGroup):
    """A group of commands that answers a mistake in one line."""

    def parse_args(self, ctx, args):
        """Parse the group's own options."""
        with in_one_line(ctx):
            return super().parse_args(ctx, args)

    def resolve_command(self, ctx, args):
        """The command that is called so."""
        with in_one_line(ctx):
            return super().resolve_command(ctx, args)


class Command(TyperCommand):
    """A command whose help shows no type for a flag, and N or X for a number, as the rest of the help has names; an
    option by the name that it has elsewhere is answered with ours."""

    def parse_args(self, ctx, args):
        """Parse, but first look for options that are called something else here. Raises UsageError for one."""
        known = {name for param in self.get_params(ctx) for name in (*param.opts, *param.secondary_opts)}
        for arg in args:
            if arg == "--":
                break
            name = arg.partition("=")[0]
            ours = CALLED.get(name)
            if name not in known and ours in known and not ctx.resilient_parsing:
                raise UsageError(f"{ctx.command_path} has no option {name}. It is called {ours}")
        if sum(arg.partition("=")[0] == "--figure" for arg in args) > 1 and not ctx.resilient_parsing:
            raise UsageError("--figure is given twice. A call draws one picture: give the other name in a second call")
        with in_one_line(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx):
        """Run it. Raises OpsigError where it is interrupted, of which typer keeps the exit code alone."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise OpsigError("interrupted", exit_code=130) from None

    def get_params(self, ctx):
        """All parameters, with what stands for their values."""
        shown = {int: "N", float: "X"}
        params = super().get_params(ctx)
        for param in params:
            if param.metavar is None:
                kind = getattr(getattr(param, "type_descriptor", None), "annotation", None)
                param.metavar = "" if getattr(param, "is_flag", False) else shown.get(kind)
        return params
