"""Loss curves as SVG to be put into a page. The one module of the HTML report that knows matplotlib, imported at use.

No text of the user's goes into a figure (captions are the page's), so nothing needs escaping here. Colours are the
page's own: matplotlib draws in stand-ins that are then replaced by CSS variables, so one SVG suits light and dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

INK, LINE, ACCENT = "#010203", "#040506", "#070809"
CSS_COLOURS = {INK: "var(--muted)", LINE: "var(--line)", ACCENT: "var(--accent)"}
WIDTH_INCHES, HEIGHT_INCHES = 3.6, 1.9
SMOOTHING_SPAN = 0.05
"""Time constant of the smoothed line, as a fraction of the points."""


def smooth(values: Sequence[float], span: float = SMOOTHING_SPAN) -> list[float]:
    """Exponential moving average without the start's bias towards zero (as Adam corrects its moments).

    Args:
        values: in the order in which they were logged.
        span: time constant as a fraction of their number; below two points the values come back as they are.
    """
    constant = span * len(values)
    if constant < 2:
        return list(values)
    decay = 1 - 1 / constant
    smoothed, average, weight = [], 0.0, 0.0
    for value in values:
        average = decay * average + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        smoothed.append(average / weight)
    return smoothed


def loss_svg(steps: Sequence[int], losses: Sequence[float], identifier: str) -> str:
    """Draw a loss curve: faint raw values under a smoothed line.

    Args:
        steps: optimiser steps, ascending.
        losses: as many finite values.
        identifier: prefix of the ids in the SVG, so that several fit into one page.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    style = {"svg.fonttype": "none", "svg.hashsalt": identifier, "font.size": 8, "axes.linewidth": 0.8}
    with rc_context(style):
        figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.plot(steps, losses, color=ACCENT, alpha=0.25, linewidth=0.9)
        axes.plot(
            steps, smooth(losses), color=ACCENT, linewidth=1.6, marker="o" if len(steps) == 1 else "", markersize=3
        )
        axes.set_xlabel("step", color=INK)
        axes.grid(axis="y", color=LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(LINE)
        axes.tick_params(colors=INK, length=0, labelsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.margins(x=0.01)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return svg_for_page(buffer.getvalue(), identifier)


def svg_for_page(svg: str, identifier: str) -> str:
    """Take prolog, metadata and global styles off; let the page set size, colours and font; prefix ids."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\swidth="[^"]*pt"', "", re.sub(r'\sheight="[^"]*pt"', "", svg, count=1), count=1)
    svg = re.sub(r'\bid="', f'id="{identifier}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{identifier}-", svg)
    svg = re.sub(r"font: ([0-9.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    for stand_in, variable in CSS_COLOURS.items():
        svg = svg.replace(stand_in, variable)
    return svg.replace("<svg ", '<svg role="img" aria-hidden="true" ', 1)
