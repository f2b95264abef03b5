"""Draws docs/figures/attention.svg: which keys one query of STAT reads.

    python docs/figures/draw_attention.py

The picture has a background of its own, so that it is readable on a light and on a dark page.
"""

from pathlib import Path

FRAMES, CENTRE, RADIUS = 9, 4, 2
SIDE, PITCH, TOP = 84, 100, 96  # of a frame, from frame to frame, and where frames begin; px
WIDTH, HEIGHT = FRAMES * PITCH + 24, 350
CURRENT, SHORT, LONG, QUERY = "#1f77b4", "#ff9f1c", "#2a9d5c", "#d62828"
INK, FAINT, PAPER = "#1c2733", "#dfe4ea", "#ffffff"


def square(x: float, y: float, side: float, fill: str, stroke: str = PAPER) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{side:.1f}" height="{side:.1f}" rx="2" '
        f'fill="{fill}" stroke="{stroke}"/>'
    )


def text(x: float, y: float, words: str, fill: str = INK, size: int = 15, weight: int = 400) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{fill}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="middle">{words}</text>'
    )


def frame(index: int) -> list[str]:
    """A frame's tokens as the query sees them: 7 x 7, 4 x 4 or none, and its class token."""
    x = 12 + index * PITCH + (PITCH - SIDE) / 2
    distance = abs(index - CENTRE)
    cells = 7 if distance == 0 else 4
    fill = CURRENT if distance == 0 else SHORT if distance <= RADIUS else FAINT
    step = SIDE / cells
    grid = [
        square(x + column * step, TOP + row * step, step, fill)
        for row in range(cells)
        for column in range(cells)
    ]
    token = square(x + SIDE / 2 - 10, TOP - 34, 20, LONG)
    offset = index - CENTRE
    sign = "+" if offset > 0 else "\N{MINUS SIGN}"
    label = f"i {sign} {distance}" if offset else "frame i"
    weight = 700 if distance == 0 else 400
    return [*grid, token, text(x + SIDE / 2, TOP + SIDE + 22, label, size=14, weight=weight)]


def legend() -> list[str]:
    entries = (
        (CURRENT, "current", "49 tokens of its own frame"),
        (SHORT, "short-term", "16 coarser tokens of each neighbour in the window"),
        (LONG, "long-term", "the class token of every frame"),
        (QUERY, "query", "one softmax over all of these keys: 49 + 6 · 16 + 32 = 177 of them"),
    )
    lines = []
    for row, (colour, name, words) in enumerate(entries):
        y = TOP + SIDE + 48 + 24 * row
        lines.append(square(180, y, 14, colour, colour))
        lines.append(
            f'<text x="204" y="{y + 12}" fill="{INK}" font-size="15">'
            f'<tspan font-weight="700">{name}:</tspan> {words}</text>'
        )
    words = "at 64 video frames (32 token frames) and a window of 7; drawn with a window of 5"
    y = TOP + SIDE + 48 + 24 * len(entries)
    lines.append(f'<text x="204" y="{y + 8}" fill="#5c6b7a" font-size="13">{words}</text>')
    return lines


def draw() -> str:
    middle = 12 + CENTRE * PITCH + PITCH / 2
    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="{PAPER}"/>']
    parts.append(text(WIDTH / 2, 32, "Keys that one query of frame i reads", size=18, weight=700))
    for index in range(FRAMES):
        parts += frame(index)
    cell = SIDE / 7
    parts.append(
        f'<rect x="{middle - cell / 2:.1f}" y="{TOP + 3 * cell:.1f}" width="{cell:.1f}" '
        f'height="{cell:.1f}" rx="2" fill="{QUERY}" stroke="{PAPER}"/>'
    )
    parts += legend()
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="system-ui, sans-serif" role="img" aria-label="Current, short-term and '
        f'long-term keys of one query">\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    Path(__file__).with_name("attention.svg").write_text(draw(), encoding="utf-8")
