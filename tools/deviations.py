"""What the README's deviations change, on the toy world: `python docs/deviations.py`, an hour on two CPU cores.

MuMMI learns from random motion seen by a position sensor and a camera, 37.5 % missing, once as it is and once
with each deviation's other side; three seeds, a process a core. Measured on motion that it has not seen. Writes
results/deviations/toy_world.md and .json, a row a seed.
"""

import itertools
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import toy  # isort: skip (before torch, whose threads it quiets)

import numpy as np
import torch

WAYS = {  # other sides: the configuration's change
    "default": {},
    "D1: experts weigh 1/std": {"expert_power": 1},
    "D2: mean of s^f, no sample": {"sample_s_f": False},
    "D3: nothing present: code 0": {"prior_if_unobserved": False},
    "D4: absent logit -100": {"absent_logit": -100.0},
    "D5: mean over all rows": {"over_present": False},
    "D6: KL of s^f": {"fused_kl_scale": 1.0},
    "D1 + D2 + D3 + D4 + D5: as released": {
        "expert_power": 1, "sample_s_f": False, "prior_if_unobserved": False, "absent_logit": -100.0,
        "over_present": False,
    },
}  # fmt: skip
SEEDS = (1, 2, 3)
RATE = 0.375  # of each sensor's data, missing in training


@torch.no_grad()
def effects(model, fit, test, sparse):
    """{what: number} on held-out motion; `sparse` has 75 % missing."""
    sensors, spaces = list(model.modalities), toy.perceive(model, test)
    on_fit = toy.perceive(model, fit)
    numbers = toy.measure(sensors, on_fit, spaces)
    mean_of = lambda start: float(np.mean([x for name, x in numbers.items() if name.startswith(start)]))  # noqa: E731
    filtered = model.observe(sparse, sparse["present"], sparse["action"])
    latent = model.latent(filtered.h, filtered.s_c).flatten(0, 1)
    return {
        "R2, camera alone": numbers["R2 of position from the latent state, camera alone"],
        "R2, 75 % missing": toy.r2(toy.linear(on_fit.latent[2], on_fit.truth)(latent), sparse["truth"].flatten(0, 1)),
        "R2, nearest expert means": mean_of("R2 of position by nearest"),
        "median rank of 2,500": mean_of("median rank"),
        "log(std camera / position)": mean_of("mean log"),
    }


def run(seed, way):
    """What one seed learns in one way."""
    seeds = toy.seeds(seed, count=4)
    train = toy.random_motion("toy", toy.TRAIN_EPISODES, RATE, seeds[0])
    fit, test = (toy.random_motion("toy", toy.TEST_EPISODES, 0.0, s) for s in seeds[1:3])
    sparse = toy.random_motion("toy", toy.TEST_EPISODES, 0.75, seeds[3])
    model = toy.learn("MuMMI", toy.Options(seed=seed, updates=toy.UPDATES["position_camera"]), train, **WAYS[way])
    return {"way": way, "seed": seed, **effects(model, fit, test, sparse)}


def start_worker():
    """One thread a process: the processes share the cores."""
    torch.set_num_threads(1)
    toy.keep_freed_memory()


def main():
    """Learn the toy world in every way with every seed; print the table and write it with all numbers."""
    rows = []
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), start_worker) as pool:
        for learnt in pool.map(run, *zip(*itertools.product(SEEDS, WAYS))):
            rows.append(learnt)
            print(learnt, file=sys.stderr)
    whats = list(rows[0])[2:]
    lines = ["| | " + " | ".join(whats) + " |", "|---" * (1 + len(whats)) + "|"]
    for way in WAYS:
        columns = [[row[what] for row in rows if row["way"] == way] for what in whats]
        lines.append(f"| {way} | " + " | ".join(f"{np.mean(x):.3g} ± {np.std(x):.2g}" for x in columns) + " |")
    folder = ROOT / "results" / "deviations"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "toy_world.json").write_text(json.dumps(rows, indent=1) + "\n")
    (folder / "toy_world.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
