"""Text: tokens are samples, with context and target; a planted pair of contexts is found and said in words."""

import hashlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opsig_torch import TorchBackend
from opsig_torch.captured import gradient_plan
from opsig_zoo.text import Text
from opsig_zoo.tokens import quoted, split

from opsig_cli.backends import Training
from opsig_cli.errors import OpsigError, UsageError
from opsig_cli.figures.canvas import save
from opsig_cli.figures.contact_sheet import Tile
from opsig_cli.figures.pages import movers_figure
from opsig_cli.trajectory import texts

WORDS = "we like the same red wine as old men do: young cats want fresh milk and nothing else than that:"
BOTH = pytest.mark.parametrize("vocabulary", [256, 300])


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"second \xff file: a\nb\n" * 20)
    (tmp_path / "a.md").write_bytes(b"first file\n" * 20)
    (tmp_path / "c.bin").write_bytes(b"not a text")
    return tmp_path


def planted(path: Path, rounds: int = 250) -> Path:
    """Two sentences in turn, each up to a colon, after which a coin decides for a newline or " the"."""
    generator = np.random.default_rng(0)
    parts = [part + ":" for part in WORDS.split(":")[:2]]
    coins = generator.random(rounds) < 0.5
    path.write_text("".join(parts[i % 2].strip() + (" the " if coin else "\n") for i, coin in enumerate(coins)))
    return path


@given(st.binary(max_size=400))
def test_bytes_are_their_own_tokens(data):
    ids, pieces = split(data, 256)
    assert ids.tolist() == list(data)
    assert b"".join(pieces) == bytes(range(256))


@settings(deadline=None, max_examples=30)
@given(st.text(max_size=200), st.integers(257, 400))
def test_byte_pairs_give_the_text_back(text, vocabulary):
    ids, pieces = split(text.encode(), vocabulary)
    assert b"".join(pieces[i] for i in ids) == text.encode()
    assert 256 <= len(pieces) <= vocabulary
    assert len(set(pieces)) == len(pieces)
    assert len(ids) <= len(text.encode())


def test_byte_pairs_merge_what_recurs_most():
    ids, pieces = split(b"low lower lowest slow\n" * 50, 260)
    assert pieces[256:258] == [b"ow", b"low"] or pieces[256:258] == [b"lo", b"low"]  # both pairs come 200 times
    assert b"low" in [pieces[i] for i in ids[:3]]
    assert split(b"ab", 1000)[1] == split(b"", 256)[1][:256] or len(split(b"ab", 1000)[1]) <= 257


def test_the_same_text_gives_the_same_ids_in_any_process(tmp_path):
    path = planted(tmp_path / "a.txt")
    code = (
        "import hashlib, sys; from opsig_zoo.tokens import split\n"
        "ids, pieces = split(open(sys.argv[1], 'rb').read(), 320)\n"
        "print(hashlib.sha256(ids.tobytes() + b'|'.join(pieces)).hexdigest())"
    )
    ids, pieces = split(path.read_bytes(), 320)
    here = hashlib.sha256(ids.tobytes() + b"|".join(pieces)).hexdigest()
    for _ in range(2):
        there = subprocess.run([sys.executable, "-c", code, path], check=True, capture_output=True, text=True)
        assert there.stdout.strip() == here


@given(st.binary(max_size=6))
def test_a_token_in_quotes_is_one_line_and_tells_which(piece):
    shown = quoted(piece)
    assert shown.isprintable()
    value = eval(shown)
    assert (value if isinstance(value, bytes) else value.encode()) == piece


