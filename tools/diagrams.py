"""Draw the two diagrams of the walkthrough, after Fig. 2 B and Fig. 3: two_slices.png and density_ratio.png.

    python -m tools.diagrams                       # into runs/diagrams
    python -m tools.diagrams --output docs         # as in the documentation
"""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle

import tools
from checkpoint import say

BLACK, BLUE, GREY, GREEN, ORANGE = "#222222", "#0072B2", "#d9d9d9", "#009E73", "#D55E00"
NODES = {  # name: position, text, square, observed
    "a0": ((0.0, 5.6), "$a_{t-1}$", False, True),
    "h0": ((0.0, 3.6), "$h_{t-1}$", True, False), "h1": ((5.0, 3.6), "$h_t$", True, False),
    "c0": ((0.0, 1.2), "$s^c_{t-1}$", False, False), "c1": ((5.0, 1.2), "$s^c_t$", False, False),
    "z1": ((8.2, 3.6), "$z_t$", True, False),
    "r1": ((12.0, 5.6), "$r_t$", False, True), "x1": ((12.0, 2.9), "$x^m_t$", False, True),
    "f1": ((8.6, 0.2), "$s^f_t$", False, False),
}  # fmt: skip
ARROWS = [  # from, to, colour, bend
    ("a0", "h1", BLACK, 0), ("h0", "h1", BLACK, 0), ("c0", "h1", BLACK, 0), ("h1", "c1", BLACK, 0.3),
    ("h1", "z1", BLACK, 0), ("c1", "z1", BLACK, 0), ("z1", "r1", BLACK, 0), ("z1", "x1", BLACK, 0),
    ("x1", "f1", BLUE, -0.3), ("f1", "c1", BLUE, -0.25), ("h1", "c1", BLUE, -0.3),
]  # fmt: skip
LABELS = [  # of arrows: position, colour, text
    (2.5, 5.35, BLACK, "MSSM.transition, Eq. (9)"), (3.75, 2.2, BLACK, "MSSM.prior\nEq. (9)"),
    (6.6, 3.85, BLACK, "MSSM.latent"), (9.7, 5.2, BLACK, "MSSM.reward, Eq. (8)"),
    (9.6, 2.65, BLACK, "MSSM.decode, Eq. (7)\n(MuMMI needs none)"),
    (11.9, 0.35, BLUE, "MSSM.encode, MSSM.fuse, Eq. (11):\nproduct of the experts present"),
    (6.6, -0.35, BLUE, "MSSM.posterior\nEq. (11)"),
]  # fmt: skip


def arrow(axis, start, end, colour, bend=0.0, shrink=31):
    """Draw an arrow from one point to another, thicker in BLUE."""
    axis.add_patch(FancyArrowPatch(
        start, end, arrowstyle="-|>", mutation_scale=14, color=colour, linewidth=2.4 if colour == BLUE else 1.3,
        connectionstyle=f"arc3,rad={bend}", shrinkA=shrink, shrinkB=shrink, zorder=1,
    ))  # fmt: skip


def two_slices():
    """Two time slices of the model: Eq. (6) in black, its inference network, Eq. (11), in blue."""
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    axis = figure.subplots()
    axis.set(xlim=(-1.2, 13.9), ylim=(-1.6, 7.0), aspect="equal")
    axis.axis("off")
    axis.add_patch(FancyBboxPatch((11.0, 1.75), 2.6, 1.95, boxstyle="round,pad=0.05", fill=False, edgecolor="0.4"))
    axis.axvline(2.5, ymin=0.15, ymax=0.74, color="0.75", linestyle=":", zorder=0)
    for start, end, colour, bend in ARROWS:
        arrow(axis, NODES[start][0], NODES[end][0], colour, bend)
    for x, y, colour, text in LABELS:
        axis.text(x, y, text, ha="center", va="center", fontsize=9.5, color=colour, zorder=3,
                  bbox=dict(facecolor="white", edgecolor="none", pad=1.5))  # fmt: skip
    for (x, y), text, square, observed in NODES.values():
        style: dict = dict(facecolor=GREY if observed else "white", edgecolor=BLACK, linewidth=1.5, zorder=2)
        axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, **style) if square else Circle((x, y), 0.55, **style))
        axis.text(x, y, text, ha="center", va="center", fontsize=15, zorder=4)
    key = "white: inferred    grey: given    square: deterministic    black: generates    blue: infers"
    for x, y, text in [(0, 6.65, "step $t-1$"), (5.0, 6.65, "step $t$"), (12.85, 1.85, "$m = 1 \\ldots M$ sensors"),
                       (8.2, 4.25, "$z_t = [s^c_t, h_t]$"), (6.2, -1.45, key)]:  # fmt: skip
        axis.text(x, y, text, ha="center", fontsize=10.5, color="0.25")
    return figure


