"""The Python door: the commands' functions, frames and datasets, and what must hold between them and the shell."""

import json

import numpy as np
import pandas as pd
import pytest
from conftest import TASKS
from opsig_torch import TorchBackend
from tasks import tiny

import opsig_cli
from opsig_cli import backends
from opsig_cli.studies import tracking

OWN = f"{TASKS}:Tiny"


def as_printed(records) -> list[dict]:
    from opsig_cli.records import plain

    return json.loads(json.dumps([{key: plain(value) for key, value in record.items()} for record in records]))


@pytest.mark.parametrize(
    ("name", "options", "arguments"),
    [
        ("mine", {"top": 5, "share": 30}, ("--top", "5", "--share", "30")),
        ("cluster", {"by": "loss", "top": 12}, ("--by", "loss", "--top", "12")),
        (
            "sharpness",
            {"metrics": "gradient_norm", "random": 3, "steps": "30", "task": OWN},
            ("--metrics", "gradient_norm", "--random", "3", "--steps", "30", "--task", OWN),
        ),
    ],
)
def test_a_function_returns_what_its_command_prints(opsig, tiny_run, name, options, arguments):
    printed = opsig(name, tiny_run, *arguments).records
    found = getattr(opsig_cli, name)(tiny_run, **options)
    assert as_printed(found) == printed
    with opsig_cli.open_trajectory(tiny_run) as run:
        assert as_printed(getattr(opsig_cli, name)(run, **options)) == printed
    assert len(found.frame()) == len(printed)
    assert type(found.figure()).__name__ == "Figure"


def test_records_of_mine_go_into_cluster_and_sharpness_as_through_a_pipe(opsig, tiny_run):
    mined = opsig_cli.mine(tiny_run, top=12)
    piped = opsig("cluster", "-", "--by", "loss", stdin=opsig("mine", tiny_run, "--top", "12").out)
    assert as_printed(opsig_cli.cluster(tiny_run, by="loss", records=mined)) == piped.records
    measured = opsig_cli.sharpness(tiny_run, records=mined[:4], metrics="curvature", steps="30", task=OWN)
    assert [record["sample"] for record in measured] == [record["sample"] for record in mined[:4]]


def test_a_run_open_for_reading_is_not_written(tiny_run):
    with (
        opsig_cli.open_trajectory(tiny_run) as run,
        pytest.raises(opsig_cli.OpsigError, match=r"open it with 'r\+'"),
    ):
        opsig_cli.sharpness(run, steps="30", task=OWN)


def test_losses_are_arrays_frames_and_datasets_alike(tiny_run):
    with opsig_cli.open_trajectory(tiny_run) as run:
        losses, frame, dataset = run.losses(), run.frame(), run.dataset()
        assert isinstance(frame, pd.DataFrame)
        np.testing.assert_array_equal(frame.to_numpy(), losses)
        assert frame.index.tolist() == run.steps("losses").tolist()
        assert frame.columns.get_level_values("label").tolist() == run.read("samples/label").tolist()
        np.testing.assert_array_equal(dataset["loss"].to_numpy(), losses)
        label = str(dataset["label"][0].item())
        chosen = dataset["loss"].sel(step=slice(3, 9)).isel(sample=dataset["label"].to_numpy() == label)
        places = np.flatnonzero(run.read("samples/label") == label)
        np.testing.assert_array_equal(chosen.to_numpy(), losses[3:10, places])
        assert dataset["loss"].attrs["units"] == "nat"
        np.testing.assert_array_equal(dataset["loss"][4, 2], losses[4, 2])
        assert run.frame("scalars")["train_loss"].notna().all()


def test_rows_are_in_order_of_step_however_they_were_recorded(tmp_path):
    with opsig_cli.Recorder(tmp_path / "run.h5", samples=3) as recorder:
        for step in (2, 0, 1):
            recorder.record(step, losses=np.full(3, step, np.float32))
    with opsig_cli.open_trajectory(tmp_path / "run.h5") as run:
        assert run.losses()[:, 0].tolist() == [0, 1, 2]
        assert run.dataset()["loss"].sel(sample=1).to_numpy().tolist() == [0, 1, 2]
        assert run.frame().loc[2].tolist() == [2, 2, 2]


def test_a_dataset_reads_what_is_asked_for_and_no_more(tiny_run, monkeypatch):
    with opsig_cli.open_trajectory(tiny_run) as run:
        read = []
        rows = type(run).rows

        def noted(self, name, start, stop):
            read.append((name, start, stop))
            return rows(self, name, start, stop)

        monkeypatch.setattr(type(run), "rows", noted)
        dataset = run.dataset()
        read.clear()
        dataset["loss"][5:7].to_numpy()
        assert read == [("losses/loss", 5, 7)]


def test_what_is_not_there_is_one_line(tiny_run):
    with opsig_cli.open_trajectory(tiny_run) as run:
        with pytest.raises(opsig_cli.OpsigError, match="has no rows called 'nothing'"):
            run.frame("nothing")
        with pytest.raises(opsig_cli.OpsigError, match="has no rows called 'samples'"):
            run.dataset("samples")


@pytest.mark.parametrize("name", opsig_cli.__all__)
def test_every_public_name_is_there_and_documented(name):
    assert getattr(opsig_cli, name).__doc__


def test_a_session_that_is_opened_later_has_the_capabilities_of_the_real_one():
    """`isinstance` with a protocol asks the class alone from Python 3.12 on."""
    session = TorchBackend().open(tiny.Tiny(), "cpu")
    later = tracking.opened_later(lambda: session)
    assert later.__class__ is type(session)
    assert isinstance(later, backends.Slopes)
