"""The small settings on one and two threads, and with the loops compiled: `python results/benchmark/compiled.py`."""
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch

from tools.benchmark import SMALL, make


def median(agent, batch):
    """Seconds of an update, the median of 15 after three that warm up."""
    for _ in range(3):
        agent.update(batch)
    times = []
    for _ in range(15):
        start = time.perf_counter()
        agent.update(batch)
        times.append(time.perf_counter() - start)
    return f"{statistics.median(times):.3f} s ({min(times):.3f} to {max(times):.3f})"

for precision in ("float32", "bfloat16"):
    for threads in (1, 2):
        torch.set_num_threads(threads)
        print(precision, threads, "threads", median(*make(precision=precision, **SMALL)), flush=True)
torch.set_num_threads(1)
for precision in ("float32", "bfloat16"):
    for name in ("imagine", "observe"):
        agent, batch = make(precision=precision, **SMALL)
        owner = agent if name == "imagine" else agent.model
        setattr(owner, name, torch.compile(getattr(owner, name), dynamic=False))
        start = time.perf_counter()
        try:
            agent.update(batch)
            first = time.perf_counter() - start
            print(precision, "1 thread,", name, "compiled: first update", f"{first:.0f} s, then", median(agent, batch), flush=True)
        except Exception as error:
            print(precision, name, "compiled:", type(error).__name__, str(error).strip().splitlines()[0][:150], f"{time.perf_counter() - start:.0f} s", flush=True)
