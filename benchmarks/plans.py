"""What `--plan` says of memory beside what commands take, and whether they stay within a bound: peaks in MiB.

    python benchmarks/plans.py FOLDER [--models mlp,resnet,vit,gpt2,recurrent] [--only track,cluster] [--quick]

Each command runs with all there is, and within the least that its plan asks for, 1.5 and 4 times that; a peak above
the bound, another result, and a plan below the peak are failures, and so is a bound just under the least that is not
refused in one line. `--quick` leaves out all bounds but the least. gpt2 needs transformers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from large import SMALL, hugging_face, numbers, opsig

HERE = Path(__file__).resolve().parent
TASKS = {
    "mlp": "fashion-mnist:model=mlp,samples=1000",
    "resnet": "fashion-mnist:model=resnet20,samples=120",
    "vit": "fashion-mnist:model=vit,samples=120",
    "recurrent": f"{HERE / 'recurrent.py'}:Recurrent",
    "gpt2": "",  # see `task_of`
}
PICTURES = ("mlp", "resnet", "vit")
COUPLED = "resnet"
"""Its samples share a chunk's statistics, so that some is refused."""
METRICS = ("gradient_norm", "curvature", "sample_sharpness")
COMMANDS = {
    "track": ["track", "run.h5"],
    "sharpness": ["sharpness", "run.h5", "-k", "1", "--steps", "8", "--at", "iterate", "--tolerance", "0.01"],
    **{m: ["sharpness", "run.h5", "--metrics", m, "--steps", "8", "--random", "20"] for m in METRICS},
    "by gradient": ["cluster", "run.h5", "--top", "40", "--by", "gradient", "--test", "none"],
    "silence": ["cluster", "run.h5", "--top", "40", "--budget", "20"],
    "sketch": ["cluster", "run.h5", "--top", "20", "--by", "gradient", "--sketch", "400", "--test", "none"],
    "probe": ["probe", "run.h5", "--input", "color:white"],
    "branch": ["branch", "run.h5", "--from", "4", "--steps", "2", "--drop", "1,2", "-o", "branch.h5", "--replace"],
}
SEQUENCES = 8
"""Of 16 tokens: at the least memory GPT-2 has products one sequence after the other."""
BOUNDS = (1.0, 1.5, 4.0)
AGREES = 1e-2
"""Relative difference of two results: eigenvalues are found to a residual of 1e-2."""
MIB = 1 << 20


def task_of(folder: Path, model: str) -> str:
    """The task's name; GPT-2's configuration and text are written first."""
    return TASKS[model] or hugging_face(folder, "small", SMALL, SEQUENCES)


def asked_of(model: str) -> list[str]:
    """The commands that a model can be asked for."""
    lacking = {"probe": model not in PICTURES}
    lacking |= dict.fromkeys(("sketch", "sample_sharpness"), model == COUPLED)
    return [name for name in COMMANDS if not lacking.get(name)]


def refused(case: Case, bound: int) -> bool:
    """Whether a bound is refused in one line that says what would do."""
    case.renew()
    done = subprocess.run(
        [sys.executable, "-m", "opsig_cli", *case.command, "-q", "--memory", f"{bound}B"],
        cwd=case.folder, capture_output=True, text=True,
    )  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if not line.startswith(("device:", "note:"))]
    return done.returncode == 1 and len(lines) == 1 and "--memory" in lines[0]


class Case:
    """A command on a model's run, each time on a fresh copy."""

    def __init__(self, folder: Path, source: str, command: list[str]):
        self.folder, self.source, self.command = folder, source, command

    def renew(self) -> None:
        """Make the file what it was."""
        shutil.copy(self.folder / self.source, self.folder / "run.h5")

    def run(self, *options: str) -> tuple[list[dict[str, Any]], float]:
        """Records, and the peak in MiB."""
        self.renew()
        records, peak, _, _ = opsig(self.folder, *self.command, *options)
        return records, peak * 1024

    def plan(self, *options: str) -> dict[str, Any]:
        """What the command says that it takes."""
        return self.run("--plan", *options)[0][0]


def checked(case: Case, quick: bool) -> tuple[str, bool]:
    """What was found of a command, in a line, and whether all held."""
    plan = case.plan()
    whole, peak = case.run()
    least, most = plan["memory_least"] / MIB, plan["memory_most"] / MIB
    words, good = f"{least:5.0f} to {most:5.0f}, took {peak:5.0f} ({most / peak:.2f})", most >= peak
    for times in BOUNDS[: 1 if quick else None]:
        bound = times * least + 1
        try:
            records, took = case.run("--memory", f"{bound:.0f}MiB")
        except SystemExit as error:
            words, good = f"{words}; {times}: {str(error).splitlines()[-1]}", False
            continue
        same = differences(whole, records)
        held = took <= bound
        good &= held and same <= AGREES
        words += f"; {times}: {took:5.0f} of {bound:5.0f}{'' if held else ' OVER'}, off {same:.0e}"
    if not refused(case, int(0.97 * plan["memory_least"])):
        words, good = words + "; NOT REFUSED below", False
    return words, good


def differences(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> float:
    """The largest difference of what two runs found, relative to the largest number; infinite where they differ in
    kind."""
    left, right = numbers(one), numbers(two)
    if left.shape != right.shape:
        return float("inf")
    return float(np.abs(left - right).max(initial=0.0) / max(1e-30, np.abs(left).max(initial=0.0)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", default=",".join(TASKS))
    parser.add_argument("--only", default=",".join(COMMANDS))
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for model in arguments.models.split(","):
        train = ["train", "--task", task_of(folder, model), "--learning-rate", "0.1", "--steps", "8"]
        train += ["--checkpoint-every", "2", "--seed", "3"]
        for name, track in (("tracked", ["--track"]), ("bare", [])):
            if not (folder / f"{model}-{name}.h5").exists():
                opsig(folder, *train, *track, "-o", f"{model}-{name}.h5")
        for name in asked_of(model):
            if name not in arguments.only.split(","):
                continue
            command = COMMANDS[name]
            if model == "recurrent":
                command = [*command, "--task", TASKS[model]]
            words, good = checked(
                Case(folder, f"{model}-{'bare' if name == 'track' else 'tracked'}.h5", command), arguments.quick
            )
            failed += [] if good else [f"{model} {name}"]
            print(f"{model:9} {name:16} planned {words}{'' if good else '  FAILED'}", flush=True)
    print(json.dumps({"failed": failed}))
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
