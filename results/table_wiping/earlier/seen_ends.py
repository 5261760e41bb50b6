"""Does a model see where an episode ends? Its probability that the episode goes on, at ends and at other steps.

`python results/table_wiping/earlier/seen_ends.py RUN ...`: the medians over steps of the replay's last 6,000, with the 25
decisions that led to them. `seen`: all were observed. `1 ahead`: the last one was imagined, with the action that was
taken.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from which_step import open_batches

from methods import load_agent
from mssm import State

LENGTH = 25  # decisions that lead to a step
AHEAD = (1, 5, 10)  # of them imagined
ROWS, MOST = 6000, 300


@torch.no_grad()
def goes_on(model, columns, steps):
    """The median probabilities at `steps` (N,), filtered and imagined 1, 5 and 10 decisions ahead: [4 floats]."""
    rows = steps + np.arange(1 - LENGTH, 1)[:, None]  # (T, N)
    pictures = {name: torch.tensor(columns[name][rows]) for name in model.modalities}
    action = torch.tensor(columns["action"][rows])
    filtered = model.observe(pictures, torch.tensor(columns["present"][rows]).bool(), action)
    told = []
    for ahead in (0, *AHEAD):
        state = State(filtered.h[-1 - ahead], filtered.s_c[-1 - ahead])
        for a in action[LENGTH - ahead :]:
            state = model.imagine_step(state, a)
        told.append(torch.sigmoid(model.continuation(model.latent(*state))).median().item())
    return told


if __name__ == "__main__":
    print("| run | steps | seen | 1 ahead | 5 | 10 |\n|---|---|---|---|---|---|")
    for run in sys.argv[1:]:
        model, replay = load_agent(run).agent.model, open_batches(run).replay
        names = *model.modalities, "present", "action", "continues", "first"
        columns = {name: replay.rows_of(name)[-ROWS:] for name in names}
        torch.manual_seed(0)
        begins = np.lib.stride_tricks.sliding_window_view(columns["first"], LENGTH)[:, 1:].any(1)
        whole = np.flatnonzero(~begins) + LENGTH - 1  # steps whose sequence lies in one episode
        end = columns["continues"][whole] == 0
        for name, steps in (("ends", whole[end]), ("others", whole[~end])):
            steps = np.random.default_rng(0).permutation(steps)[:MOST]
            medians = " | ".join(f"{x:.3f}" for x in goes_on(model, columns, steps))
            print(f"| {Path(run).name} | {len(steps)} {name} | {medians} |", flush=True)
