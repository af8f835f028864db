"""What `--plan` says of memory beside what commands take: predicted and measured peaks, in MiB, and their ratio.

    python benchmarks/plans.py FOLDER [--models mlp,cnn,gpt] [--only track,cluster]

A ratio below 1 is a plan that says too little. What a process holds before it measures is the larger part for small
models; `benchmarks/large.py` does the same of GPT-2 small.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from large import opsig

TEXT = Path(__file__).resolve().parent.parent / "README.md"
TASKS = {
    "mlp": "fashion-mnist:model=mlp,samples=2000",
    "cnn": "fashion-mnist:model=cnn,samples=1000",
    "gpt": f"text:path={TEXT},context=32",
}
COMMANDS = {
    "track": ["track", "run.h5"],
    "sharpness": ["sharpness", "run.h5", "-k", "2", "--steps", "12", "--at", "iterate"],
    "gradient_norm": ["sharpness", "run.h5", "--metrics", "gradient_norm", "--steps", "12", "--random", "50"],
    "curvature": ["sharpness", "run.h5", "--metrics", "curvature", "--steps", "12", "--random", "50"],
    "sample_sharpness": ["sharpness", "run.h5", "--metrics", "sample_sharpness", "--steps", "12", "--random", "20"],
    "trace": ["sharpness", "run.h5", "--metrics", "trace", "--steps", "12"],
    "cluster": ["cluster", "run.h5", "--top", "100"],
    "branch": ["branch", "run.h5", "--from", "8", "--steps", "4", "--drop", "1,2", "-o", "branch.h5", "--replace"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", default=",".join(TASKS))
    parser.add_argument("--only", default=",".join(COMMANDS))
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for model in arguments.models.split(","):
        train = ["train", "--task", TASKS[model], "--learning-rate", "0.1", "--steps", "12", "--checkpoint-every", "2"]
        opsig(folder, *train, "--track", "-o", "tracked.h5", "--replace")
        opsig(folder, *train, "-o", "bare.h5", "--replace")
        for name in arguments.only.split(","):
            shutil.copy(folder / ("bare.h5" if name == "track" else "tracked.h5"), folder / "run.h5")
            (plan,), *_ = opsig(folder, *COMMANDS[name], "--plan")
            _, peak, _, _ = opsig(folder, *COMMANDS[name])
            least, most, peak = plan["memory_least"] / 2**20, plan["memory_most"] / 2**20, peak * 1024
            print(
                f"{model:4} {name:17} planned {least:6.0f} to {most:6.0f}, measured {peak:6.0f}: {most / peak:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
