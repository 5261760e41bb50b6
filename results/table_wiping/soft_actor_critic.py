"""What soft actor-critic earned in robosuite's own benchmark of Table Wiping, from the logs of its five seeds.

`python results/table_wiping/soft_actor_critic.py FOLDER`, a clone of github.com/ARISE-Initiative/robosuite-benchmark.
"""

import csv
import sys
from pathlib import Path

import numpy as np

EPOCHS = ((0, 1), (4, 10), (20, 40), (80, 100), (180, 200), (380, 400), (680, 700))  # 2,500 control steps each

if __name__ == "__main__":
    logs = sorted(Path(sys.argv[1], "runs").glob("Wipe-Panda-OSC-POSE-SEED*/*/progress.csv"))
    runs = [list(csv.DictReader(open(path))) for path in logs]
    print("| control steps | return | each seed | least to most |\n|---|---|---|---|")
    for first, last in EPOCHS:
        rows = [[{k: float(x) for k, x in row.items()} for row in run[first:last]] for run in runs]
        mean, std, least, most = (np.array([[row[f"evaluation/Returns {x}"] for row in run] for run in rows])
                                  for x in ("Mean", "Std", "Min", "Max"))  # fmt: skip
        spread = np.sqrt((std**2 + mean**2).mean() - mean.mean() ** 2)
        seeds = ", ".join(f"{x:.0f}" for x in mean.mean(1))
        print(f"| {rows[0][0]['exploration/num steps total']:,.0f} to {rows[0][-1]['exploration/num steps total']:,.0f} "
              f"| {mean.mean():.0f} ± {spread:.0f} | {seeds} | {least.min():.0f} to {most.max():.0f} |")  # fmt: skip
