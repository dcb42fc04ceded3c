"""The painters of the scene source: one function per class, which paints from far to near and returns the segments that
make up the subject."""

from collections.abc import Callable

import numpy as np

from pipeline.sources.canvas import Canvas, Colour, hsv

Subject = tuple[int, ...]
Painter = Callable[[Canvas, np.random.Generator], Subject]

SEGMENT_NAMES = (
    "sky",
    "sun or moon",
    "cloud or star",
    "water",
    "ground",
    "mountain",
    "snow",
    "wall",
    "roof",
    "opening",
    "trunk or stem",
    "foliage",
    "hull or basket",
    "sail or envelope",
    "petal",
    "cap",
    "spot",
    "animal",
)
SKY, SUN, CLOUD, WATER, GROUND, MOUNTAIN, SNOW, WALL, ROOF = range(9)
OPENING, TRUNK, FOLIAGE, HULL, SAIL, PETAL, CAP, SPOT, ANIMAL = range(9, 18)


def _shade(colour: Colour, factor: float) -> Colour:
    return colour[0] * factor, colour[1] * factor, colour[2] * factor


def _sky(c: Canvas, r: np.random.Generator, num_clouds: int = 2) -> None:
    hue = r.uniform(0.53, 0.62)
    above = hsv(hue, r.uniform(0.5, 0.75), r.uniform(0.75, 1.0))
    c.paint(c.y >= 0, c.gradient(above, hsv(hue, 0.2, 1.0)), SKY, 1.0)
    for _ in range(r.integers(0, num_clouds + 1)):
        x, y, w = r.uniform(0, 1), r.uniform(0.05, 0.35), r.uniform(0.08, 0.16)
        for dx, dy, scale in ((-0.7, 0.1, 0.7), (0, 0, 1.0), (0.8, 0.1, 0.75)):
            puff = c.ellipse(x + dx * w, y + dy * w, w * scale, w * scale * 0.55)
            c.paint(puff, hsv(0.6, 0.03, r.uniform(0.93, 1.0)), CLOUD, 0.95)


def _meadow(c: Canvas, r: np.random.Generator, height: float) -> None:
    hue, wave = r.uniform(0.22, 0.36), r.uniform(0, 6.28)
    colours = c.gradient(hsv(hue, 0.55, 0.75), hsv(hue, 0.7, 0.45), height)
    c.paint(c.below(height, r.uniform(0.0, 0.03), r.uniform(0.5, 1.2), wave), colours, GROUND, 0.6)


def _sea(c: Canvas, r: np.random.Generator, horizon: float, hue: float, value: float = 0.75) -> None:
    c.paint(c.below(horizon), c.gradient(hsv(hue, 0.55, value), hsv(hue, 0.8, value * 0.55), horizon), WATER, 0.7)


def sunset(c: Canvas, r: np.random.Generator) -> Subject:
    """A low sun over the sea, with its reflection."""
    horizon, hue = r.uniform(0.55, 0.72), r.uniform(-0.04, 0.07)
    above = hsv(hue + r.uniform(0.7, 0.85), 0.6, r.uniform(0.4, 0.65))
    c.paint(c.y >= 0, c.gradient(above, hsv(hue + 0.07, 0.75, 1.0), 0, horizon), SKY, 1.0)
    x, radius = r.uniform(0.25, 0.75), r.uniform(0.12, 0.2)
    y = horizon - r.uniform(0.1, 0.8) * radius
    c.paint(c.ellipse(x, y, radius, radius), hsv(hue + 0.1, r.uniform(0.3, 0.55), 1.0), SUN, 0.9)
    _sea(c, r, horizon, r.uniform(0.6, 0.72), 0.5)
    for i in range(4):
        top, half = horizon + 0.03 + 0.09 * i, radius * (0.9 - 0.15 * i)
        c.paint(c.rectangle(x - half, top, x + half, top + 0.035), hsv(hue + 0.09, 0.55, 0.95), WATER, 0.7)
    return (SUN,)