@BOTH
def test_samples_are_tokens_with_their_context(folder, vocabulary):
    task = Text(str(folder), vocabulary, context=8, samples=50)
    text = (folder / "a.md").read_bytes() + b"\n" + (folder / "b.txt").read_bytes()
    if vocabulary > 256:
        text = text.decode(errors="replace").encode()
    pieces = [task._pieces[token] for token in task.tokens]
    assert b"".join(pieces) == text  # in order of name, and nothing that is not a text
    tokens, targets, _ = task.dataset()[:]
    assert tokens.shape == targets.shape == (7, 8)  # 50 targets are 7 sequences
    assert (task.windows.target(0), task.windows.target(55)) == (1, len(task.tokens) - 1)
    for i in (0, 20, 49, 55):
        place, (item, position) = task.windows.target(i), divmod(i, 8)
        before = pieces[place - position - 1 : place]
        assert [task._pieces[token] for token in tokens[item, : position + 1].tolist()] == before
        assert task._pieces[int(targets[item, position])] == pieces[place]
        assert task.label(i) == quoted(pieces[place])
        shown = b"".join(before).decode(errors="backslashreplace").replace("\n", "\u21b5")
        assert texts.context(task.render(i), task.label(i)) == shown


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 200), st.integers(1, 9), st.integers(0, 300))
def test_every_target_comes_once_and_what_is_filled_up_has_none(length, context, samples):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.txt"
        path.write_bytes(bytes(i % 251 for i in range(length + context)))
        task = Text(str(path), context=context, samples=samples, model="gpt:depth=1,width=2,heads=1")
    tokens, targets, places = task.dataset()[:]
    every = length + context - 1
    whole = -(-every // context)
    assert len(tokens) == (min(-(-samples // context), whole) if samples else whole)
    found = np.array([task.windows.target(i) for i in range(targets.numel())])
    has_one = (targets >= 0).flatten().numpy()
    assert np.array_equal(has_one, found <= every)
    assert len(np.unique(found[has_one])) == has_one.sum()
    if len(tokens) == whole:
        assert has_one.sum() == every
    assert np.array_equal(targets.flatten().numpy()[has_one], found[has_one] % 251)
    assert places.tolist() == [list(range(context))] * len(tokens)
    for i in np.flatnonzero(~has_one):
        assert (task.label(i), task.render(i)[-2:]) == ("", "[]")


def open_text(path, model="gpt:width=16,depth=2", double=True, **options):
    session = TorchBackend().open(Text(str(path), context=6, model=model, **options), "cpu", 7, double=double)
    return session, session.initial(0)


@BOTH
@pytest.mark.parametrize("model", ["gpt:width=16,depth=2", "gpt:width=16,depth=1,bias=false"])
def test_gradients_of_single_tokens_are_those_of_autograd(folder, vocabulary, model):
    session, state = open_text(folder, model, vocabulary=vocabulary, samples=60)
    samples = np.array([5, 3, 28, 0, 11, 17, 2, 9, 29, 59])
    rows = []
    for i in samples:
        with session.at(state):
            loss = session.losses_of([i]).sum()
            rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, session.flat.parameters)]).numpy())
    norms = np.linalg.norm(rows, axis=1)
    assert not gradient_plan(session).loose
    np.testing.assert_allclose(session.gradient_norms(state)[samples], norms, rtol=1e-9)
    unit = np.array(rows) / norms[:, None]
    np.testing.assert_allclose(session.gradient_cosines(state, samples), unit @ unit.T, atol=1e-9)


def test_curvature_of_single_tokens_is_that_of_finite_differences(folder):
    session, state = open_text(folder, "gpt:width=8,depth=1", samples=20)
    direction = np.random.default_rng(0).standard_normal(len(state.params))
    direction /= np.linalg.norm(direction)
    _, slopes, curvatures = session.curvature_along(state, direction)
    step = 1e-3
    losses = []
    for sign in (-1, 0, 1):
        with session.at(state), torch.no_grad():
            session.flat.vector += sign * step * torch.from_numpy(direction)
            losses.append(session.losses_of(np.arange(session.samples)).numpy())
    np.testing.assert_allclose(slopes, (losses[2] - losses[0]) / (2 * step), rtol=1e-4, atol=1e-6)
    second = (losses[2] - 2 * losses[1] + losses[0]) / step**2
    np.testing.assert_allclose(curvatures, second, rtol=1e-3, atol=1e-5)


