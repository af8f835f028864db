"""Pictures: what is written on them, and how they are saved. How they look is for the eye."""

import numpy as np
import pytest

from opsig_cli.analysis.density import smoothed_density
from opsig_cli.figures import canvas, curvature
from opsig_cli.figures.canvas import heading, page, save
from opsig_cli.figures.contact_sheet import Tile
from opsig_cli.figures.pages import PairPanel, movers_figure, pairs_figure

STEPS = np.arange(50)
WHOLE = np.linspace(2, 0.5, 50)
PIXELS = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)


def tiles(count=7):
    return [Tile(PIXELS, "Coat", "Pullover", "Coat", "step 9") for _ in range(count)]


def draw_pairs(path, count=1):
    panel = PairPanel("pair 1", ("G1: coats", tiles(), WHOLE), ("G2: $x_1$ <b>", [], WHOLE[::-1]))
    save(pairs_figure([panel] * count, STEPS, WHOLE, "a run", zoom=(10, 30)), path)


@pytest.mark.parametrize(("suffix", "signature"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_the_same_picture_has_the_same_bytes(tmp_path, suffix, signature):
    first, second = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    draw_pairs(first)
    draw_pairs(second)
    assert first.read_bytes().startswith(signature)
    assert first.read_bytes() == second.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == [first.name, second.name]


def test_wrong_predictions_are_marked_by_more_than_colour(tmp_path):
    draw_pairs(tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert "was Pullover \N{MULTIPLICATION SIGN}" in text
    assert "now Coat<" in text
    assert "$x_1$" in text  # a label is never mathematics
    assert "none" in text


def test_a_run_without_pairs_says_so(tmp_path):
    save(pairs_figure([], STEPS, WHOLE, "a run", zoom=(10, 30)), tmp_path / "a.svg")
    assert "no opposing pair was found" in (tmp_path / "a.svg").read_text()


def test_numbers_of_a_sample_are_written_out_where_no_target_takes_their_room(tmp_path):
    rows = [Tile(f"x = +0.70{n}, -1.51", "outer", "outer", "inner", f"#{n}") for n in range(3)]
    panel = PairPanel("pair 1", ("G1: outer", rows, WHOLE), ("G2: inner", rows, WHOLE[::-1]))
    save(pairs_figure([panel], STEPS, WHOLE, "a run", zoom=(10, 30)), tmp_path / "a.svg")
    assert "x = +0.701, -1.51" in (tmp_path / "a.svg").read_text()


def test_what_is_missing_does_not_stop_a_picture(tmp_path):
    bare = [Tile(None, None, None, None), Tile("x = 1\ny = 2", "x\x1b[2J", None, "7")]
    losses = np.where(np.arange(50) % 2, np.nan, 0.0)
    save(movers_figure([("rose", bare)], STEPS, {"rose": losses}, -WHOLE, (0, 49), "t"), tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert "no picture" in text
    assert "\x1b" not in text


def test_fonts_are_added_for_the_characters_that_the_first_lacks(monkeypatch):
    monkeypatch.setattr(canvas, "fallbacks", lambda: ["Other"])
    block = (1.0, lambda area: [area.text(0, 0, words) for words in ("was Coat \u2192 \u2212 0.3 \u00b1", "\u5c3a\nA")])
    plain, wide = canvas.page([block]).texts
    assert plain.get_fontfamily() == [canvas.FONT]
    assert wide.get_fontfamily() == [canvas.FONT, "Other"]


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\.png, \.pdf, \.svg, not '\.jpeg'"):
        draw_pairs(tmp_path / "a.jpeg")


def test_a_failed_picture_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.png"
    draw_pairs(path)
    before = path.read_bytes()

    def fail(area):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        save(page([heading("t"), (1.0, fail)]), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_the_smoothed_density_keeps_the_number_of_eigenvalues_and_their_sum():
    nodes, weights = np.array([-1.0, 0.0, 0.0, 9.0]), np.array([2.0, 60.0, 30.0, 1.0])
    grid, density, width = smoothed_density(nodes, weights)
    step = grid[1] - grid[0]
    assert density.sum() * step == pytest.approx(93)
    assert (grid * density).sum() * step == pytest.approx(7)
    assert width == pytest.approx(0.1)
    last = grid > 5  # an eigenvalue by itself is a Gaussian of area 1
    np.testing.assert_allclose(
        density[last], np.exp(-0.5 * ((grid[last] - 9) / width) ** 2) / (width * np.sqrt(2 * np.pi)), atol=1e-12
    )
    assert np.isfinite(smoothed_density(np.zeros(3), np.ones(3))[1]).all()


@pytest.mark.parametrize("threshold", [4.0, np.nan])
def test_the_whole_losses_curvature_is_drawn_with_what_it_is_held_against(tmp_path, threshold):
    critical = np.array([0.0, 1.0, 3.0, np.inf, np.nan])
    panels = [
        curvature.critical_panel(STEPS[:5], critical, np.full(5, threshold)),
        curvature.trace_panel(STEPS[:5], np.arange(5.0), np.ones(5)),
        curvature.density_panel(4, *smoothed_density(np.array([0.0, 1]), np.array([9.0, 1]))),
    ]
    save(curvature.loss_page(panels, "a run"), tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert ("2 / learning rate" in text) == np.isfinite(threshold)
    for words in ("any step along the update raises the loss", "standard error", "spectral density at step 4"):
        assert words in text
    save(
        curvature.loss_page([curvature.critical_panel(STEPS[:1], critical[:1], critical[:1])], "t"), tmp_path / "b.svg"
    )
    assert "any step" not in (tmp_path / "b.svg").read_text()