def mountain(c: Canvas, r: np.random.Generator) -> Subject:
    """A snow-capped peak, a lower one beside it."""
    _sky(c, r)
    hue, base = r.uniform(0.58, 0.75), r.uniform(0.72, 0.85)
    for depth, scale in ((0.85, r.uniform(0.5, 0.75)), (0.75, 1.0)):
        x = r.uniform(0.1, 0.9) if depth > 0.8 else r.uniform(0.35, 0.65)
        top, half = base - scale * r.uniform(0.5, 0.62), scale * r.uniform(0.4, 0.55)
        rock = hsv(hue, 0.25, r.uniform(0.4, 0.55) + (0.15 if depth > 0.8 else 0.0))
        c.paint(c.polygon((x, top), (x + half, base + 0.02), (x - half, base + 0.02)), rock, MOUNTAIN, depth)
        shadow = c.polygon((x, top), (x + half, base + 0.02), (x + 0.15 * half, base + 0.02))
        c.paint(shadow, _shade(rock, 0.75), MOUNTAIN, depth)
        cut = r.uniform(0.25, 0.4)
        snow_line = top + cut * (base - top)
        ridge = [(x + (i / 2 - 1) * cut * half, snow_line + (0.04 if i % 2 else -0.02)) for i in range(5)]
        c.paint(c.polygon((x, top), *reversed(ridge)), hsv(hue, 0.03, 0.98), SNOW, depth)
    _meadow(c, r, base)
    return MOUNTAIN, SNOW


def house(c: Canvas, r: np.random.Generator) -> Subject:
    """A house with a pitched roof, a door and one or two windows."""
    _sky(c, r)
    ground = r.uniform(0.7, 0.8)
    _meadow(c, r, ground)
    x, half, height = r.uniform(0.35, 0.65), r.uniform(0.22, 0.32), r.uniform(0.25, 0.36)
    base = ground + r.uniform(0.04, 0.1)
    wall = hsv(r.uniform(0.03, 0.16), r.uniform(0.1, 0.45), r.uniform(0.85, 1.0))
    roof = hsv(r.uniform(-0.04, 0.05), r.uniform(0.6, 0.85), r.uniform(0.5, 0.8))
    peak = base - height - r.uniform(0.18, 0.28)
    if r.random() < 0.6:
        left = x + half * r.choice([-0.55, 0.45])
        c.paint(c.rectangle(left, peak + 0.02, left + 0.08, base - height), _shade(roof, 0.7), WALL, 0.45)
    c.paint(c.rectangle(x - half, base - height, x + half, base), wall, WALL, 0.4)
    eaves = 1.2 * half
    c.paint(c.polygon((x, peak), (x + eaves, base - height), (x - eaves, base - height)), roof, ROOF, 0.4)
    door = x + half * r.choice([-0.5, 0.0, 0.5])
    door_colour = hsv(r.uniform(0, 1), 0.6, 0.4)
    c.paint(c.rectangle(door - 0.05, base - 0.6 * height, door + 0.05, base), door_colour, OPENING, 0.39)
    for spot in (-0.55, 0.0, 0.55):
        if abs(x + spot * half - door) > 0.1:
            wx, wy = x + spot * half, base - 0.68 * height
            glass = hsv(0.55, 0.4, r.uniform(0.6, 0.95))
            c.paint(c.rectangle(wx - 0.05, wy - 0.05, wx + 0.05, wy + 0.05), glass, OPENING, 0.39)
    return WALL, ROOF, OPENING


def tree(c: Canvas, r: np.random.Generator) -> Subject:
    """One tree: a round crown, or a fir of three tiers."""
    _sky(c, r)
    ground = r.uniform(0.75, 0.85)
    _meadow(c, r, ground)
    x, base, width = r.uniform(0.3, 0.7), ground + r.uniform(0.02, 0.1), r.uniform(0.03, 0.05)
    top, spread = r.uniform(0.08, 0.2), r.uniform(0.2, 0.3)
    c.paint(c.rectangle(x - width, base - 0.4, x + width, base), hsv(0.07, 0.6, r.uniform(0.3, 0.45)), TRUNK, 0.4)
    hue = r.choice([r.uniform(0.25, 0.4), r.uniform(0.25, 0.4), r.uniform(0.03, 0.12)])
    if r.random() < 0.5:
        for i in range(3):
            y = top + i * 0.16
            leaf = hsv(hue, 0.75, 0.55 - 0.06 * i)
            half = spread * (0.55 + 0.225 * i)
            c.paint(c.polygon((x, y), (x + half, y + 0.26), (x - half, y + 0.26)), leaf, FOLIAGE, 0.38)
    else:
        cy = top + spread
        for dx, dy, scale in ((-0.5, 0.25, 0.7), (0.5, 0.25, 0.7), (0, -0.1, 0.85), (0, 0.3, 0.75)):
            leaf = hsv(hue, 0.7, r.uniform(0.45, 0.65))
            c.paint(c.ellipse(x + dx * spread, cy + dy * spread, spread * scale, spread * scale), leaf, FOLIAGE, 0.38)
    return TRUNK, FOLIAGE


