"""Learning curves of runs, Fig. 5: one line a method, the mean over its seeds in a band of one standard deviation.

Each run is smoothed by itself, as in Fig. 5 by a moving average with weight 0.9, and then interpolated on the steps
that all seeds of its line have reached. Writes <output>.png and .svg, by default runs/curves.

    python -m tools.plot runs/toy-*                                      # every training episode
    python -m tools.plot runs/toy-* --metric eval_return --smoothing 0   # evaluations as they were
    python -m tools.plot runs/*                                          # several tasks, a panel each
    python -m tools.plot runs/toy-* --label weights                      # a line for each value of train.py's --weights

Runs of one panel that differ in anything else than method, seed and what --label names are refused.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

import tools
from checkpoint import only_runs, say
from config import check_comparable, load_config

STYLES = {  # method: its name in the paper, colour (Okabe and Ito's palette), line style, marker
    "mummi": ("MuMMI", "#D55E00", "-", "o"),
    "mummi_b": ("MuMMI-b", "#E69F00", "--", "s"),
    "mssm_e": ("MSSM-e", "#009E73", "-.", "^"),
    "cvrl": ("CVRL", "#0072B2", ":", "D"),
    "dreamer": ("Dreamer", "#CC79A7", (0, (7, 2, 1, 2, 1, 2)), "v"),
}
POINTS = 200  # of a curve


@dataclass
class Options:
    """What to draw."""

    runs: tyro.conf.Positional[tuple[str, ...]]  # folders of runs; a shell's glob gives many
    metric: Literal["train_return", "eval_return"] = "train_return"  # of episodes with or without exploration
    smoothing: float = 0.9  # weight of the past in the moving average, Fig. 5; 0 for none
    label: tuple[str, ...] = ()  # options of train.py that may differ: their values stand in the legend
    output: str = "runs/curves"  # file name without suffix


# ---- 1. Reading runs -----------------------------------------------------------------------------


def read_metric(folder, metric):
    """Steps (K,) and values (K,) of one metric of a run. Raises ValueError if there are none.

    An unclean stop can leave half a last line, and a run that is resumed from its checkpoint
    repeats the steps since then: the later lines count.
    """
    path = Path(folder) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    points = []
    for number, text in enumerate(lines, start=1):
        try:
            line = json.loads(text)
        except ValueError:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: not JSON; delete the line if the run was cut off there") from None
        if metric in line:
            while points and points[-1][0] > line["steps"]:
                points.pop()
            points.append((line["steps"], line[metric]))
    if not points:
        raise ValueError(f"{path} has no line with {metric} yet: give runs that have, or another --metric")
    return np.array(points, float).T


# ---- 2. Curves -----------------------------------------------------------------------------------


def smooth(values, weight):
    """Moving average: value i - k counts weight^k as much as value i. (K,) -> (K,)"""
    total = norm = 0.0
    averages = []
    for value in values:
        total, norm = weight * total + value, weight * norm + 1
        averages.append(total / norm)
    return np.array(averages)


def interpolate(curves):
    """Curves on common steps, from where the last of them begins to where the first of them ends.

    curves   one (steps (K,), values (K,)) a seed; of values at the same step the last counts
    returns  steps (POINTS,), values (seeds, POINTS)
    Raises ValueError if they have no steps in common.
    """
    last = lambda steps: np.searchsorted(steps, np.unique(steps), "right") - 1  # noqa: E731
    curves = [(np.unique(steps), values[last(steps)]) for steps, values in curves]
    begin, end = max(steps[0] for steps, _ in curves), min(steps[-1] for steps, _ in curves)
    if begin > end:
        raise ValueError(f"one seed begins at step {begin:.0f} and another ends at {end:.0f}: nothing to average")
    grid = np.linspace(begin, end, POINTS)
    return grid, np.stack([np.interp(grid, *curve) for curve in curves])


def draw(lines, options):
    """The figure.

    lines  {task: {(method, label): (steps (POINTS,), values (seeds, POINTS))}}
    """
    columns = min(len(lines), 3)
    rows = -(-len(lines) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (task, curves) in zip(axes, lines.items()):
        order = sorted(curves, key=lambda key: (list(STYLES).index(key[0]), key[1]))
        apart = len({method for method, _ in order}) == len(order)  # else a style a line
        for i, (method, label) in enumerate(order):
            _, colour, style, marker = STYLES[method] if apart else list(STYLES.values())[i % len(STYLES)]
            steps, values = curves[method, label]
            mean, std = values.mean(0), values.std(0)
            axis.fill_between(steps, mean - std, mean + std, color=colour, alpha=0.18, linewidth=0)
            name = ", ".join([STYLES[method][0], *label, f"{len(values)} seed{'s' * (len(values) > 1)}"])
            axis.plot(steps, mean, color=colour, linestyle=style, linewidth=1.6, label=name, markersize=4.5,
                      marker=marker if i < len(STYLES) else f"${i + 1}$", markevery=(6 * i, 40))  # fmt: skip
        axis.set(title=task.replace("_", " "), xlabel="environment steps", ylabel=f"{options.metric[:-7]} return")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2))  # hides no curve
    for axis in axes[len(lines) :]:
        axis.remove()
    note = f"mean ± one standard deviation over seeds; moving average with weight {options.smoothing:g}"
    figure.supxlabel(note, fontsize=7, color="0.35")
    return figure


def main(options):
    """Read all runs, then draw and write. Raises ValueError on bad input, before anything is written."""
    if not 0 <= options.smoothing < 1:
        raise ValueError(f"--smoothing {options.smoothing} is not allowed: give at least 0 and less than 1")
    configs = {folder: load_config(folder) for folder in only_runs(options.runs)}
    labels = check_comparable(configs, options.label)
    curves = defaultdict(lambda: defaultdict(list))
    for folder, config in configs.items():
        steps, values = read_metric(folder, options.metric)
        curves[config.task][config.method, labels[folder]].append((steps, smooth(values, options.smoothing)))
    lines = {task: {key: interpolate(seeds) for key, seeds in of.items()} for task, of in curves.items()}
    files = tools.output_files(options.output, ".png", ".svg")
    figure = draw(lines, options)
    for file in files:
        figure.savefig(file, dpi=150)
    say(f"{', '.join(map(str, files))}: {len(configs)} runs; next: python evaluate.py {' '.join(configs)}")


if __name__ == "__main__":
    tools.run("plot", main, __doc__, Options)