def expert_space(axis):
    """One step's experts around g(z) of its latent; the other steps are negatives."""
    others = 2.1 * np.random.default_rng(3).normal(size=(60, 2))
    axis.scatter(*others[np.linalg.norm(others, axis=1) > 1.75].T, s=16, color="0.75", linewidths=0)
    for name, point, marker, above in [("rgb", (-1.25, 0.75), "o", 9), ("depth", (0.35, 1.45), "s", 9),
                                       ("touch", (1.3, -0.9), "^", -20)]:  # fmt: skip
        axis.scatter(*point, s=95, color=ORANGE, marker=marker, zorder=3)
        axis.annotate(f"$\\mu^{{{name}}}(x_i)$", point, (0, above), textcoords="offset points", ha="center", size=12)
        arrow(axis, point, (0, 0), GREEN, shrink=9)
    axis.scatter(0, 0, s=230, color=BLUE, marker="*", zorder=3)
    axis.annotate("$g(z_i)$", (0, 0), (-8, -22), textcoords="offset points", ha="center", fontsize=13, color=BLUE)
    axis.text(4.7, -4.2, "grey: $\\mu^m(x_j)$ of other steps, the negatives", ha="right", fontsize=10.5, color="0.25")
    axis.set(xlim=(-4.6, 4.9), ylim=(-4.4, 4.4), xticks=[], yticks=[], aspect="equal")
    axis.set_title("the experts' space, $D_f$ dimensions\nEq. (16) pulls every sensor's expert to $g(z_i)$", size=11)


def matrix(axis, size=12, absent=(3, 4, 9)):
    """log f[i, j] of one sensor: Eq. (15) raises the diagonal; absent columns and rows are left out."""
    rng = np.random.default_rng(0)
    path = np.cumsum(rng.normal(size=(size, 2)), axis=0)
    log_f = -np.square(path[:, None] + 0.3 * rng.normal(size=(size, 1, 2)) - path[None]).sum(-1)
    np.fill_diagonal(log_f, -0.2)
    axis.imshow(log_f, cmap="Blues", vmin=-14, vmax=0)
    for i in range(size):
        if i in absent:
            for corner, width, height in (((i - 0.5, -0.5), 1, size), ((-0.5, i - 0.5), size, 1)):
                axis.add_patch(Rectangle(corner, width, height, facecolor="0.88", edgecolor="0.6", hatch="//", lw=0))
    for i in set(range(size)) - set(absent):
        axis.add_patch(Rectangle((i - 0.5, i - 0.5), 1, 1, fill=False, edgecolor=GREEN, linewidth=2.2))
    axis.set(xticks=[], yticks=[], xlabel="observation $x_j$, all $N = T B$ steps of the batch", ylabel="latent $z_i$")
    axis.set_title("log f[i, j] of one sensor, N x N\nEq. (15) raises the diagonal against its row", fontsize=11)
    axis.text(size / 2 - 0.5, size + 1.25, "green: positives    hatched: sensor absent, neither row nor column counts",
              ha="center", fontsize=9.5, color="0.25")  # fmt: skip


def density_ratio():
    """Left the distances of Eq. (16), right the matrix that Eq. (15) makes of them."""
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    for axis, draw in zip(figure.subplots(1, 2), (expert_space, matrix)):
        draw(axis)
    return figure


def main(output: str = "runs/diagrams"):
    """Draw both diagrams into a folder."""
    for draw in (two_slices, density_ratio):
        (picture,) = tools.output_files(f"{output}/{draw.__name__}", ".png")
        draw().savefig(picture, dpi=100)
        say(f"{picture}")


if __name__ == "__main__":
    tools.run("diagrams", main, __doc__)
