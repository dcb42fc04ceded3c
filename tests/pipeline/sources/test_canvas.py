"""The canvas: what is painted last is seen, and maps follow the picture."""

import numpy as np

from pipeline.sources.canvas import Canvas, hsv


def test_the_last_paint_wins_in_colour_segment_and_depth():
    canvas = Canvas(8)
    canvas.paint(canvas.y >= 0, (0.0, 0.0, 1.0), 1, 0.9)
    canvas.paint(canvas.rectangle(0.5, 0.0, 1.0, 1.0), (1.0, 0.0, 0.0), 2, 0.2)
    segment, depth = canvas.maps()
    assert (segment[:, :4] == 1).all() and (segment[:, 4:] == 2).all()
    assert np.allclose(depth[:, :4], 0.9) and np.allclose(depth[:, 4:], 0.2)
    assert (canvas.pixels()[:, :4] == (0, 0, 255)).all() and (canvas.pixels()[:, 4:] == (255, 0, 0)).all()


def test_borders_inside_a_pixel_are_smoothed():
    canvas = Canvas(2)
    canvas.paint(canvas.rectangle(0.0, 0.0, 0.5 + 1 / 6, 1.0), (1.0, 1.0, 1.0), 1, 0.5)
    assert canvas.pixels()[0, :, 0].tolist() == [255, 85]


def test_areas_of_shapes():
    canvas = Canvas(64)
    assert abs(canvas.ellipse(0.5, 0.5, 0.4, 0.2).mean() - np.pi * 0.4 * 0.2) < 0.002
    assert abs(canvas.polygon((0.1, 0.1), (0.9, 0.1), (0.1, 0.9)).mean() - 0.32) < 0.005
    assert abs(canvas.below(0.25).mean() - 0.75) < 0.005


def test_a_polygon_with_a_notch_is_not_filled_across_it():
    canvas = Canvas(32)
    arrow = canvas.polygon((0.0, 0.0), (1.0, 0.5), (0.0, 1.0), (0.5, 0.5))
    assert not arrow[48, 20] and arrow[48, 60]


def test_a_gradient_runs_between_its_ends():
    canvas = Canvas(4)
    colours = canvas.gradient((0.0, 0.0, 0.0), (1.0, 0.5, 0.0), 0.25, 0.75)
    assert (colours[:3] == 0).all() and np.allclose(colours[-3:], (1.0, 0.5, 0.0))
    assert (np.diff(colours[:, 0, 0]) >= 0).all()


def test_hues_wrap_around():
    assert hsv(1.25, 1.0, 1.0) == hsv(0.25, 1.0, 1.0)
