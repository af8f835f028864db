"""Made tests/data/trajectory-1.0.h5, which every later version must open. Never run again for the same version."""

import sys

import numpy as np

from opsig_cli.backends import State, Tensor
from opsig_cli.trajectory.recorder import Recorder


def main(path: str) -> None:
    layout = [Tensor("w", "parameter", (2, 3), 0, 6), Tensor("n", "buffer", (), 0, 1)]
    with Recorder(
        path, [4, 8, 15], labels=["a", "\u00df", "c"], classes=["a", "\u00df", "c"], layout=layout
    ) as recorder:
        for step in (0, 1, 2, 5):
            state = State(step, np.arange(6, dtype=np.float32) + step, np.array([step + 0.5]))
            recorder.record(
                step,
                scalars={"train_loss": 1 / (step + 1), "learning_rate": 0.1},
                losses=np.array([step, step + 0.25, 3], np.float32),
                predictions=np.array([0, 1, step % 3]),
                state=state if step % 2 == 0 else None,
            )
        recorder.run.set_attributes(task="kept", settings_json={"task": "kept", "steps": 5}, state="complete")


if __name__ == "__main__":
    main(sys.argv[1])
