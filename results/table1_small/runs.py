"""What the logs of the runs say, as two tables: `python results/table1_small/runs.py`."""

import json
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
TASKS = "walker_stand walker_walk walker_run cup_catch finger_spin".split()
METHODS = {"mummi": "MuMMI", "mummi_b": "MuMMI-b", "cvrl": "CVRL", "dreamer": "Dreamer", "mssm_e": "MSSM-e"}


def held_out():
    """{run: its cells in held_out.md: 0, 1, 3, 5, 10 and 14 steps ahead}."""
    rows = [line.strip("| \n").split(" | ") for line in (HERE / "held_out.md").read_text().splitlines()[2:]]
    names = {f"pretrained/{task}.pt": f"{task}-mummi-1" for task in TASKS}
    return {names.get(row[0], Path(row[0]).name): row[2:] for row in rows}


def name(run):
    """The task, method and seed of a run's folder, as in the tables."""
    task, method, seed = run.name.rsplit("-", 2)
    return f"`{task}`, {METHODS[method]}, {seed}"


if __name__ == "__main__":
    runs = [run for task in TASKS for method in METHODS for run in sorted(HERE.glob(f"{task}-{method}-[0-9]"))]
    logs = {run: [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs}
    print("| task, method, seed | evaluations at 20,000, 40,000, ... steps |\n|---|---|")
    for run, log in logs.items():
        print(f"| {name(run)} |", ", ".join(f"{x['eval_return']:.0f}" for x in log if "eval_return" in x), "|")
    print("\n| task, method, seed | KL | error of the reward, 0, 5, 10 ahead | imagined, earned | beyond 0.99 |\n"
          "|---|---|---|---|---|")  # fmt: skip
    for run, log in logs.items():
        last, error = [x for x in log if "model_loss" in x][-20:], held_out().get(run.name)
        kl, imagined, beyond = (np.mean([x[key] for x in last]) for key in ("kl", "imagined_return", "saturated_actions"))
        earned = [x for x in log if "eval_return" in x][-1]["earned_return"]
        print(f"| {name(run)} | {kl:.1f} | {f'{error[0]}, {error[3]}, {error[4]}' if error else ''} | {imagined:.0f}, "
              f"{earned:.0f} | {100 * beyond:.0f} % |")  # fmt: skip
