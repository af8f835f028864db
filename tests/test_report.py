"""The HTML report: what it says is what the other commands print, and it opens anywhere and runs nothing it was fed."""

import base64
import csv
import hashlib
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import h5py
import numpy as np
import pytest
from conftest import TASKS, start_opsig
from PIL import Image

from opsig_cli import Recorder
from opsig_cli.figures.canvas import typeset
from opsig_cli.report import losses as losses_module
from opsig_cli.report import words
from opsig_cli.report.losses import loss_lines
from opsig_cli.studies.clustering.records import by_strength
from opsig_cli.trajectory.file import open_trajectory

OWN = ("--task", f"{TASKS}:Tiny")


VOID = {"meta", "img", "br", "rect", "line", "path", "circle", "image"}


EVIL = "<script>alert(1)</script>\x1b[2J\u202e'\"&"


class Page(HTMLParser):
    """A page taken apart: tags with their attributes, texts by the class they stand in; it must be well-formed."""

    def __init__(self, html: str):
        super().__init__()
        self.html = html
        self.open, self.tags, self.text = [], [], {}
        self.columns, self.tables = 0, []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute stands twice: {attrs}"
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append(0)
        if tag in ("td", "th"):
            self.tables[-1][-1] += 1
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("class")))

    def handle_startendtag(self, tag, attrs):
        assert tag in VOID
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open
        assert self.open.pop()[0] == tag, f"</{tag}> closes another element near line {self.getpos()[0]}"

    def handle_data(self, data):
        if self.open:
            tag, name = self.open[-1]
            for key in (tag, f".{name}"):
                self.text.setdefault(key, []).append(data)

    def said(self, key: str) -> list[str]:
        """The texts that stand in elements of this tag or .class."""
        return [" ".join(text.split()) for text in self.text.get(key, []) if text.strip()]

    def having(self, tag: str, **attributes: str) -> list[dict]:
        """Attributes of all elements of a tag that have these."""
        return [found for name, found in self.tags if name == tag and attributes.items() <= found.items()]

    @property
    def words(self) -> str:
        """Everything a reader sees, in one line."""
        parts = [text for key, texts in self.text.items() if key not in ("style", "script") for text in texts]
        return " ".join(" ".join(parts).split())


@pytest.fixture
def report(opsig, tmp_path):
    """Make a report and take it apart: report(run, *options)."""

    def make(run, *more):
        path = tmp_path / "made.html"
        outcome = opsig("report", run, "-o", path, *more)
        assert outcome.code == 0, outcome.err
        return Page(path.read_text())

    return make


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """Pictures at the edge of stability."""
    path = tmp_path_factory.mktemp("report") / "digits.h5"
    options = ("--model", "mlp:width=16", "--steps", 60, "--learning-rate", 0.5, "--checkpoint-every", 10, "--track")
    process = start_opsig("train", "--task", "digits", *options, "-o", path)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return path


def swinging(path, *, steps=60, labels=None, classes=None, texts=None, broken=None, noise=False):
    """A file of losses alone: ten samples swing against ten others, among sixty; or all are noise."""
    rng = np.random.default_rng(3)
    swing = np.cumsum(rng.standard_normal(steps))[:, None] * np.r_[np.ones(10), -np.ones(10), np.zeros(40)]
    losses = 20 + (0 if noise else 1) * swing + rng.standard_normal((steps, 60)) * (1 if noise else 0.05)
    if broken is not None:
        losses[broken:] = np.nan
    with Recorder(path, samples=60, labels=labels, classes=classes) as recorder:
        for step, row in enumerate(losses):
            predictions = None if classes is None else np.full(60, step % 2)
            recorder.record(step, losses=row, predictions=predictions)
    if texts is not None:
        with open_trajectory(path, "r+") as run:
            run.write("samples/text", np.array(texts))
    return path


# -- one file that opens anywhere


