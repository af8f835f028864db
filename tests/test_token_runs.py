"""Runs over tokens as a person makes them: every command, models of transformers, and pictures in folders."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import start_opsig
from opsig_torch import TorchBackend
from opsig_torch.captured import gradient_plan
from opsig_zoo import HFCausal, ImageFolder
from PIL import Image
from token_task import LENGTH, Digits

from opsig_cli import tasks
from opsig_cli.errors import OpsigError
from opsig_cli.trajectory.file import open_trajectory

ITEMS = 30
TASK = f"{Path(__file__).parent / 'token_task.py'}:Digits:items={ITEMS}"


def named(name: str, place: str) -> str:
    """A task by its name, or, where this checkout's entry points are not installed, by its place."""
    return name if name in tasks.installed() else place


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "run.h5"
    process = start_opsig(
        "train", "--task", TASK, "--optimizer", "momentum", "--learning-rate", 0.5, "--steps", 30, "--track",
        "--checkpoint-every", 5, "-o", path,
    )  # fmt: skip
    _, err = process.communicate(timeout=250)
    assert process.returncode == 0, err
    return path


def test_a_position_without_a_target_is_no_gap_and_no_divergence(run, opsig):
    counts = Digits(ITEMS).counts.numpy()
    with open_trajectory(run) as kept:
        assert len(kept.samples) == ITEMS * LENGTH
        losses = kept.rows("losses/loss", 0, 31)
        assert np.array_equal(np.isnan(losses), np.broadcast_to(~counts, losses.shape))
        logged = kept.rows("scalars/train_loss", 0, 31)
        assert kept.read("samples/target").tolist() == counts.astype(int).tolist()
    np.testing.assert_allclose(losses[:, counts].mean(1), logged, rtol=1e-5)
    mined = opsig("mine", run, "--top", 200)
    assert mined.code == 0
    assert "not measured" not in mined.err
    assert "not finite" not in mined.err
    assert {record["kind"] for record in mined.records if "kind" in record} <= {"mover"}
    assert all(counts[record["sample"]] for record in mined.records)


def test_accuracy_is_over_the_positions_that_have_a_target(run, opsig):
    task = Digits(ITEMS)
    counts, targets = task.counts.numpy(), task.tokens[:, 1:].flatten().numpy()
    with open_trajectory(run) as kept:
        predicted = kept.row("losses/prediction", 30)
    compared = opsig("compare", run).records[0]
    assert compared["accuracy"] == pytest.approx(np.mean((predicted == targets)[counts]))


def test_movers_are_shown_as_context_and_target(run, opsig):
    task = Digits(ITEMS)
    record = opsig("mine", run, "--top", 1).records[0]
    sample = record["sample"]
    assert record["text"] == task.render(sample)
    assert record["label"] == task.label(sample)
    table = opsig("mine", run, "--top", 3, "--format", "table").out
    assert record["text"] in table


def test_groups_of_tokens_are_compared_and_reported(run, opsig, tmp_path):
    clustered = opsig("cluster", run, "--task", TASK, "--top", 40, "--by", "gradient")
    assert clustered.code == 0, clustered.err
    counts = Digits(ITEMS).counts.numpy()
    members = [record for record in clustered.records if record["kind"] == "member"]
    assert members
    assert all(counts[record["sample"]] for record in members)
    page = tmp_path / "report.html"
    reported = opsig("report", run, "--task", TASK, "-o", page)
    assert reported.code == 0, reported.err
    html = page.read_text()
    assert "NaN" not in html.replace("NaN where", "")
    assert any(record["text"][: -len(record["label"])] in html for record in members)


def test_curvature_of_tokens_is_measured(run, opsig):
    found = opsig("sharpness", run, "--task", TASK, "--steps", 30, "--at", "iterate", "--tolerance", 0.01)
    assert found.code == 0, found.err
    mined = opsig("mine", run, "--top", 3).out
    each = opsig("sharpness", "-", "--task", TASK, "--steps", 30, "--metrics", "gradient_norm,curvature", stdin=mined)
    assert each.code == 0, each.err
    assert all(np.isfinite(record["curvature"]) for record in each.records)
    critical = opsig("sharpness", run, "--task", TASK, "--steps", 30, "--metrics", "critical_sharpness")
    assert critical.code == 0, critical.err
    assert np.isfinite(critical.records[0]["critical_sharpness"])