def test_losses_do_not_depend_on_the_batch_and_fall(folder):
    session, state = open_text(folder, "gpt:width=16,depth=1", double=False, samples=60)
    other = TorchBackend().open(session.task, "cpu", 60)
    other.initial(0)
    torch.testing.assert_close(
        *(torch.from_numpy(s.losses([state])[0][0]) for s in (session, other)), rtol=1e-4, atol=1e-5
    )
    snapshots = list(session.train(Training("adam", 0.01, 30), state))
    assert snapshots[-1].train_loss < 0.6 * snapshots[0].train_loss


@pytest.mark.parametrize(("vocabulary", "context", "steps"), [(256, 32, 120), (300, 16, 250)])
def test_a_planted_pair_of_contexts_is_found_and_said(opsig, tmp_path, vocabulary, context, steps):
    path, run, picture = planted(tmp_path / "planted.txt"), tmp_path / "run.h5", tmp_path / "pairs.svg"
    task = f"text:path={path},vocabulary={vocabulary},context={context},samples=1200"
    trained = opsig(
        "train", "--task", task, "--model", "gpt:depth=1,width=16", "--optimizer", "adam", "--learning-rate", 0.01,
        "--steps", steps, "--track", "-o", run,
    )  # fmt: skip
    assert trained.code == 0, trained.err
    mined = opsig("mine", run, "--top", 5).records
    assert all(texts.context(record["text"], record["label"]) for record in mined)
    clustered = opsig("cluster", run, "--by", "gradient", "--figure", picture)
    assert clustered.code == 0, clustered.err
    pairs = [record for record in clustered.records if record["kind"] == "pair"]
    members = [record for record in clustered.records if record["kind"] == "member"]
    newline, the = ("'\\n'", "' '") if vocabulary == 256 else ("'\\n'", "' the'")
    found = [
        pair for pair in pairs
        if pair["after"] and pair["after"]["text"].endswith(":")
        and {max(mix, key=mix.get) for mix in pair["labels"]} == {newline, the}
    ]  # fmt: skip
    assert found, json.dumps([pair["sentence"] for pair in pairs])
    for pair in found:
        assert pair["opposition"] < -0.3
        assert min(pair["after"]["shares"]) > 0.9
        said = r"(?:pull against each other|held-out checkpoints), after (.*?) \("
        assert ":" in re.search(said, pair["sentence"])[1]
        for member in members:
            if member["pair"] == pair["pair"] and member["mined"]:
                assert texts.context(member["text"], member["label"]).endswith(":")
    drawn = picture.read_text()
    assert "after &#x27;" in drawn or "after '" in drawn
    assert "than that:<" in drawn
    assert re.search(r">\[\\n\]<", drawn)


def test_a_shared_ending_is_the_most_telling_one():
    everybody = [*["one: ", "two: ", "sea: "], *["a b ", "c d "] * 20]
    found = texts.shared_ending(everybody[:2], everybody[2:3], everybody)
    assert (found.text, found.shares) == (": ", (1.0, 1.0))  # a blank is everywhere
    assert found.everywhere == pytest.approx(3 / 43)
    assert texts.shared_ending(["ab"], ["cd"], ["ab", "cd"]) is None
    assert texts.shared_ending(["ab"], [], ["ab"]) is None
    assert texts.shared_ending(["ab"], ["cb"], ["ab", "cb"]) is None  # what everybody has tells nothing


@given(st.lists(st.text("ab:", max_size=5), max_size=8), st.lists(st.text("ab:", max_size=5), max_size=8))
def test_a_shared_ending_has_the_shares_it_states(side_a, side_b):
    found = texts.shared_ending(side_a, side_b, side_a + side_b + ["", "zzz"])
    if found is not None:
        for side, share in zip((side_a, side_b), found.shares, strict=True):
            assert share == sum(text.endswith(found.text) for text in side) / len(side) >= 0.5


