"""Train a run's model anew on its replay, alone, with other free nats, and measure it as `which_step.py` does.

`python results/table_wiping/earlier/free_nats.py RUN UPDATES NATS ...`
"""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from which_step import measure, open_batches

from checkpoint import load_checkpoint
from config import load_config
from methods import make_agent

if __name__ == "__main__":
    run, updates, *nats = sys.argv[1:]
    state = load_checkpoint(run)
    space = {name: SimpleNamespace(shape=tuple(shape)) for name, shape in state["modalities"].items()}
    for free_nats in map(float, nats):
        agent = make_agent(replace(load_config(run), free_nats=free_nats, device="cpu"), space, state["action_size"])
        batches, kl = open_batches(run), []
        for _ in range(int(updates)):
            kl.append(agent.update(batches.next(), behaviour=False)["kl"])
        print(f"KL {float(torch.stack(kl[-100:]).mean()):.2f}, mean of the last 100 updates", file=sys.stderr)
        measure(f"{Path(run).name}, {free_nats:g} free nats", int(updates), agent.model, open_batches(run))
