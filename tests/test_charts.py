"""Lines and matrices of the report: nothing is lost, and what is higher is drawn higher."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from opsig_cli.report import images
from opsig_cli.report.charts import MOST_POINTS, Line, line_chart


def test_no_spike_is_lost_where_there_are_more_steps_than_points():
    values = np.ones(50_000)
    values[[12_345, 40_001]] = 7.0, 0.1
    chart = line_chart(np.arange(50_000), [Line("x", values, "a")], "loss", "", log=True)
    points = [(float(y), float(x)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", chart.lines[0].path)]
    assert len(points) <= MOST_POINTS + 2
    assert min(points)[1] == pytest.approx(1000 * 12_345 / 49_999, abs=0.1)
    assert max(points)[1] == pytest.approx(1000 * 40_001 / 49_999, abs=0.1)
    shown = json.loads(chart.data)
    assert dict(zip(shown["steps"], shown["lines"][0], strict=True))[12_345] == 7


def test_what_is_not_finite_leaves_a_gap():
    values = np.array([1.0, 2.0, np.nan, 2.0, np.inf, 3.0, 0.0, -1.0])
    chart = line_chart(np.arange(8), [Line("x", values, "a")], "loss", "", log=True)
    assert chart.lines[0].path.count("M") == 3
    assert "NaN" not in chart.data
    assert "Infinity" not in chart.data
    for nothing in (np.full(3, np.nan), np.zeros(3), np.ones(3)):
        assert line_chart(np.arange(3), [Line("x", nothing, "a")], "loss", "").y_ticks


def test_a_higher_value_is_drawn_higher_and_ticks_stand_where_their_values_are():
    values = np.array([1.0, 10.0, 100.0])
    for log in (True, False):
        chart = line_chart(np.array([0, 5, 10]), [Line("x", values, "a")], "loss", "", log=log, mark=5)
        heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", chart.lines[0].path)]
        assert heights[0] > heights[1] > heights[2]
        places = {tick.text: tick.place for tick in chart.y_ticks}
        assert places["100"] == heights[2]
        assert chart.mark is not None
        assert chart.mark.place == 50


def test_the_matrix_is_blue_where_samples_align_and_vermilion_where_they_oppose():
    similarity = np.array([[1.0, 0.0, -1.0], [0.0, 1.0, 0.5], [-1.0, 0.5, 1.0]], np.float32)
    uri = images.matrix_image(similarity, np.array([0, 2, 1]))
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGBA"))
    assert tuple(image[0, 0]) == (*images.POSITIVE, 255)
    assert tuple(image[0, 1]) == (*images.NEGATIVE, 255)
    assert image[0, 2, 3] == 0
    assert image[1, 2, 3] == pytest.approx(128, abs=3)
    assert tuple(image[1, 2, :3]) == images.POSITIVE


def test_a_large_matrix_is_averaged_in_blocks():
    sides = np.repeat([1.0, -1.0], 600).astype(np.float32)
    uri = images.matrix_image(np.outer(sides, sides), np.arange(1200))
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGBA"))
    assert image.shape == (images.MATRIX, images.MATRIX, 4)
    assert tuple(image[0, -1, :3]) == images.NEGATIVE
    assert tuple(image[-1, -1, :3]) == images.POSITIVE
