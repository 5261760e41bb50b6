"""Does a model of Table Wiping imagine ends where there are none? Sequences of the random phase, filtered, then imagined.

`python results/table_wiping/earlier/imagined_ends.py RUN ...`: the share of 200 arms that still move after so many decisions.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from config import load_config
from methods import load_agent
from mssm import State

AHEAD = (1, 5, 10, 15)  # decisions
B = 200


@torch.no_grad()
def imagined(model, filtered, t, actions):
    """Shares after AHEAD decisions, imagined from step t of the sequences on with the actions (15, B, 6) that followed."""
    state, goes_on, shares = State(filtered.h[t], filtered.s_c[t]), torch.ones(B), []
    for action in actions:
        state = model.imagine_step(state, action)
        goes_on = goes_on * torch.sigmoid(model.continuation(model.latent(*state)))
        shares.append(goes_on.mean().item())
    return [shares[k - 1] for k in AHEAD]


if __name__ == "__main__":
    print("| run, steps of a training sequence | from step | 1 ahead | 5 | 10 | 15 |\n|---|---|---|---|---|---|")
    for run in sys.argv[1:]:
        config, model = load_config(run), load_agent(run).agent.model
        columns = {name: np.load(f"{run}/replay/{name}.npy", mmap_mode="r") for name in
                   ("workspace", "robot", "present", "action", "continues")}  # fmt: skip
        torch.manual_seed(0)
        rng, rows, length = np.random.default_rng(0), config.prefill // 2, 8
        going_on = np.array(columns["continues"][:rows])
        first = [i for i in rng.integers(rows - length - max(AHEAD), size=20 * B) if going_on[i : i + length].all()][:B]
        batch = {name: torch.tensor(x[np.array(first) + np.arange(length)[:, None]]) for name, x in columns.items()}
        with torch.no_grad():
            pictures = {name: batch[name] for name in ("workspace", "robot")}
            filtered = model.observe(pictures, batch["present"].bool(), batch["action"])
        for t in (1, length - 1):
            actions = torch.tensor(columns["action"][np.array(first) + t + 1 + np.arange(max(AHEAD))[:, None]])
            shares = " | ".join(f"{x:.3f}" for x in imagined(model, filtered, t, actions))
            print(f"| {Path(run).name}, {config.batch_length} | {t + 1} | {shares} |", flush=True)
        truth = [np.mean([going_on[i + length : i + length + k].all() for i in first]) for k in AHEAD]
        print(f"| {Path(run).name}, what happened in the random phase | {length} | "
              + " | ".join(f"{x:.3f}" for x in truth) + " |", flush=True)  # fmt: skip
