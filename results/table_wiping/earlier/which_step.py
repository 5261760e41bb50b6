"""Split the InfoNCE bound in two: in which episode of its batch an observation was made, and at which step of it.

`python results/table_wiping/earlier/which_step.py RUN ...`: Eq. (15) in nats, on batches drawn as in training from the run's
replay. log p(step) = log p(episode) + log p(step | episode), so that the bound is the sum of both parts.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from checkpoint import load_checkpoint
from config import load_config
from methods import load_agent
from mummi_loss import log_density_ratio, mutual_information
from replay import Batches, Replay

BATCHES = 20


@torch.no_grad()
def parts(model, batch):
    """{sensor: the bound, log N, the bound's part about the episode, that about the step, and the most it can be}."""
    present = batch["present"].bool()  # (T, B, M)
    filtered = model.observe(batch["observation"], present, batch["action"], first=batch.get("first"))
    g_z, told = model.g(model.latent(filtered.h, filtered.s_c)).flatten(0, 1), {}
    begins = batch["first"].long() if "first" in batch else torch.zeros(present.shape[:2], dtype=torch.long)
    episode = (begins.cumsum(0) + len(begins) * torch.arange(begins.shape[1])).flatten()  # (N,)
    same = episode[:, None] == episode  # (N, N)
    for m, sensor in enumerate(model.modalities):
        here = present[..., m].flatten()
        log_f = log_density_ratio(g_z, filtered.fused.expert_mean[:, :, m].flatten(0, 1))
        log_p = log_f.masked_fill(~here, -math.inf).log_softmax(-1)  # (N, N)
        of_episode = log_p.masked_fill(~same, -math.inf).logsumexp(-1)[here].mean()
        most = (same & here)[here].sum(-1).log().mean()  # nats about the step, if all were known
        bound, ceiling = mutual_information(log_p.diagonal(), here), here.sum().log()
        told[sensor] = [bound, ceiling, of_episode + ceiling - most, bound - of_episode - ceiling + most, most]
    return told


def open_batches(run):
    """Batches of a run's replay, from one seed, as its training draws them."""
    arrays = {path.stem: np.load(path, mmap_mode="r") for path in Path(run, "replay").glob("*.npy")}
    fields = {name: (x.shape[1:], x.dtype) for name, x in arrays.items() if name != "serial"}
    config = load_config(run)
    replay = Replay(Path(run, "replay"), fields, config.capacity)
    replay.load_state_dict(load_checkpoint(run)["replay"])
    return Batches(replay, config, np.random.default_rng(0), torch.device("cpu"))


def measure(name, updates, model, batches):
    """Print a row for each sensor: the means of `parts` over BATCHES batches."""
    torch.manual_seed(0)
    told = [parts(model, batches.next()) for _ in range(BATCHES)]
    for sensor in told[0]:
        means = " | ".join(f"{float(np.mean(x)):.2f}" for x in zip(*(batch[sensor] for batch in told)))
        print(f"| {name} | {updates:,} | {sensor} | {means} |", flush=True)


if __name__ == "__main__":
    print("| run | updates | sensor | bound | of | about the episode | about the step | of |")
    print("|---|---|---|---|---|---|---|---|")
    for run in sys.argv[1:]:
        measure(Path(run).name, load_checkpoint(run)["updates"], load_agent(run).agent.model, open_batches(run))
