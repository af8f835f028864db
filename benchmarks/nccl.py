"""Processes under torchrun that talk by NCCL, against the plain command: the same bits?

    python benchmarks/nccl.py FOLDER [--processes N] [--device cuda] [--model mlp]

From a source tree, installed or not. One process for each GPU; where there is one GPU, a group of one process, which
tells, spreads and sums as several do, but passes no sum on. `plain again` is the plain command once more: what is not
the same there differs by the device. Then two processes on the first GPU, which NCCL refuses: one line, and no hang.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
from from_source import python_path

TRAIN = "train --task fashion-mnist --learning-rate 0.1 --steps 40 --checkpoint-every 2 --chunk-size 250 --replace -q"
COMMANDS = {
    "train": f"{TRAIN} --track -o run.h5",
    "track": "track run.h5 -q",
    "sharpness": "sharpness run.h5 --at iterate --steps 20:41:10 -k 2 -q",
    "curvature": "sharpness run.h5 --metrics gradient_norm,curvature --steps 40 -q",
    "cluster": "cluster run.h5 --top 200 -q",
}
KEPT = ("checkpoints/params", "losses/loss", "losses/prediction", "sharpness/eigenvalue", "sharpness/eigenvector",
        "per_sample/gradient_norm", "per_sample/curvature")  # fmt: skip
LONGEST = 300
"""Seconds after which processes that have not ended count as hanging."""


def torchrun(count: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]


def member(arguments: list[str]) -> None:
    """Run the command in a group, of one process or several; the command line makes no group of one."""
    from opsig_cli.backends import Meets, load_backend
    from opsig_cli.main import app

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    sys.argv = ["opsig", *arguments]
    backend = load_backend("torch")
    assert isinstance(backend, Meets)
    with backend.meeting(rank, size) as serve:
        serve() if rank else app()


def found(folder: Path) -> dict[str, np.ndarray]:
    with h5py.File(folder / "run.h5") as run:
        return {name: np.asarray(run[name]) for name in KEPT if name in run}


def difference(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> str:
    """Of what two runs of a command left in the file and printed."""
    if one.keys() != two.keys():
        return "not the same datasets"
    differing = []
    for name, values in one.items():
        if not np.array_equal(values, two[name], equal_nan=values.dtype.kind == "f"):
            if values.shape != two[name].shape or values.dtype.kind != "f":
                differing.append(f"{name} differs")
            else:
                off = np.nanmax(np.abs(values - two[name])) / np.nanmax(np.abs(values))
                differing.append(f"{name} differs by {off:.0e}")
    return ", ".join(differing) or "the same bits"


def talk(folder: Path) -> str:
    """What NCCL's own log tells of a command."""
    text = "".join(path.read_text(errors="replace") for path in folder.glob("nccl.*"))
    version = re.search(r"NCCL version ([\w.+]+)", text)
    counts = {name: len(re.findall(rf"NCCL INFO {name}: opCount", text)) for name in ("Broadcast", "Send", "Recv")}
    said = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return f"NCCL {version[1] if version else '(not used)'}: {said or 'nothing sent'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--processes", type=int)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="mlp")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": python_path(folder), "OMP_NUM_THREADS": "1"}
    if arguments.device == "cuda":
        import torch

        gpus = torch.cuda.device_count()
        print(f"torch {torch.__version__}, {gpus} x {torch.cuda.get_device_name()}", flush=True)
        environment |= {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,COLL,P2P",
                        "NCCL_DEBUG_FILE": str(folder / "nccl.%p")}  # fmt: skip
    count = arguments.processes or (gpus if arguments.device == "cuda" else 1)

    def run(start: list[str], command: str) -> tuple[int, str, str, float]:
        """Exit status, output, messages, and seconds."""
        begin = time.perf_counter()
        done = subprocess.run([*start, *command.split(), "--device", arguments.device], cwd=folder, env=environment,
                              capture_output=True, text=True, timeout=LONGEST)  # fmt: skip
        return done.returncode, done.stdout, done.stderr, time.perf_counter() - begin

    plain = [sys.executable, "-m", "opsig_cli"]
    together = [*torchrun(count), str(Path(__file__).resolve()), "--member"]
    prepared: dict[str, Path] = {"train": folder / "none.h5"}
    for name, command in {"bare": f"{TRAIN} -o bare.h5", "tracked": f"{TRAIN} --track -o tracked.h5"}.items():
        status, _, messages, _ = run(plain, f"{command} --model {arguments.model}")
        if status:
            raise SystemExit(messages)
        prepared[name] = folder / f"{name}.h5"
    bad = 0
    for name, command in COMMANDS.items():
        if name == "train":
            command += f" --model {arguments.model}"
        ends = []
        for start in (plain, plain, together):
            for old in folder.glob("nccl.*"):
                old.unlink()
            (folder / "run.h5").unlink(missing_ok=True)
            source = prepared["train" if name == "train" else "bare" if name == "track" else "tracked"]
            if source.exists():
                shutil.copy(source, folder / "run.h5")
            status, out, messages, seconds = run(start, command)
            if status:
                raise SystemExit(f"{name} ended with {status}:\n{messages}")
            ends.append((found(folder), out, seconds))
        one, again, group = ends
        words = difference(one[0], group[0])
        if words == "the same bits" and one[1] != group[1]:
            words += " in the file, and other records"
        bad += words != "the same bits"
        print(f"{name:10} {count} by {talk(folder) if arguments.device == 'cuda' else 'gloo'}: {words}; plain again: "
              f"{difference(one[0], again[0])}; {one[2]:.1f} and {group[2]:.1f} s", flush=True)  # fmt: skip
    if arguments.device == "cuda":
        environment |= {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
        shutil.copy(prepared["bare"], folder / "run.h5")
        status, out, messages, seconds = run([*torchrun(2), "-m", "opsig_cli"], "track run.h5 -q")
        lines = [line for line in messages.splitlines() if line.startswith("opsig:")]
        bad += status == 0 or len(lines) != 1 or "Traceback" in messages.split("torch.distributed.elastic")[0]
        print(f"two on one GPU: status {status} after {seconds:.1f} s, said {lines}", flush=True)
    print("fine" if not bad else f"{bad} not as asked")
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--member"]:
        member(sys.argv[2:])
    else:
        main()
