"""Every client's files made anew and imported: `python -m clients [WORDS]` in tests/ prints the table of the docs."""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from clients import by_hand, jax_files, libraries
from clients.case import Client, Made
from opsig_cli.settings import Settings
from opsig_cli.studies.trained import settings_at
from opsig_cli.trajectory.file import open_trajectory

CLIENTS = [*libraries.CLIENTS, *jax_files.CLIENTS, *by_hand.CLIENTS]


def command(*arguments: object) -> tuple[int, str]:
    """The command line in this process: its exit code and stderr."""
    from opsig_cli.main import run

    before, sys.argv = sys.argv, ["opsig", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run()
        return 0, err.getvalue()
    except SystemExit as ended:
        return (ended.code if isinstance(ended.code, int) else 1), err.getvalue()
    finally:
        sys.argv = before


def missing(client: Client) -> str | None:
    """A library that a client's files take and that is not installed."""
    return next((name for name in client.needs if find_spec(name) is None), None)


def check(client: Client, folder: Path, *more: object) -> dict[str, str]:
    """Make a client's files, import them and hold the run against what is right; the row of the table. Raises
    AssertionError where something is not."""
    files = folder / "files"
    files.mkdir()
    right = client.make(files)
    run = folder / "run.h5"
    code, err = command("import", *right.paths, "--task", right.task, "--track", "-o", run, *right.options, *more)
    if right.refused:
        assert code == 1, err
        for words in right.refused:
            assert words in err.splitlines()[-1], err
        return {"losses": "refused in one line", "steps": "", "thresholds": "", "says": err.splitlines()[-1]}
    assert code == 0, err
    for words in right.says:
        assert words in err, err
    return held(right, run)


def held(right: Made, run: Path) -> dict[str, str]:
    with open_trajectory(run) as kept:
        assert kept.steps("checkpoints").tolist() == sorted(right.losses), kept.steps("checkpoints").tolist()
        worst = 0.0
        for step, losses in right.losses.items():
            worst = max(worst, float(np.abs(kept.row("losses/loss", step) - losses).max()))
        assert worst <= 1e-6, worst
        stored = Settings.stored(kept.attributes, kept.path)
        at = {step: settings_at(kept, stored, step) for step in right.losses}
        for step, rate in right.rates.items():
            assert np.isclose(at[step].learning_rate, rate, rtol=1e-12), (step, at[step].learning_rate, rate)
        for step, threshold in right.thresholds.items():
            assert np.isclose(at[step].threshold, threshold, rtol=1e-9, equal_nan=True), (step, at[step], threshold)
        for name, values in right.scalars.items():
            for step, value in values.items():
                found = float(kept.row(name, step))
                assert np.isclose(found, value, rtol=1e-5), (name, step, found, value)
    known = [value for value in right.thresholds.values() if value == value]
    return {
        "losses": "exact" if worst == 0 else f"to {worst:.0e}",
        "steps": f"{min(right.losses)} to {max(right.losses)}" if len(right.losses) > 1 else str(*right.losses),
        "thresholds": "exact" if known else "none, and said" if right.thresholds else "none: no optimizer in the file",
        "says": "; ".join([*right.says, *(f"{name.partition('/')[2]} by step" for name in right.scalars)]),
    }  # fmt: skip


def main(words: list[str]) -> int:
    failed = 0
    print("| client | written by | losses against plain PyTorch | steps | rates and thresholds | also |")
    print("|---|---|---|---|---|---|")
    for client in CLIENTS:
        if words and not any(word.lower() in client.name.lower() for word in words):
            continue
        writer = client.writer
        with contextlib.suppress(PackageNotFoundError):
            writer = f"{writer} {version(writer)}"
        if absent := missing(client):
            print(f"| {client.name} | {client.writer} | skipped: {absent} is not installed | | | |")
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                row = check(client, Path(folder))
            except Exception as error:
                failed += 1
                row = {"losses": "WRONG", "steps": "", "thresholds": "", "says": " ".join(str(error).split())[-300:]}
            row = {key: value.replace(folder, "").replace("|", "/") for key, value in row.items()}
        print(f"| {client.name} | {writer} | {row['losses']} | {row['steps']} | {row['thresholds']} | {row['says']} |",
              flush=True)  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
