"""At which step each checkpoint is: by its content, its optimizer, its name, or as a person says."""

import sys

import numpy as np
import pytest
import torch
from conftest import TASKS

from opsig_cli.studies.importing import checkpoints, flow
from opsig_cli.studies.importing.steps import steps_in_names, steps_of
from opsig_cli.trajectory.file import open_trajectory

sys.path.insert(0, str(TASKS.parent))
from saved_checkpoints import OWN, flat, imports, params_of, save, weights
from tiny import Tiny


def test_steps_are_those_of_the_content_then_the_optimizer_then_the_name_then_an_epoch():
    paths = ["v2/ckpt_9_lr0.1.pt", "v2/ckpt_10_lr0.1.pt"]
    both = [{"epoch": 0, "step": 90}, {"epoch": 1, "step": 100}]
    epochs = [{"epoch": 0}, {"epoch": 1}]
    assert steps_of(paths, both, [91, 101]) == ([90, 100], "'step' in the content")
    assert steps_of(paths, [{"step": 3}, {"step": 3}], [91, 101]) == ([91, 101], "the optimizer's count")
    assert steps_of(paths, epochs, [None, None]) == ([9, 10], "the names")
    assert steps_of(["a.pt", "b.pt"], epochs, [None, None]) == ([0, 1], "'epoch' in the content")
    assert steps_of(paths, both, [91, 101], "name")[0] == [9, 10]
    assert steps_of(paths, both, [91, 101], "optimizer")[0] == [91, 101]


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (["epoch=0-step=40-loss=0.51.ckpt", "epoch=1-step=80-loss=0.25.ckpt"], [40, 80]),
        (["run3/step_10/model.pt", "run3/step_20/model.pt"], [10, 20]),
        (["checkpoint-500", "checkpoint-1000"], [500, 1000]),
        (["model.10", "model.20"], [10, 20]),
        (["resnet18_iter00050.pth.tar"], [50]),
        (["resnet18-7.pt"], [7]),
    ],
)
def test_the_number_in_the_name_is_the_one_that_differs(names, steps):
    assert steps_in_names(names)[1] == steps


def test_unclear_steps_are_refused_in_one_line(opsig, tmp_path):
    def tries(names, *options, content=None):
        files = [save(tmp_path, name, {"model": weights(i)} | (content or {})) for i, name in enumerate(names)]
        return opsig("import", *files, *OWN, "-o", tmp_path / "x.h5", "--quiet", *options)

    tries(["a1.pt", "best.pt"]).fails(1, "best.pt has no number where the others have it", "--steps 0,10,20")
    tries(["good.pt", "best.pt"]).fails(1, "good.pt does not say at which step", "--steps 0,10,20")
    tries(["a1.pt", "a2.pt"], "--steps-from", "content").fails(1, "a1.pt does not say at which step")
    both = tries(["a1.pt", "a2.pt"], "--steps-from", "content", content={"step": 4})
    both.fails(1, "a1.pt", "a2.pt are both at step 4")
    tries(["e1_s1.pt", "e2_s2.pt"], "--steps-from", "name").fails(1, "not clear which number")
    tries(["a1.pt", "a2.pt"], "--steps", "0").fails(2, "names 1 steps, and there are 2 checkpoints")
    tries(["a1.pt", "a2.pt"], "--steps", "0,0").fails(2, "names a step twice")
    tries(["a1.pt", "a2.pt"], "--steps", "0,x").fails(2, "not a list of steps")
    tries(["a1.pt"], "--steps", "0", "--steps-from", "name").fails(2, "Give one of them")
    tries(["a1.pt"], "--steps-from", "luck").fails(2, "content, optimizer, name")
    assert not (tmp_path / "x.h5").exists()
    done = tries(["b.pt", "a.pt"], "--steps", "5,3")
    assert [(r["step"], r["source"][-4:]) for r in done.records] == [(3, "a.pt"), (5, "b.pt")]


