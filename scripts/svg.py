"""A small pen for SVG pictures that read well in light and dark.

    picture = Picture(720, 300, "What the picture shows")
    picture.box(20, 40, 120, 36, "blue", "RMSNorm")
    picture.save("assets/block.svg")

Coordinates and sizes are in pixels. Colours are names; the viewer's colour scheme decides how they
look.
"""
from html import escape

COLOURS = {               # name: (light, dark)
    "paper": ("#ffffff", "#0d1117"), "ink": ("#1f2328", "#e6edf3"), "soft": ("#59636e", "#9198a1"),
    "line": ("#d1d9e0", "#3d444d"), "panel": ("#f6f8fa", "#151b23"),
    "blue": ("#0969da", "#4493f8"), "green": ("#1a7f37", "#3fb950"),
    "orange": ("#bc4c00", "#f0883e"),
    "red": ("#cf222e", "#f85149"), "violet": ("#8250df", "#ab7df8"),
}
SANS = "-apple-system, 'Segoe UI', 'Noto Sans CJK SC', 'PingFang SC', 'Microsoft YaHei', sans-serif"
MONO = "ui-monospace, 'SF Mono', Menlo, Consolas, 'Noto Sans Mono CJK SC', monospace"


def _style():
    light = "".join(f"--{name}:{pair[0]};" for name, pair in COLOURS.items())
    dark = "".join(f"--{name}:{pair[1]};" for name, pair in COLOURS.items())
    return (f"<style>svg{{{light}}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}"
            f"text{{font-family:{SANS}}}.mono{{font-family:{MONO}}}</style>")


def _colour(name):
    return f"var(--{name})" if name in COLOURS else name


class Picture:
    """A picture of `width` × `height` with a title that states what it shows."""

    def __init__(self, width, height, title):
        self.width, self.height, self.title = width, height, title
        self.parts = []
        self.rect(0, 0, width, height, "paper", line="line", round=8)
        self.text(20, 28, title, size=15, weight=600)

    def rect(self, x, y, width, height, fill="none", line="none", round=0, opacity=1.0):
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{round:g}" '
            f'fill="{_colour(fill)}" stroke="{_colour(line)}" fill-opacity="{opacity:g}"/>')

    def text(self, x, y, text, size=13, colour="ink", anchor="start", weight=400, mono=False):
        kind = ' class="mono"' if mono else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{_colour(colour)}" '
            f'text-anchor="{anchor}" font-weight="{weight}" xml:space="preserve"{kind}>'
            f"{escape(text)}</text>")

    def note(self, x, y, text):
        """What stands beside a picture, small and grey."""
        self.text(x, y, text, size=12, colour="soft")

    def box(self, x, y, width, height, colour, label, note=""):
        """A tinted box with a label in its middle, and a smaller note below the label."""
        self.rect(x, y, width, height, colour, line=colour, round=6, opacity=0.12)
        middle = x + width / 2
        self.text(middle, y + height / 2 + (-2 if note else 5), label, anchor="middle", weight=600)
        if note:
            self.text(middle, y + height / 2 + 15, note, size=11, colour="soft", anchor="middle")

    def path(self, points, colour="ink", width=1.5):
        """A line through the points [(x, y), …]."""
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{joined}" fill="none" stroke="{_colour(colour)}" '
                          f'stroke-width="{width:g}" stroke-linejoin="round"/>')

    def arrow(self, x1, y1, x2, y2, colour="soft"):
        """A horizontal or vertical line with a head at (x2, y2)."""
        self.path([(x1, y1), (x2, y2)], colour)
        if x1 == x2:
            side = 5 if y2 > y1 else -5
            self.path([(x2 - 4, y2 - side), (x2, y2), (x2 + 4, y2 - side)], colour)
        else:
            side = 5 if x2 > x1 else -5
            self.path([(x2 - side, y2 - 4), (x2, y2), (x2 - side, y2 + 4)], colour)

    def save(self, path):
        with open(path, "w", encoding="utf-8") as file:
            size = f'width="{self.width}" height="{self.height}"'
            file.write(f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" '
                       f'viewBox="0 0 {self.width} {self.height}">'
                       f"<title>{escape(self.title)}</title>{_style()}\n")
            file.write("\n".join(self.parts))
            file.write("\n</svg>\n")