def test_a_branch_leaves_tokens_out(run, opsig, tmp_path):
    path = tmp_path / "branch.h5"
    mined = opsig("mine", run, "--top", 3)
    dropped = opsig(
        "branch", "-", "--task", TASK, "--from", 20, "--steps", 4, "--drop", "-", "--draws", 1, "-o", path,
        stdin=mined.out,
    )  # fmt: skip
    assert dropped.code == 0, dropped.err
    assert "bit for bit" in dropped.err
    record = next(record for record in dropped.records if record["control"] is None and record["change"] != "nothing")
    assert record["stopped_at"] is None
    assert np.isfinite(record["loss_of_untouched"])
    tracked = opsig("track", path, "--task", TASK)
    assert tracked.code == 0, tracked.err


def test_minibatches_are_of_items(opsig, tmp_path):
    arguments = ("train", "--task", TASK, "--optimizer", "sgd", "--learning-rate", 0.1, "--steps", 3, "--track")
    path = tmp_path / "run.h5"
    assert opsig(*arguments, "--batch-size", ITEMS, "-o", path).code == 0
    with open_trajectory(path) as kept:
        logged, losses = kept.rows("scalars/train_loss", 0, 4), kept.rows("losses/loss", 0, 4)
    np.testing.assert_allclose(logged, np.nanmean(losses, 1), rtol=1e-5)
    opsig(*arguments, "--batch-size", ITEMS + 1, "-o", tmp_path / "a.h5").fails(2, f"{ITEMS} items of 6 samples")


CONFIGS = {
    "gpt2": ("GPT2Config", dict(n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None)),
    "llama": ("LlamaConfig", dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=16, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )),
}  # fmt: skip


@pytest.fixture(params=CONFIGS)
def folder(request, tmp_path):
    transformers = pytest.importorskip("transformers", reason="models of transformers need the extra hf")
    kind, options = CONFIGS[request.param]
    getattr(transformers, kind)(vocab_size=256, **options).save_pretrained(tmp_path / "model")
    (tmp_path / "a.txt").write_text("the cat sat on the mat: the dog sat on the log.\n" * 8)
    return tmp_path


def test_a_model_of_transformers_gives_each_tokens_own_numbers(folder):
    transformers = pytest.importorskip("transformers")
    task = HFCausal(str(folder / "model"), str(folder / "a.txt"), length=8, samples=40)
    session = TorchBackend().open(task, "cpu", double=True)
    notes: list[str] = []
    session.tell = notes.append
    state = session.initial(0)
    samples = np.array([3, 9, 15, 8, 39])
    with session.at(state):
        assert not gradient_plan(session).loose
        losses = session.losses_of(samples)
        gradients = [torch.autograd.grad(loss, session.flat.parameters, retain_graph=True) for loss in losses]
        tokens, targets, _ = task.dataset()[:]
        own = session.flat.model(tokens).logits.log_softmax(-1)  # as a person calls it
        plain = -own.gather(2, targets[..., None])[..., 0].flatten()[samples]
        assert isinstance(session.flat.model, transformers.PreTrainedModel)
    torch.testing.assert_close(losses, plain, rtol=1e-5, atol=1e-6)
    rows = np.array([torch.cat([part.reshape(-1) for part in each]).numpy() for each in gradients])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(session.gradient_cosines(state, samples), rows @ rows.T, atol=1e-7)
    direction = np.random.default_rng(0).standard_normal(len(state.params))
    curvatures = session.curvature_along(state, direction)[2]
    assert curvatures.mean() == pytest.approx(session.hessian_vectors(state, direction[None])[0] @ direction, rel=1e-5)
    assert not notes, notes