def sailboat(c: Canvas, r: np.random.Generator) -> Subject:
    """A boat with two sails on the sea by day."""
    _sky(c, r)
    horizon = r.uniform(0.5, 0.65)
    _sea(c, r, horizon, r.uniform(0.52, 0.6), 0.8)
    x, base, half = r.uniform(0.35, 0.65), horizon + r.uniform(0.12, 0.2), r.uniform(0.2, 0.28)
    hull = hsv(r.uniform(0, 1), r.uniform(0.6, 0.85), r.uniform(0.4, 0.75))
    deck, keel = base - 0.1, 0.65 * half
    c.paint(c.polygon((x - half, deck), (x + half, deck), (x + keel, base), (x - keel, base)), hull, HULL, 0.4)
    top, lean = base - r.uniform(0.55, 0.68), r.choice([-1.0, 1.0])
    c.paint(c.rectangle(x - 0.012, top, x + 0.012, deck), hsv(0.08, 0.5, 0.35), TRUNK, 0.41)
    main = hsv(r.uniform(0, 1), r.choice([0.03, 0.7]), 0.98)
    foot, aft, fore = base - 0.14, x + 0.02 * lean, x - 0.03 * lean
    c.paint(c.polygon((aft, top), (x + 0.95 * half * lean, foot), (aft, foot)), main, SAIL, 0.4)
    jib = c.polygon((fore, top + 0.08), (x - 0.7 * half * lean, foot), (fore, foot))
    c.paint(jib, hsv(0.1, 0.06, 0.95), SAIL, 0.4)
    return HULL, TRUNK, SAIL


def balloon(c: Canvas, r: np.random.Generator) -> Subject:
    """A striped hot-air balloon high over the land."""
    _sky(c, r, 3)
    _meadow(c, r, r.uniform(0.88, 0.95))
    x, y, radius = r.uniform(0.35, 0.65), r.uniform(0.3, 0.4), r.uniform(0.2, 0.28)
    hue, second = r.uniform(0, 1), hsv(r.uniform(0.1, 0.17), r.choice([0.1, 0.7]), 1.0)
    first = hsv(hue, 0.85, r.uniform(0.7, 0.95))
    skirt = y + 1.3 * radius
    shoulder, wide, narrow = y + 0.44 * radius, 0.9 * radius, 0.25 * radius
    funnel = c.polygon((x - wide, shoulder), (x + wide, shoulder), (x + narrow, skirt), (x - narrow, skirt))
    envelope = c.ellipse(x, y, radius, radius) | funnel
    stripe = (np.floor((c.x - x + radius) / (2 * radius) * 5 + 1e-6).astype(int) % 2 == 1)[..., None]
    colours = np.where(stripe, np.asarray(second, np.float32), np.asarray(first, np.float32))
    c.paint(envelope, colours, SAIL, 0.5)
    basket = skirt + 0.06
    for side in (-1, 1):
        rope = x + side * 0.2 * radius
        c.paint(c.rectangle(rope - 0.008, skirt, rope + 0.008, basket), hsv(0.07, 0.5, 0.3), HULL, 0.5)
    wicker = c.rectangle(x - 0.3 * radius, basket, x + 0.3 * radius, basket + 0.09)
    c.paint(wicker, hsv(0.08, 0.65, 0.45), HULL, 0.5)
    return SAIL, HULL