@given(st.text(max_size=20), st.binary(min_size=1, max_size=4))
def test_context_and_target_are_told_apart_again(before, piece):
    label = quoted(piece)
    assert texts.context(f"{before}[{label}]", label) == before
    assert texts.context(f"{before}[{label.removeprefix('b')[1:-1]}]", label) == before
    assert texts.context(before + "(", label) is None


def test_lines_of_text_are_drawn_under_one_another(tmp_path):
    long = "a very long context " * 9
    shown = {f"{long}as follows:[ a]": "' a'", "this[[]": "'['", "no target": "no", "[\\n]": "'\\n'"}
    tiles = [Tile(text, label, "'\\n'", "' a'") for text, label in shown.items()]
    page = movers_figure([("rose", tiles)], np.arange(9), {"rose": np.ones(9)}, np.ones(9), (0, 8), "t")
    save(page, tmp_path / "a.svg")
    drawn = (tmp_path / "a.svg").read_text()
    for part in ("as follows:", "[ a]", "this", "[[]", "no target", "was '\\n' \u00d7", "now ' a'"):
        assert f">{part}<" in drawn or f"{part}<" in drawn, part


def test_what_cannot_be_read_is_refused_in_one_line(opsig, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "ok.txt").write_text("some text that is long enough " * 9)
    for options, code, words in (
        ("path=none.txt", 1, "none.txt does not exist"),
        (f"path={tmp_path / 'empty.txt'}", 1, "holds 0 tokens, too few for a context of 32"),
        (f"path={tmp_path / 'folder'}", 1, "holds no text files"),
        (f"path={tmp_path / 'ok.txt'},vocabulary=255", 2, "vocabulary must be 256 (bytes), or more"),
        (f"path={tmp_path / 'ok.txt'},context=0", 2, "context must be at least 1"),
        (f"path={tmp_path / 'ok.txt'},samples=-1", 2, "or 0 for all"),
        ("context=4", 2, "needs the option path"),
    ):
        opsig("train", "--task", f"text:{options}", "-o", tmp_path / "a.h5").fails(code, words)
    ok = f"text:path={tmp_path / 'ok.txt'}"
    for model, words in (("mlp", "Known: gpt"), ("gpt:width=6,heads=4", "not divisible"), ("gpt:depth=0", "depth")):
        opsig("train", "--task", ok, "--model", model, "-o", tmp_path / "a.h5").fails(2, words)
    with pytest.raises(UsageError, match="Known: bias, depth, heads, width"):
        Text(str(tmp_path / "ok.txt"), model="gpt:rotary=true")


def test_without_the_library_the_message_says_what_to_install(opsig, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    command = (
        "train",
        "--track",
        "--steps",
        1,
        "--model",
        "gpt:width=4,depth=1,heads=1",
        "--replace",
        "-o",
        folder / "a.h5",
    )
    assert opsig(*command, "--task", f"text:path={folder},context=4,samples=9").code == 0  # bytes need none
    opsig(*command, "--task", f"text:path={folder},vocabulary=300").fails(1, "pip install 'opsig[text]'")
    with pytest.raises(OpsigError):
        split(b"abc", 300)


def test_a_text_that_was_edited_since_is_told(opsig, tmp_path):
    path, run = planted(tmp_path / "a.txt", 20), tmp_path / "run.h5"
    task = f"text:path={path},context=4,samples=100"
    model = ("--model", "gpt:width=4,depth=1,heads=1")
    assert opsig("train", "--task", task, *model, "--steps", 2, "--track", "-o", run).code == 0
    clustered = opsig("cluster", run, "--by", "gradient")
    assert "has the task's data changed" not in clustered.err.lower()
    text = path.read_text()
    path.write_text(text.replace("red wine", "wet rain"))
    clustered = opsig("cluster", run, "--by", "gradient", "--allow-changed-data")  # a loss has changed, too
    assert clustered.code == 0
    assert re.search(r"sample \d+ was '.' and is '.'\. Has the task's data changed\?", clustered.err)
