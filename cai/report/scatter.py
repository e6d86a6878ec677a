"""A scatter with the frontier of the dots that no other is ahead of. Draws onto axes that the caller made."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from cai.report.charts import Scatter


def scatter(axes: Axes, drawn: Scatter, colour: str, dim: str, ground: str) -> None:
    """Filled dots are on the frontier; bars reach over the seeds; a dot is named by its row of the table."""
    axes.set_xlim(drawn.x_ticks[0], drawn.x_ticks[-1])
    along = [drawn.dots[place] for place in drawn.frontier]
    axes.plot([dot.x for dot in along], [dot.y for dot in along], color=dim, linestyle=(0, (4, 3)), linewidth=1.2)
    for place, dot in enumerate(drawn.dots):
        axes.hlines(dot.y, *dot.xs, color=dim, linewidth=1.0, clip_on=False)
        axes.vlines(dot.x, *dot.ys, color=dim, linewidth=1.0, clip_on=False)
        face = colour if place in drawn.frontier else ground
        axes.plot([dot.x], [dot.y], "o", color=colour, markersize=7, markerfacecolor=face, clip_on=False)
        axes.annotate(dot.name, (dot.x, dot.y), (5, 5), textcoords="offset points", fontsize=10, annotation_clip=False)