def test_the_optimizer_s_own_count_is_said_where_it_differs(opsig, tmp_path):
    model = Tiny().model()
    made = torch.optim.Adam(model.parameters())
    model(Tiny().x).square().sum().backward()
    made.step()
    file = save(tmp_path, "c.pt", {"model": model.state_dict(), "optimizer": made.state_dict(), "step": 0})
    _, outcome = imports(opsig, tmp_path, file)
    assert "at step 0 the optimizer's own count is 1" in outcome.err
    _, outcome = imports(opsig, tmp_path, file, "--steps-from", "optimizer")
    assert outcome.records[0]["step"] == 1
    assert "own count" not in outcome.err


def test_new_steps_are_appended_and_those_that_are_there_stay(opsig, tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, f"c{step}.pt", weights(step))
    run, first = imports(opsig, tmp_path, tmp_path / "c1.pt", tmp_path / "c2.pt")
    files = [tmp_path / f"c{step}.pt" for step in (1, 2, 3)]
    opsig("import", *files, *OWN, "-o", run).fails(1, "exists. Add new steps with --append", "--replace")
    opsig("import", *files, *OWN, "-o", tmp_path / "no.h5", "--append").fails(1, "does not exist")
    opsig("import", *files, *OWN, "-o", run, "--append", "--replace").fails(2, "Give one of them")
    save(tmp_path, "c1.pt", weights(7))
    more = opsig("import", *files, *OWN, "-o", run, "--append", "--track")
    assert more.code == 0, more.err
    assert "2 of 3 steps are in" in more.err
    assert [r["step"] for r in more.records] == [3]
    np.testing.assert_array_equal(params_of(run, 1), flat(weights(1)))
    with open_trajectory(run) as kept:
        assert kept.steps("losses").tolist() == [1, 2, 3]
        assert kept.attributes["settings_json"]["steps"] == 3
        assert kept.row("checkpoints/source/path", 3).decode() == str(tmp_path / "c3.pt")
        assert kept.row("checkpoints/source/sha256", 2).decode() == first.records[1]["sha256"]
        assert int(kept.row("checkpoints/source/bytes", 3)) == (tmp_path / "c3.pt").stat().st_size
    opsig("import", *files, *OWN, "-o", run, "--append", "--batch-size", 9).fails(2, "another --batch-size")
    opsig("import", *files, "-o", run, "--append").fails(1, "a task of your own. Give it again")
    norm = save(tmp_path, "n1.pt", Tiny(norm=True).model().state_dict())
    opsig("import", norm, "--task", f"{TASKS}:Tiny:norm=true", "-o", run, "--append").fails(1, "another model")


def test_an_interrupted_import_keeps_what_it_has_and_goes_on(opsig, tmp_path, monkeypatch):

    files = [save(tmp_path, f"c{step}.pt", weights(step)) for step in (1, 2, 3)]
    read = flow.read

    def interrupted(content, target, path, step, warn):
        if step == 3:
            raise KeyboardInterrupt
        return read(content, target, path, step, warn)

    monkeypatch.setattr(flow, "read", interrupted)
    run = tmp_path / "run.h5"
    outcome = opsig("import", *files, *OWN, "-o", run)
    assert outcome.code == 130
    assert "interrupted. Give the same command with --append" in outcome.err
    assert opsig("info", run).records[0]["checkpoints"] == 2
    monkeypatch.setattr(flow, "read", read)
    assert [r["step"] for r in opsig("import", *files, *OWN, "-o", run, "--append").records] == [3]
    assert opsig("info", run).records[0]["state"] == "imported"


def test_a_shell_s_alphabetical_order_is_that_of_the_numbers_and_any_other_is_kept(opsig, tmp_path):
    files = [str(save(tmp_path, f"c{step}.pt", weights(step))) for step in (10, 9)]
    assert checkpoints.find(files) == files[::-1]
    assert checkpoints.find(files[::-1]) == files[::-1]
    assert checkpoints.find([files[1], files[0], files[1]]) == [files[1], files[0], files[1]]
    _, outcome = imports(opsig, tmp_path, *files, "--steps", "1,2")
    assert [(r["step"], r["source"]) for r in outcome.records] == [(1, files[1]), (2, files[0])]
