"""Small models of random layers, depths and losses through the commands: no traceback, and the right numbers.

    python benchmarks/fuzz_models.py [--models 1000] [--from 0] [--every 10] [--processes 5]

Each is trained for a few steps, grouped by `cluster`, and measured by `sharpness` with all metrics of samples, and for
eigenpairs, in this process through the command line's own entry; the first `--processes` as commands of their own. What
a command may do is end well, or say one line on stderr with exit code 1 or 2. Of every `--every`-th that ended well all
numbers are held against float64, as `layers.py` does.
"""

import argparse
import collections
import contextlib
import io
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import layers
import torch
from tasks import parts

from opsig_cli.main import run

BOUND = 1e-4
"""A float32 number of a random model may be made of larger ones that cancel."""
TASK = Path(parts.__file__)


def commands(path: Path, seed: int) -> list[list[str]]:
    task = ["--task", f"{TASK}:Drawn:seed={seed}"]
    statistics = ["--statistics", "running" if seed % 2 else "chunk"]
    return [
        ["train", *task, "-o", path, "--learning-rate", "0.02", "--steps", "4", "--track", "--checkpoint-every", "2",
         "--replace", *statistics],
        ["cluster", path, *task, "--top", "12"],
        ["sharpness", path, *task, "--steps", "4", "--metrics", "gradient_norm,curvature,sample_sharpness",
         "--random", "3"],
        ["sharpness", path, *task, "--steps", "2", "-k", "2", "--tolerance", "1e-2"],
    ]  # fmt: skip


def here(arguments: list[str]) -> tuple[int, str]:
    """Exit code and stderr of a command in this process; code -1 for anything that is no clean end."""
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["opsig", *map(str, arguments)]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
            code = -1
    return code, err.getvalue()


def elsewhere(arguments: list[str]) -> tuple[int, str]:
    process = subprocess.run(
        [sys.executable, "-m", "opsig_cli.main", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    return process.returncode, process.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=1000)
    parser.add_argument("--from", type=int, default=0, dest="first")
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--processes", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    counts: collections.Counter[str] = collections.Counter()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.h5"
        for number, seed in enumerate(range(options.first, options.first + options.models)):
            task = parts.Drawn(seed)
            said = f"seed {seed}: {' > '.join(task.names)}, {task.loss}"
            ended = True
            for arguments in commands(path, seed):
                call = elsewhere if number < options.processes else here
                code, err = call(arguments)
                lines = [line for line in err.splitlines() if line.startswith("opsig: ")]
                if code == 0:
                    counts["ended well"] += 1
                    continue
                clean = code in (1, 2) and len(lines) == 1 and "Traceback" not in err
                counts["said one line" if clean else "TRACEBACK"] += 1
                ended = False
                if clean:
                    counts[" ".join(lines[0].split()[1:6])] += 1
                else:
                    print(f"{said}: {arguments[0]}\n{err}", flush=True)
                if arguments[0] == "train":
                    break
            if (
                ended
                and number % options.every == 0
                and "batch norm" not in task.names
                and "autocast" not in task.names
            ):
                errors, _ = layers.row(task, task.samples, "cpu")
                wrong = {c: e for c, e in errors.items() if isinstance(e, str) or not e <= BOUND}
                counts["held against float64"] += 1
                counts["WRONG"] += bool(wrong)
                if wrong:
                    print(f"{said}: {wrong}", flush=True)
            if number % 20 == 19:
                print(f"{number + 1} models, {time.perf_counter() - begin:.0f} s: {dict(counts)}", flush=True)
    print(f"{options.models} models, {time.perf_counter() - begin:.0f} s")
    for what, count in counts.most_common():
        print(f"  {count:6}  {what}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