def flower(c: Canvas, r: np.random.Generator) -> Subject:
    """One large blossom on a stem with two leaves."""
    hue = r.uniform(0.25, 0.42)
    haze, shade = hsv(hue, 0.25, r.uniform(0.85, 1.0)), hsv(hue, 0.55, r.uniform(0.55, 0.75))
    c.paint(c.y >= 0, c.gradient(haze, shade), GROUND, 1.0)
    x, y, radius = r.uniform(0.38, 0.62), r.uniform(0.32, 0.42), r.uniform(0.15, 0.2)
    green = hsv(r.uniform(0.27, 0.38), 0.8, r.uniform(0.3, 0.5))
    c.paint(c.rectangle(x - 0.02, y, x + 0.02, 1.0), green, TRUNK, 0.35)
    for side in (-1, 1):
        leaf = y + r.uniform(0.32, 0.48)
        c.paint(c.ellipse(x + side * 0.12, leaf, 0.11, 0.045), green, FOLIAGE, 0.34)
    count, turn = int(r.integers(5, 9)), r.uniform(0, 6.28)
    petal_hue = r.choice([r.uniform(-0.1, 0.05), r.uniform(0.75, 0.9), 0.13, 0.6])
    petal = hsv(petal_hue, r.uniform(0.5, 0.9), r.uniform(0.85, 1.0))
    for i in range(count):
        angle = turn + 2 * np.pi * i / count
        disc = c.ellipse(x + radius * np.cos(angle), y + radius * np.sin(angle), radius * 0.62, radius * 0.62)
        c.paint(disc, _shade(petal, 1.0 if i % 2 else 0.85), PETAL, 0.3)
    pollen = hsv(r.uniform(0.09, 0.15), 0.85, r.uniform(0.75, 1.0))
    c.paint(c.ellipse(x, y, radius * 0.6, radius * 0.6), pollen, SPOT, 0.28)
    return TRUNK, FOLIAGE, PETAL, SPOT


def mushroom(c: Canvas, r: np.random.Generator) -> Subject:
    """A red or brown cap with pale spots, in a dark wood."""
    hue = r.uniform(0.28, 0.45)
    above, below = hsv(hue, 0.7, r.uniform(0.12, 0.25)), hsv(hue, 0.6, r.uniform(0.3, 0.45))
    c.paint(c.y >= 0, c.gradient(above, below), FOLIAGE, 1.0)
    ground = r.uniform(0.78, 0.86)
    floor = c.below(ground, 0.02, 1.0, r.uniform(0, 6.28))
    c.paint(floor, hsv(r.uniform(0.07, 0.12), 0.6, r.uniform(0.25, 0.4)), GROUND, 0.6)
    x, half, cap = r.uniform(0.35, 0.65), r.uniform(0.26, 0.36), r.uniform(0.42, 0.52)
    base, height = ground + 0.05, r.uniform(0.26, 0.36)
    stem = c.polygon((x - 0.07, cap), (x + 0.07, cap), (x + 0.11, base), (x - 0.11, base))
    c.paint(stem, hsv(0.11, 0.15, r.uniform(0.85, 0.98)), TRUNK, 0.4)
    cap_hue = r.choice([r.uniform(-0.03, 0.03), r.uniform(0.04, 0.09)])
    c.paint(c.ellipse(x, cap, half, height) & (c.y <= cap), hsv(cap_hue, 0.85, r.uniform(0.65, 0.9)), CAP, 0.38)
    for dx, dy in ((-0.55, 0.3), (0.0, 0.62), (0.55, 0.32), (-0.15, 0.22), (0.32, 0.68)):
        size = r.uniform(0.025, 0.05)
        spot = c.ellipse(x + dx * half, cap - dy * height, size, size) & (c.y <= cap)
        c.paint(spot, hsv(0.12, 0.08, 1.0), SPOT, 0.37)
    return TRUNK, CAP, SPOT


