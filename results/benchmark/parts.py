"""What each part of fast.py gains on a CPU: `OMP_NUM_THREADS=1 python results/benchmark/parts.py > parts.txt`.

Updates of one agent, in turns with all parts and without one of them; seconds of CPU time, medians of 20 (5 at the paper's sizes).
"""

import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch

import fast
from tools.benchmark import SMALL, make

WITHOUT = {
    "nothing": (fast, "LOOP", fast.LOOP),
    "weight gradients once": (fast, "loop", lambda groups: nullcontext()),
    "absent steps left out": (fast, "present_rows", lambda networks, present: nullcontext()),
    "transposed convolutions in other forms": (fast.FastConvTranspose, "forward", torch.nn.ConvTranspose2d.forward),
}
SIZES = {"small": SMALL, "paper, 16 x 16": dict(batch_size=16, batch_length=16)}

torch.set_num_threads(1)
for sizes, options in SIZES.items():
    for method in ("mummi", "dreamer"):
        for precision in ("float32", "bfloat16"):
            agent, batch = make(method=method, precision=precision, **options)
            times = {part: [] for part in WITHOUT}
            for i in range(22 if sizes == "small" else 7):
                for part, (owner, name, other) in WITHOUT.items():
                    own = getattr(owner, name)
                    setattr(owner, name, other)
                    start = time.process_time()
                    agent.update(batch)
                    times[part] += [time.process_time() - start] if i >= 2 else []
                    setattr(owner, name, own)
            medians = {part: statistics.median(x) for part, x in times.items()}
            print(f"{sizes}, {method}, {precision}: {medians.pop('nothing'):.3f} s; without " + ", without ".join(
                f"{part} {x:.3f}" for part, x in medians.items()), flush=True)  # fmt: skip