@pytest.mark.parametrize("kind", ["own task", "pictures", "losses", "texts"])
def test_the_page_is_whole_and_loads_nothing(report, tiny_run, digits_run, tmp_path, kind):
    run, more = {
        "own task": (tiny_run, OWN),
        "pictures": (digits_run, ()),
        "losses": (tmp_path / "losses.h5", ()),
        "texts": (tmp_path / "texts.h5", ()),
    }[kind]
    swinging(tmp_path / "losses.h5")
    labels = [f"'{'ab'[i % 2]}'" for i in range(60)]
    swinging(tmp_path / "texts.h5", labels=labels, texts=[f"to be: [{label[1]}]" for label in labels])
    page = report(run, *more)
    for _, attributes in page.tags:
        assert not {name for name in attributes if name.startswith("on") or name in ("style", "srcset", "action")}
        for name in ("src", "href"):
            inside = ("#", "data:image/png;base64,", "data:image/jpeg;base64,", "data:text/csv;charset=utf-8;base64,")
            assert attributes.get(name, "#").startswith(inside), attributes
    assert not {"link", "iframe", "object", "embed", "form", "base"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?:|//[a-z]|url\(|@import", re.sub(r'"data:[^"]*"', "", page.html))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        if attributes.get("href", "").startswith("#"):
            assert attributes["href"][1:] in ids
        if "aria-labelledby" in attributes:
            assert attributes["aria-labelledby"] in ids


def test_a_browser_may_run_only_what_came_with_the_page(report, tiny_run):
    page = report(tiny_run, *OWN)
    (policy,) = [meta["content"] for meta in page.having("meta") if "http-equiv" in meta]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules.pop("default-src") == "'none'"
    assert rules.pop("img-src") == "data:"
    for name, tag in (("style-src", "style"), ("script-src", "script")):
        (text,) = page.text[tag]
        assert rules.pop(name) == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert set(rules.values()) == {"'none'"}


def test_the_page_can_be_read_by_ear(report, digits_run):
    page = report(digits_run)
    assert page.having("html", lang="en")
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all("alt" in image for image in page.having("img"))
    assert any(re.fullmatch(r"sample \d+, \d", image["alt"]) for image in page.having("img"))
    assert all(svg.get("aria-label") for svg in page.having("svg", role="img"))
    assert all(head.get("scope") in ("col", "row") for head in page.having("th"))
    for table in page.tables:
        assert len(set(table)) == 1, "rows of a table have different numbers of cells"


def test_labels_and_texts_are_never_markup(report, tmp_path):
    labels = [EVIL if i < 20 else "plain" for i in range(60)]
    texts = [f"{EVIL}[{i}]" for i in range(60)]
    for kept in (None, texts):
        name = "texts.h5" if kept else "labels.h5"
        page = report(swinging(tmp_path / name, labels=labels, classes=[EVIL, "plain"], texts=kept))
        assert "alert(1)" in page.words
        assert [attributes for tag, attributes in page.tags if tag == "script"] == [{}]
        assert "<script>alert" not in page.html
        assert not {"\x1b", "\u202e"} & set(page.html)
        assert "\ufffd" in page.html


def test_the_same_command_gives_the_same_bytes(opsig, tiny_run, tmp_path):
    pages = []
    for _ in range(2):
        assert opsig("report", tiny_run, *OWN, "-o", tmp_path / "a.html").code == 0
        pages.append((tmp_path / "a.html").read_bytes())
    assert pages[0] == pages[1]


# -- it says what the other commands print


@pytest.mark.parametrize("by", ["both", "loss", None])
def test_pairs_are_those_of_cluster(report, opsig, tiny_run, tmp_path, by):
    arguments = (tiny_run, *OWN, "--by", by) if by else (swinging(tmp_path / "run.h5"),)
    pairs = [record for record in opsig("cluster", *arguments).records if record["kind"] == "pair"]
    assert pairs
    page = report(*arguments)
    held = [pair for pair in by_strength(pairs) if pair["verdict"] == "established"][:6]
    strongest = by_strength(pairs)
    expected = [pair["sentence"] for pair in held] + [pair["sentence"] for pair in strongest]
    assert page.said(".sentence") == [typeset(sentence) for sentence in expected]
    assert ("No established pair" in page.words) == (not held)
    (value,) = [text for text in page.said("b") if " of " in text]
    assert value == f"{len(held)} of {len(pairs)}"
    for pair in pairs:
        assert f"{pair['opposition']:.2f}".replace("-", "\N{MINUS SIGN}") in page.words
        assert page.having("article", id=f"pair-{pair['pair']}")


def test_members_and_movers_are_those_of_the_commands(report, opsig, tiny_run):
    page = report(tiny_run, *OWN)
    mined = opsig("mine", tiny_run, "--top", 100).records
    ranked = [row["data-value"] for row in page.having("th", scope="row") if "data-value" in row]
    assert ranked[: len(mined)] == [str(record["sample"]) for record in mined]
    members = {str(r["sample"]) for r in opsig("cluster", tiny_run, *OWN).records if r["kind"] == "member"}
    assert set(ranked[len(mined) :]) == members | set(ranked[: len(mined)])  # movers of no group are listed, too


def test_a_picture_leads_to_the_losses_of_its_sample(report, digits_run):
    page = report(digits_run)
    rows = {row["id"] for row in page.having("tr") if row.get("id", "").startswith("sample-")}
    links = {a["href"] for a in page.having("a", **{"class": "to"})}
    assert links
    assert {link[1:] for link in links} <= rows
    courses = [path["d"] for path in page.having("path", **{"class": "course"})]
    assert len(courses) >= len(rows)
    assert all(re.fullmatch(r"(M\d+ \d+(L\d+ \d+)*)+", course) for course in courses)


def test_a_small_line_is_high_where_its_loss_is_high(tmp_path):
    losses = np.full((300, 2), 0.1)
    losses[150, 1] = 10.0
    with Recorder(tmp_path / "run.h5", samples=2) as recorder:
        for step, row in enumerate(losses):
            recorder.record(step, losses=row)
    with open_trajectory(tmp_path / "run.h5") as run:
        paths, axis = loss_lines(run, [1, 0])
    assert axis == pytest.approx((0.1, 10.0))
    points = {
        column: [tuple(map(int, p)) for p in re.findall(r"[ML](\d+) (\d+)", path)] for column, path in paths.items()
    }
    assert {y for _, y in points[0]} == {losses_module.HEIGHT - 1}
    (peak,) = [x for x, y in points[1] if y == 1]
    assert peak == pytest.approx(losses_module.WIDTH / 2, abs=3)


def test_all_members_can_be_taken_along_as_a_table(report, opsig, tiny_run):
    page = report(tiny_run, *OWN)
    (link, _) = page.having("a", **{"class": "download"})
    table = list(csv.DictReader(io.StringIO(base64.b64decode(link["href"].partition("base64,")[2]).decode())))
    members = [r for r in opsig("cluster", tiny_run, *OWN).records if r["kind"] == "member"]
    assert [(int(row["sample"]), row["group"], row["pair"]) for row in table] == [
        (m["sample"], f"G{m['group']}", "" if m["pair"] is None else str(m["pair"])) for m in members
    ]


def test_planted_truth_has_a_section(report, opsig, tmp_path):
    run = tmp_path / "run.h5"
    task = "planted:pairs=1,side=12,samples=200,size=14,patch=4,seed=3"
    train = ("--model", "mlp:width=16", "--learning-rate", 0.15, "--steps", 60, "--checkpoint-every", 8, "--track")
    assert opsig("train", "--task", task, *train, "-o", run).code == 0
    page = report(run)
    assert page.having("section", id="truth")
    (agreed,) = [r for r in opsig("cluster", run, "--truth").records if r["kind"] == "agreement"]
    assert f"{agreed['adjusted_rand_index']:.2f}" in page.said(".num")


def test_the_rise_is_taken_apart_as_by_explain(report, opsig, tiny_run):
    page = report(tiny_run, *OWN)
    step = next(r["rise_step"] for r in opsig("cluster", tiny_run, *OWN).records if "rise_step" in r)
    explained = [r for r in opsig("cluster", tiny_run, *OWN, "--explain", step).records if r["kind"] == "explain"]
    bars = [bar for bar in page.having("rect", height="12")]
    assert len(bars) == len(explained)
    assert sorted(float(bar["width"][:-1]) for bar in bars)[-1] == 50
    for bar, part in zip(bars, explained, strict=True):
        assert bar["class"] == ("up" if part["change"] > 0 else "down")
        start, width = (float(bar[name][:-1]) for name in ("x", "width"))
        assert (start if part["change"] > 0 else start + width) == pytest.approx(50, abs=0.02)


def test_established_pairs_come_first_then_those_that_move_most_and_a_family_stays_together():
    rows = [("unclear", 0.9, None), ("established", 0.1, 1), ("established", 0.4, None), ("established", 0.5, 1)]
    pairs = [
        {"pair": number, "verdict": verdict, "movement": movement, "family": family}
        for number, (verdict, movement, family) in enumerate(rows)
    ]
    assert [pair["pair"] for pair in by_strength(pairs)] == [3, 1, 2, 0]
    assert "3 pairs of groups pull against each other: established, 2 findings in all. 1 more" in words.answer(
        pairs, [], 9
    )
    assert words.answer(pairs[:1], [], 9).startswith("No established pair: 1 was found")


def test_the_share_of_movement_counts_each_group_of_the_established_pairs_once(report, opsig, tmp_path):
    run = tmp_path / "run.h5"
    task = "planted:pairs=1,side=12,samples=300,size=14,patch=4,seed=3"
    train = ("--model", "mlp:width=16", "--learning-rate", 0.15, "--steps", 120, "--checkpoint-every", 8, "--track")
    assert opsig("train", "--task", task, *train, "-o", run).code == 0
    pairs = [r for r in opsig("cluster", run).records if r["kind"] == "pair" and r["verdict"] == "established"]
    groups = {group for pair in pairs for group in pair["groups"]}
    assert groups
    explained = opsig("cluster", run, "--explain", pairs[0]["rise_step"]).records
    share = sum(r["movement"] for r in explained if r["kind"] == "explain" and r["group"] in groups)
    page = report(run)
    assert f"{share:.0%}" in page.said("b")
    assert f"carry {share:.0%} of all movement" in page.words


def test_a_larger_rise_outside_of_the_window_is_named(opsig, tmp_path):
    """The window begins where losses alternate; here the loss jumps long before that."""
    steps = np.arange(80)
    side = np.r_[np.ones(20), -np.ones(20)]
    losses = 5 + 0.01 * np.random.default_rng(0).standard_normal((80, 40))
    losses += np.where(steps > 40, (-1.0) ** steps, 0)[:, None] * side * np.linspace(0.5, 1, 40)
    losses[3:6] += 7
    with Recorder(tmp_path / "run.h5", samples=40) as recorder:
        for step, row in enumerate(losses):
            recorder.record(step, losses=row)
    rises = {r["rise_step"] for r in opsig("cluster", tmp_path / "run.h5").records if "rise_step" in r}
    assert rises
    assert 3 not in rises
    assert opsig("report", tmp_path / "run.h5").code == 0
    page = Page((tmp_path / "run.html").read_text())
    assert "Outside of it, it rose more at step 3." in page.words


def test_one_record_says_what_was_written(opsig, tiny_run, tmp_path):
    (record,) = opsig("report", tiny_run, *OWN, "-o", tmp_path / "a.html").records
    assert record["kind"] == "report"
    assert record["trajectory"] == str(tiny_run)
    assert record["path"] == str(tmp_path / "a.html")
    assert record["bytes"] == (tmp_path / "a.html").stat().st_size
    pairs = [r for r in opsig("cluster", tiny_run, *OWN).records if r["kind"] == "pair"]
    assert record["pairs"] == len(pairs)
    assert record["established"] == sum(pair["verdict"] == "established" for pair in pairs)


def test_a_sheet_shows_the_most_aligned_members_and_what_they_were_taken_for(report, opsig, digits_run):
    records = opsig("cluster", digits_run).records
    pair = by_strength(r for r in records if r["kind"] == "pair")[0]
    page = report(digits_run)
    names = [image["alt"] for image in page.having("img") if image["alt"]]
    for group, size in zip(pair["groups"], pair["sizes"], strict=True):
        members = [r for r in records if r["kind"] == "member" and r["mined"] and r["group"] == group]
        first = sorted({(-r["alignment"], r["sample"], r["label"]) for r in members})[: min(15, size)]
        shown, names = names[: len(first)], names[len(first) :]
        assert set(shown) == {f"sample {sample}, {label}" for _, sample, label in first}
    with h5py.File(digits_run) as file:
        swings = pair["apart_step"] or pair["rise_step"]
        before, after = file["losses/prediction"][swings - 1 : swings + 1]
    sample, label = re.fullmatch(r"sample (\d+), (.*)", shown[0]).groups()
    caption = page.html.partition(f'alt="{shown[0]}"')[2].partition("</figcaption>")[0]
    taken = re.findall(r"(was|now) (\S+?)( \N{MULTIPLICATION SIGN})?<", caption)
    assert [name for _, name, _ in taken] == [str(before[int(sample)]), str(after[int(sample)])]
    assert [bool(wrong) for *_, wrong in taken] == [name != label for _, name, _ in taken]


def test_each_side_has_its_own_colour_in_the_curves(report, opsig, tmp_path):
    run = swinging(tmp_path / "run.h5")
    records = opsig("cluster", run).records
    (group, _) = next(r["groups"] for r in records if r["kind"] == "pair")
    members = list({r["sample"] for r in records if r["kind"] == "member" and r["group"] == group})
    page = report(run)
    with h5py.File(run) as file:
        mean = file["losses/loss"][()][:, members].mean(1)
    (chart,) = [
        c for c in page.having("figure", **{"class": "chart"}) if len(json.loads(c["data-chart"])["steps"]) == 60
    ][:1]
    np.testing.assert_allclose(json.loads(chart["data-chart"])["lines"][0], mean, rtol=1e-3)
    drawn = [path["class"] for path in page.having("path") if path["class"].startswith("line")]
    assert drawn[:3] == ["line a", "line b", "line whole dashed"]


def test_pictures_are_those_of_the_file(report, digits_run):
    page = report(digits_run)
    with h5py.File(digits_run) as file:
        thumbnails = file["samples/thumbnail"][()]
    shown = [image for image in page.having("img") if image["alt"].startswith("sample ")]
    assert shown
    for image in shown:
        sample = int(re.match(r"sample (\d+)", image["alt"])[1])
        decoded = Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2])))
        np.testing.assert_array_equal(np.asarray(decoded), thumbnails[sample, :, :, 0])


