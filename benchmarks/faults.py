"""Every command that writes, with a fault at every system call that it makes on its file: the long form of a test.

    python benchmarks/faults.py [--every N] [--kind kill,EIO,...] [--only COMMAND]

A command is killed at its n-th call, or the call fails (EIO, ENOSPC, EINTR, EMFILE), or does half of what it was
asked; or the command is stopped there while others read, and goes on. Around it, descriptors, memory or disk run out,
the folder is read-only, the clock jumps. Then the same command is given again, and the run must be what it is without
faults, to the bit. Prints a line for each command and kind: experiments, and how many lost something that was
committed, mixed two states, ended well without having done all, hung for 20 seconds, or ended in a traceback; all must
be 0.
"""

import argparse
import collections
import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported: threads do not survive a fork
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="only every N-th call")
    parser.add_argument("--first", type=int, default=1, help="from this call on")
    parser.add_argument("--kind", default=",".join((*faults.KINDS, "stop", "conditions")))
    parser.add_argument("--only", help="these commands, between commas")
    options = parser.parse_args()
    total: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        base.chmod(0o755)
        (base / "first").mkdir()
        faults.preload(base / "first")
        for scenario in faults.scenarios(base / "begin"):
            if options.only and scenario.name not in options.only.split(","):
                continue
            folder = base / "here"
            scenario.lay_out(folder)
            whole = faults.run(folder, scenario.command)
            assert whole.code == 0, whole.err
            truth = faults.arrays(folder / "run.h5")
            calls = range(options.first, whole.calls + 1, options.every)
            kinds = options.kind.split(",")
            trials = {
                kind: [(kind, {"kind": kind, "at": at}) for at in calls] for kind in faults.KINDS if kind in kinds
            }
            if "stop" in kinds:
                stops = range(options.first, whole.calls + 1, options.every * 5)
                trials["stop"] = [("stop", {"kind": "stop", "at": at, "when_stopped": Reader(folder)}) for at in stops]
            if "conditions" in kinds:
                for name, (prepare, amounts) in faults.CONDITIONS.items():
                    trials[name] = [(f"{name} {n}", {"prepare": partial(prepare, n)}) for n in amounts]
            for kind, each in trials.items():
                found: collections.Counter[str] = collections.Counter()
                for label, keywords in each:
                    scenario.lay_out(folder)
                    ended = faults.run(folder, scenario.command, **keywords)
                    wrong = faults.judge(scenario, folder, ended, kind, truth)
                    reader = keywords.get("when_stopped")
                    wrong = wrong or (reader.wrong if reader else None)
                    found["experiments"] += 1
                    if wrong:
                        found[wrong.split(":")[0]] += 1
                        print(f"  {scenario.name}, {label}, call {keywords.get('at')}: {wrong}", flush=True)
                print(f"{scenario.name}, {kind}: {dict(found)}", flush=True)
                total.update(found)
    print(json.dumps(total))


if __name__ == "__main__":
    main()