def night(c: Canvas, r: np.random.Generator) -> Subject:
    """A moon and stars over a row of dark buildings with lit windows."""
    hue = r.uniform(0.6, 0.75)
    above, below = hsv(hue, 0.8, r.uniform(0.08, 0.18)), hsv(hue, 0.6, r.uniform(0.3, 0.45))
    c.paint(c.y >= 0, c.gradient(above, below), SKY, 1.0)
    for _ in range(r.integers(5, 12)):
        size = r.uniform(0.008, 0.018)
        c.paint(c.ellipse(r.uniform(0, 1), r.uniform(0, 0.55), size, size), (1.0, 1.0, 0.9), CLOUD, 0.99)
    mx, my, radius = r.uniform(0.2, 0.8), r.uniform(0.15, 0.28), r.uniform(0.08, 0.13)
    moon = c.ellipse(mx, my, radius, radius)
    if r.random() < 0.5:
        moon &= ~c.ellipse(mx + radius * 0.6, my - radius * 0.2, radius * 0.9, radius * 0.9)
    c.paint(moon, hsv(0.14, r.uniform(0.1, 0.3), 1.0), SUN, 0.95)
    left = -r.uniform(0, 0.1)
    while left < 1:
        width, top = r.uniform(0.14, 0.24), r.uniform(0.48, 0.78)
        wall = hsv(hue, 0.4, r.uniform(0.08, 0.2))
        c.paint(c.rectangle(left, top, left + width, 1.0), wall, WALL, 0.6)
        for wy in np.arange(top + 0.06, 0.97, 0.12):
            for wx in np.arange(left + 0.03, left + width - 0.05, 0.09):
                if r.random() < 0.5:
                    window = c.rectangle(wx, wy, wx + 0.05, wy + 0.06)
                    c.paint(window, hsv(r.uniform(0.1, 0.15), 0.6, 1.0), OPENING, 0.59)
        left += width + r.uniform(0, 0.03)
    return WALL, OPENING


def fish(c: Canvas, r: np.random.Generator) -> Subject:
    """A fish under water, over sand, with bubbles."""
    hue = r.uniform(0.47, 0.6)
    above, below = hsv(hue, 0.5, r.uniform(0.75, 0.95)), hsv(hue + 0.05, 0.85, r.uniform(0.3, 0.5))
    c.paint(c.y >= 0, c.gradient(above, below), WATER, 1.0)
    sand = c.below(r.uniform(0.85, 0.92), 0.02, 1.0, r.uniform(0, 6.28))
    c.paint(sand, hsv(0.12, 0.4, r.uniform(0.7, 0.9)), GROUND, 0.8)
    x, y, rx = r.uniform(0.4, 0.6), r.uniform(0.38, 0.62), r.uniform(0.22, 0.28)
    ry, way = rx * r.uniform(0.55, 0.75), r.choice([-1.0, 1.0])
    body_hue = r.choice([r.uniform(0.02, 0.16), r.uniform(0.85, 1.0)])
    body = hsv(body_hue, r.uniform(0.7, 0.95), r.uniform(0.85, 1.0))
    fin, root = _shade(body, 0.8), x - way * rx * 0.8
    tip, notch = root - way * rx * 0.7, root - way * rx * 0.5
    c.paint(c.polygon((root, y), (tip, y - ry * 0.9), (notch, y), (tip, y + ry * 0.9)), fin, ANIMAL, 0.4)
    back = c.polygon((x - 0.5 * rx, y - 0.6 * ry), (x + 0.4 * rx, y - 0.6 * ry), (x - way * 0.4 * rx, y - 1.5 * ry))
    c.paint(back, fin, ANIMAL, 0.4)
    c.paint(c.ellipse(x, y, rx, ry), body, ANIMAL, 0.38)
    if r.random() < 0.6:
        for dx in (-0.25, 0.15):
            band = c.ellipse(x, y, rx, ry) & (np.abs(c.x - x - dx * way * rx) < 0.09 * rx + 0.012)
            c.paint(band, (1.0, 1.0, 1.0), ANIMAL, 0.37)
    ex, ey = x + way * rx * 0.6, y - ry * 0.25
    c.paint(c.ellipse(ex, ey, 0.045, 0.045), (1.0, 1.0, 1.0), SPOT, 0.36)
    c.paint(c.ellipse(ex + way * 0.01, ey, 0.022, 0.022), (0.05, 0.05, 0.1), SPOT, 0.35)
    for _ in range(r.integers(1, 4)):
        size = r.uniform(0.015, 0.035)
        bubble = c.ellipse(x + way * r.uniform(0.28, 0.4), y - r.uniform(0.05, 0.35), size, size)
        c.paint(bubble, hsv(hue, 0.1, 1.0), CLOUD, 0.5)
    return ANIMAL, SPOT


PAINTERS: dict[str, Painter] = {
    painter.__name__: painter
    for painter in (sunset, mountain, house, tree, sailboat, balloon, flower, mushroom, night, fish)
}
