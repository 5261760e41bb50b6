"""What the deviations from the paper change, on the toy world: an hour on two CPU cores.

MuMMI learns from random motion seen by a position sensor and a camera, 37.5 % missing: once as it is, and once with
the alternative of each deviation; three seeds, a process a core. It is measured on motion that it has not seen. Writes
<output>.md, a row per alternative, and .json, a record per seed.

    python -m tools.deviations                                            # into runs/deviations
    python -m tools.deviations --output results/deviations/toy_world      # as published
"""

import itertools
import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch

import tools
from checkpoint import say
from envs import seeds
from tools import toy

WAYS: dict[str, dict] = {  # alternative: the change of the configuration
    "default": {},
    "D1: experts weigh 1/std": {"expert_power": 1},
    "D2: mean of s^f, no sample": {"sample_s_f": False},
    "D3: nothing present: s^f = 0": {"prior_if_unobserved": False},
    "D4: absent logit -100": {"absent_logit": -100.0},
    "D5: mean over all rows": {"over_present": False},
    "D6: KL of s^f": {"fused_kl_scale": 1.0},
}
WAYS["D1 + D2 + D3 + D4 + D5: as released"] = {k: x for way in list(WAYS)[1:6] for k, x in WAYS[way].items()}
SEEDS = (1, 2, 3)
RATE = 0.375  # of each sensor's data, missing in training


@torch.no_grad()
def effects(model, fit, test, sparse):
    """{name: number} on held-out motion; `sparse` has 75 % missing."""
    on_fit, spaces = toy.perceive(model, fit), toy.perceive(model, test)
    numbers = toy.measure(list(model.modalities), on_fit, spaces)
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


def learn(seed, way):
    """Train one seed in one way, on one thread, as the processes share the cores; return what it has learnt."""
    torch.set_num_threads(1)
    motions = zip((toy.TRAIN_EPISODES, *[toy.TEST_EPISODES] * 3), (RATE, 0.0, 0.0, 0.75), seeds(seed, count=4))
    train, *held_out = (toy.random_motion("toy", *motion) for motion in motions)
    model = toy.learn("MuMMI", toy.Options(seed=seed, updates=toy.UPDATES["position_camera"]), train, **WAYS[way])
    return {"way": way, "seed": seed, **effects(model, *held_out)}


def main(output: str = "runs/deviations"):
    """Learn the toy world in every way with every seed; write the table and all numbers."""
    markdown, report = tools.output_files(output, ".md", ".json")
    rows = []
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for row in pool.map(learn, *zip(*itertools.product(SEEDS, WAYS))):
            rows.append(row)
            report.write_text(json.dumps(rows, indent=1) + "\n")
            say(f"{row}")
    names = list(rows[0])[2:]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for way in WAYS:
        columns = [[row[name] for row in rows if row["way"] == way] for name in names]
        lines.append(f"| {way} | " + " | ".join(f"{np.mean(x):.3g} ± {np.std(x):.2g}" for x in columns) + " |")
    markdown.write_text("\n".join(lines) + "\n")
    say("\n".join(lines))
    say(f"{markdown}, {report}: {len(rows)} models; docs/paper.md says what each way is")


if __name__ == "__main__":
    tools.run("deviations", main, __doc__)
