"""An update of two checkouts of this code, alternating in one process: how much faster did it become?

    git worktree add ../old c308a48
    python results/benchmark/ab.py ../old . small 1 [float32 | bfloat16]     # small, 16 or 50; threads

The old one computes in float32. Prints one line of JSON: seconds, medians of five, and their ratio.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.update(OMP_WAIT_POLICY="passive", GOMP_SPINCOUNT="1000")

import gymnasium
import numpy as np
import torch

SMALL = dict(batch_size=16, batch_length=25, channels=8, d_f=128, d_h=128, hidden=128, units=128, horizon=15)
SIZES = {"small": SMALL, "16": dict(batch_size=16, batch_length=16), "50": dict(batch_size=50, batch_length=50)}
REPEATS = {"small": 5, "16": 3, "50": 1}
BOXES = {
    "rgb": gymnasium.spaces.Box(0, 255, (64, 64, 3), np.uint8),
    "depth": gymnasium.spaces.Box(0, 10, (64, 64, 1), np.float32), "touch": gymnasium.spaces.Box(0, 20, (2,)),
    "present": gymnasium.spaces.MultiBinary(3),
}  # fmt: skip


def load(root, **options):
    """The agent that the code in a folder makes, and the precision of products that it chose."""
    root = str(Path(root).resolve())
    sys.path.insert(0, root)
    import config

    try:
        from methods import make_agent
    except ImportError:
        from train import make_agent
    agent = make_agent(config.Config(device="cpu", **options), gymnasium.spaces.Dict(list(BOXES.items())), 2)
    sys.path.remove(root)
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(root + "/"):
            del sys.modules[name]
    return agent, torch.get_float32_matmul_precision()


def main(old, new, kind, threads, precision="float32"):
    """Time both and print the line; the arguments are those of the command line."""
    torch.set_num_threads(int(threads))
    size = SIZES[kind]
    sides = [load(old, **size), load(new, **size, precision=precision)]
    steps, torch_rng = (size["batch_length"], size["batch_size"]), torch.Generator().manual_seed(0)
    present = torch.rand(*steps, 3, generator=torch_rng) > 0.375
    x = {
        "rgb": torch.randint(0, 256, (*steps, 64, 64, 3), dtype=torch.uint8, generator=torch_rng),
        "depth": (10 * torch.rand(*steps, 64, 64, 1, generator=torch_rng)).half(),
        "touch": torch.rand(*steps, 2, generator=torch_rng),
    }
    x = {name: v * present[..., m].view(*steps, *[1] * (v.ndim - 2)).to(v.dtype) for m, (name, v) in enumerate(x.items())}
    batch = {"observation": x, "present": present, "action": torch.rand(*steps, 2) * 2 - 1, "reward": torch.rand(*steps)}

    def seconds(agent, product):
        torch.set_float32_matmul_precision(product)
        start = time.perf_counter()
        for _ in range(REPEATS[kind]):
            agent.update(batch)
        return (time.perf_counter() - start) / REPEATS[kind]

    times = [[seconds(*side) for side in sides] for _ in range(6)][1:]  # the first warms up
    was, now = (statistics.median(column) for column in zip(*times))
    what = {"sizes": kind, "threads": int(threads), "precision": precision, "cpu": torch.cpu.get_capabilities()["cpu_name"]}
    print(json.dumps(what | {"old": round(was, 4), "new": round(now, 4), "ratio": round(now / was, 3)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
