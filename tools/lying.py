"""How well lies are found: ROC curves of the suspicion of `trust.py`, a panel a sensor, a line a fault.

    python evaluate.py runs/toy-mummi-* --faults all --trust
    python -m tools.lying evaluation.json                    # <output>.png, by default beside it
"""

import itertools
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure

import tools
from checkpoint import say
from pictures import COLOURS


@dataclass
class Options:
    """What to draw."""

    evaluation: tyro.conf.Positional[Path]  # the .json of evaluate.py with --faults and --trust
    output: str = ""  # file name; by default that of the evaluation, with -roc.png
    method: str = "mummi"


def main(options):
    """Draw and write the figure. Raises ValueError where the file holds no detection of that method."""
    grid = np.linspace(0, 1, 201)  # shares of honest readings
    curves: dict = defaultdict(lambda: defaultdict(list))
    records = [r for r in json.loads(options.evaluation.read_text())["records"] if r["method"] == options.method]
    records = [record for record in records if record.get("fault") and record.get("detection")]
    if not records:
        raise ValueError(f"{options.evaluation} holds no faults of {options.method} with --trust: evaluate with both")
    if len({(r["task"], r["missing"], r["sensors"], r.get("label"), r["fault"].count(",")) for r in records}) > 1:
        raise ValueError(f"{options.evaluation} mixes tasks, missing rates, sensors or labels: evaluate each alone")
    for record in records:
        faults = dict(pair.split("=") for pair in record["fault"].split(","))
        for name, found in record["detection"].items():
            curves[name][faults[name]].append(found)
    figure = Figure(figsize=(4.4 * len(curves), 4.2), layout="constrained")
    for axis, (name, faults) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items()):
        for (fault, found), colour in zip(faults.items(), itertools.cycle(COLOURS)):
            lines = [np.interp(grid, *np.array([[0.0, 0.0], *one["roc"], [1.0, 1.0]]).T) for one in found]
            area = np.mean([one["area"] for one in found])
            axis.plot(grid, np.mean(lines, 0), color=colour, label=f"{fault}, area {area:.2f}")
        axis.plot(grid, grid, color="0.7", linestyle=":")
        axis.set(title=name, xlabel="honest readings above the threshold", ylabel="lies above it", xlim=(-0.02, 1))
        axis.legend(frameon=False, fontsize=8, loc="lower right")
    path = Path(options.output or options.evaluation.with_name(options.evaluation.stem + "-roc.png"))
    figure.savefig(path, dpi=120)
    say(f"{path}: {', '.join(curves)}; next: python evaluate.py RUN --faults all --trust --video")


if __name__ == "__main__":
    tools.run("lying", main, __doc__, Options)