# -- every kind of run


def test_losses_alone_are_enough_and_need_no_torch(tmp_path):
    run = swinging(tmp_path / "run.h5")
    code = (
        f"import sys; sys.argv = ['opsig', 'report', {str(run)!r}]\n"
        "from opsig_cli.main import run\n"
        "run()\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    page = Page((tmp_path / "run.html").read_text())
    assert page.having("article")
    for said in (
        "Losses alone do not show",
        "holds no checkpoints",
        "no labels",
        "no predictions",
        "neither pictures",
    ):
        assert any(said in text for text in page.said("li")), said
    assert "without checkpoints none can be measured" in page.words


def test_a_run_without_pairs_says_so(report, tmp_path):
    page = report(swinging(tmp_path / "run.h5", noise=True))
    assert page.said(".answer")[0].startswith("No opposing pair was found among 60 samples")
    assert not page.having("article")
    assert not page.having("ul", **{"class": "opening"})


def test_a_run_that_broke_is_read_up_to_there(report, tmp_path):
    page = report(swinging(tmp_path / "run.h5", broken=50))
    assert "from step 50 on losses are not finite: only the steps before it are looked at" in page.words.replace(
        "From", "from"
    )
    assert page.having("article")
    curves = [path["d"] for path in page.having("path") if path["class"].startswith("line whole")]
    assert curves
    assert all("nan" not in curve for curve in curves)
    assert max(float(x) for x in re.findall(r"[ML]([\d.]+) ", curves[0])) == pytest.approx(1000 * 49 / 59, abs=0.1)


def test_text_is_shown_as_text_with_its_target_marked(report, tmp_path):
    labels = [f"'{'ab'[i % 2]}'" for i in range(60)]
    page = report(
        swinging(tmp_path / "run.h5", labels=labels, texts=[f"to {i}:[{n[1]}]" for i, n in enumerate(labels)])
    )
    assert {"[a]", "[b]"} <= set(page.said("mark"))
    assert "to 3:" in page.said(".text")
    assert not page.having("img")


def test_curvature_is_drawn_where_the_file_holds_it_and_never_measured(report, opsig, tiny_run, tmp_path):
    run = shutil.copy(tiny_run, tmp_path / "run.h5")
    before = run.read_bytes()
    page = report(run, *OWN)
    assert run.read_bytes() == before
    assert f"opsig sharpness {run} --task {OWN[1]}" in page.said("code")
    assert "stability threshold" not in page.said("li")
    measured = opsig("sharpness", run, *OWN).records
    page = report(run, *OWN)
    assert "stability threshold" in page.said("li")
    most = max(record["eigenvalue"] / record["threshold"] for record in measured)
    assert f"{most:.2f} \N{MULTIPLICATION SIGN}" in page.said("b")
    assert f"reaches {most:.2f} times the stability threshold" in page.words
    assert ("is first above it" in page.words) == (most >= 1)


# -- where it is written


def test_a_file_that_is_no_report_is_not_lost(opsig, tmp_path):
    run, path = swinging(tmp_path / "run.h5"), tmp_path / "page.html"
    path.write_text("<p>mine</p>")
    opsig("report", run, "-o", path, "-q").fails(1, "page.html exists and is no report of opsig's", "--replace")
    assert path.read_text() == "<p>mine</p>"
    assert opsig("report", run, "-o", path, "--replace").code == 0
    assert opsig("report", run, "-o", path).code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.html", "run.h5"]


def test_the_run_is_never_overwritten(opsig, tmp_path):
    run = swinging(tmp_path / "run.h5")
    before = run.read_bytes()
    opsig("report", run, "-o", run, "--replace", "-q").fails(1, "is the run itself")
    assert run.read_bytes() == before


def test_mistakes(opsig, tiny_run, tmp_path):
    run = swinging(tmp_path / "run.h5")
    opsig("report", tmp_path / "gone.h5", "-q").fails(1, "gone.h5 does not exist")
    opsig("report", run, "-o", tmp_path / "none" / "a.html", "-q").fails(1, "there is no folder")
    opsig("report", run, "-o", tmp_path, "-q").fails(1, "is a folder")
    opsig("report", run, "--by", "luck").fails(2, "--by is one of gradient, slope, loss, both, not 'luck'")
    opsig("report", run, "--by", "gradient", "-q").fails(1, "holds no checkpoints")
    opsig("report", tiny_run, "-q", "-o", tmp_path / "a.html").fails(1, "a task of your own", "--task")
    assert not (tmp_path / "a.html").exists()