def test_a_model_of_transformers_is_trained_and_its_tokens_grouped(folder, opsig, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    task = named("hf-causal", "opsig_zoo:HFCausal") + ":model=model,text=a.txt,length=8"
    trained = opsig(
        "train", "--task", task, "--optimizer", "adam", "--learning-rate", 0.01, "--steps", 20, "--track", "-o", "a.h5"
    )
    assert trained.code == 0, trained.err
    clustered = opsig("cluster", "a.h5", "--task", task, "--top", 40, "--by", "gradient", "--test", "none")
    assert clustered.code == 0, clustered.err
    assert any(record.get("text") for record in clustered.records)
    with open_trajectory("a.h5") as run:
        assert str(run.read("samples/text")[5]) == "the ca[t]"


def test_weights_of_the_folder_are_taken_and_code_in_it_is_not_run(folder):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder / "model"))
    model.save_pretrained(folder / "model")
    session = TorchBackend().open(HFCausal(str(folder / "model"), str(folder / "a.txt"), length=8), "cpu")
    kept = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy()
    assert np.array_equal(session.initial(0).params, kept)
    config = folder / "model" / "config.json"
    about = json.loads(config.read_text()) | {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    config.write_text(json.dumps(about))
    (folder / "model" / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    with pytest.raises(OpsigError, match="is not a causal model that transformers builds"):
        HFCausal(str(folder / "model"), str(folder / "a.txt"), length=8)
    assert not (folder / "ran").exists()


def test_tokens_of_a_folders_tokenizer_are_shown_as_text(folder):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=256, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()[:200], show_progress=False
    )
    tokenizer.train_from_iterator([(folder / "a.txt").read_text()], trainer)
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    task = HFCausal(str(folder / "model"), str(folder / "a.txt"), length=8)
    assert (task.render(1), task.label(1)) == ("the cat[ sat]", "' sat'")
    assert task.classes[task.dataset()[0][1][1]] == "' sat'"


def test_what_is_no_causal_model_is_refused_in_one_line(folder, opsig):
    task = named("hf-causal", "opsig_zoo:HFCausal")
    text = folder / "a.txt"
    for options, code, words in (
        (f"model={folder},text={text}", 1, "has no config.json"),
        (f"model={folder / 'model'},text={text},length=99", 2, "length must be at most 16"),
        (f"model={folder / 'model'},text=none.txt,length=8", 1, "none.txt does not exist"),
    ):
        opsig("train", "--task", f"{task}:{options}", "-o", folder / "a.h5").fails(code, words)
    (folder / "model" / "vocab.json").write_text("{}")
    opsig("train", "--task", f"{task}:model={folder / 'model'},text={text},length=8", "-o", folder / "a.h5").fails(
        1, "but no tokenizer.json"
    )


@pytest.fixture
def pictures(tmp_path):
    generator = np.random.default_rng(0)
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        (tmp_path / "root" / name).mkdir(parents=True)
        for i in range(4):
            pixels = generator.integers(0, 60, (9 + i, 12, 3)).astype(np.uint8) + (np.array(colour) // 2).astype(
                np.uint8
            )
            Image.fromarray(pixels).save(tmp_path / "root" / name / f"{i}.png")
    return tmp_path / "root"


def test_pictures_in_folders_are_samples_in_classes(pictures, opsig, tmp_path):
    task = ImageFolder(str(pictures), size=8)
    assert task.classes == ("blue", "red")
    assert [task.label(i) for i in range(8)] == ["blue"] * 4 + ["red"] * 4
    assert np.asarray(task.render(7))[..., 0].mean() > 110
    assert np.asarray(ImageFolder(str(pictures), size=8, grey=True).render(0)).shape == (8, 8)
    spec = f"{named('image-folder', 'opsig_zoo:ImageFolder')}:root={pictures},size=8,samples=3,model=mlp"
    trained = opsig("train", "--task", spec, "--steps", 3, "--learning-rate", 0.1, "--track", "-o", tmp_path / "a.h5")
    assert trained.code == 0, trained.err
    (pictures / "red" / "0.png").write_bytes(b"\x89PNG no picture")
    opsig("train", "--task", spec, "-o", tmp_path / "b.h5").fails(1, "red/0.png cannot be read as a picture")
    opsig("train", "--task", spec.replace(str(pictures), str(pictures / "red")), "-o", tmp_path / "b.h5").fails(
        1, "holds 0 folders with pictures"
    )
