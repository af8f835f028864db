"""Every command that writes, with a fault at every system call that it makes on its files: the long form of a test.

    python benchmarks/faults.py [--every N] [--kind kill,EIO,...] [--only COMMAND,...]

At its n-th call a command is killed, before it or in the middle of a write, or the call fails (EIO, ENOSPC, EINTR, and
EMFILE of those that open), or does half of what it was asked; or the command is stopped there while others read, and
goes on. Around it, descriptors, memory or disk run out, the folder is read-only, the clock jumps. Then the same command
is given again, and the run must be what it is without faults, to the bit. Prints a line for each command and kind:
experiments, and how many lost something that was committed, mixed two states, ended well without having done all, hung
for 20 seconds, or ended in a traceback; all must be 0.
"""

import argparse
import collections
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported: threads do not survive a fork
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import every_call
import faults


class Reader:
    """Reads a run whose writer is stopped: that works, or ends with one line, in time."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.wrong: str | None = None

    def __call__(self) -> None:
        if (self._folder / "run.h5").exists():
            ended = faults.run(self._folder, ["verify", "run.h5"])
            if ended.hung or not ended.clean or "damaged" in ended.err:
                self.wrong = "hang: of a reader" if ended.hung else f"traceback: of a reader: {ended.err[-400:]}"


def stops(calls: range, folder: Path) -> Iterator[tuple[str, Reader, dict]]:
    """Experiments in which the command is stopped at a call while others read."""
    for at in calls:
        reader = Reader(folder)
        yield f"call {at}", reader, {"meet": every_call.One("stop", at), "when_stopped": reader}


def conditions(name: str, folder: Path) -> Iterator[tuple[str, Reader, dict]]:
    """Experiments in which something is scarce or odd around the command."""
    prepare, amounts = faults.CONDITIONS[name]
    for amount in amounts:
        yield str(amount), Reader(folder), {"prepare": partial(prepare, amount)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="only every N-th call")
    parser.add_argument("--first", type=int, default=1, help="from this call on")
    parser.add_argument("--kind", default=",".join((*every_call.KINDS, "stop", "conditions")))
    parser.add_argument("--only", help="these commands, between commas")
    options = parser.parse_args()
    kinds, total, made, begin = options.kind.split(","), collections.Counter(), 0, time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        base.chmod(0o755)
        beginnings = multiprocessing.get_context("fork").Process(target=faults.make_beginnings, args=[base / "begin"])
        beginnings.start()
        beginnings.join()
        for scenario in faults.scenarios(base / "begin"):
            if options.only and scenario.name not in options.only.split(","):
                continue
            folder = base / "here"
            faults.preload(folder, scenario)
            truth, count = faults.truth_of(scenario, folder)
            made += count
            found: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)

            def note(kind: str, about: str, wrong: str | None, name=scenario.name, found=found) -> None:
                found[kind]["experiments"] += 1
                if wrong:
                    found[kind][wrong.split(":")[0]] += 1
                    print(f"  {name}, {kind}, {about}: {wrong}", flush=True)

            at_calls = [kind for kind in every_call.KINDS if kind in kinds]
            if at_calls:
                calls = range(options.first, 10 * count, options.every)  # commits go by time, and may be more
                for kind, at, call, wrong in faults.attack(scenario, base, calls, at_calls):
                    note(kind, f"call {at}, {call}", wrong)
            others = [("stop", stops(range(options.first, count + 1, options.every * 5), folder))] * ("stop" in kinds)
            if "conditions" in kinds:
                others += [(name, conditions(name, folder)) for name in faults.CONDITIONS]
            for kind, experiments in others:
                for about, reader, keywords in experiments:
                    scenario.lay_out(folder)
                    ended = faults.run(folder, scenario.command, **keywords)
                    wrong = faults.judge(scenario, folder, ended, kind == "little memory", truth)
                    note(kind, about, wrong or reader.wrong)
            for kind, counts in found.items():
                print(f"{scenario.name} ({count} calls), {kind}: {dict(counts)}", flush=True)
                total.update(counts)
    print(f"{made} calls, {time.monotonic() - begin:.0f} s", file=sys.stderr)
    print(json.dumps(total))


if __name__ == "__main__":
    main()
