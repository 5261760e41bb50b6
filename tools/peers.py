"""An update of one code base in a process of its own; started by `python -m tools.benchmark peers`.

    python tools/peers.py r2dreamer PATH 50 2        # T = B = 50, two threads: one update, and one for each line read
    python tools/peers.py mummi float32 PATH 50 2

For each update it prints the milliseconds, and the peak of its memory in GB. Other code runs unchanged from its
checkout, at its own defaults, with one camera of 64 x 64 and two actions; ours with three sensors. Two choices favour
the others: dreamer-pytorch's anomaly detection of autograd, which it leaves on, is off; r2dreamer on a CPU runs
without torch.compile and in float32, as its float16 is made for GPUs and slower there.

dreamer-pytorch needs rlpyt (`pip install git+https://github.com/astooke/rlpyt psutil pyprind`); r2dreamer needs
`pip install tensordict hydra-core`. Both run on the torch of requirements.txt.
"""

import os
import resource
import sys
import time
from types import SimpleNamespace

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def mummi(size, precision):
    """Ours, as fast as it is."""
    from tools.benchmark import make

    agent, batch = make(batch_size=size, batch_length=size, precision=precision)
    return lambda: agent.update(batch)


def dreamer_pytorch(size):
    """`Dreamer.optimize_agent` with a replay buffer that holds one batch."""
    from dreamer.algos.dreamer_algo import Dreamer
    from dreamer.models.agent import AtariDreamerModel
    from rlpyt.replays.sequence.n_step import SamplesFromReplay

    torch.autograd.set_detect_anomaly(False)
    algo = Dreamer(size, size, train_every=1, train_steps=1, prefill=0, log_video=False)
    model = AtariDreamerModel(action_shape=2, output_size=2, action_dist="tanh_normal").to(DEVICE)
    algo.agent = SimpleNamespace(model=model, device=DEVICE)
    algo.optim_initialize()
    image, no = torch.randint(256, (size + 1, size, 3, 64, 64), dtype=torch.uint8), torch.zeros(size, size).bool()
    action, reward = torch.rand(size + 1, size, 2) * 2 - 1, torch.rand(size + 1, size)
    batch = SamplesFromReplay(image, action, reward, return_=reward, done=no, done_n=no, init_rnn_state=None)
    algo.replay_buffer = SimpleNamespace(sample_batch=lambda *_: batch)
    return lambda: algo.optimize_agent(itr=0)


def r2dreamer(size):
    """`Dreamer.update` with a replay buffer that holds one batch."""
    import dreamer
    from hydra import compose, initialize_config_dir
    from tensordict import TensorDict

    torch.set_float32_matmul_precision("high")  # as its train.py has it
    gpu = DEVICE.type == "cuda"
    with initialize_config_dir(f"{os.path.dirname(dreamer.__file__)}/configs", version_base=None):
        config = compose("configs", [f"device={DEVICE}", f"model.compile={gpu}"])
    if not gpu:
        dreamer.autocast = lambda **_: torch.autocast("cpu", enabled=False)
    box = lambda *shape: SimpleNamespace(shape=shape)  # noqa: E731
    agent = dreamer.Dreamer(config.model, SimpleNamespace(spaces={"image": box(64, 64, 3)}), box(2)).to(DEVICE)
    image, no = torch.randint(256, (size, size, 64, 64, 3), dtype=torch.uint8), torch.zeros(size, size).bool()
    batch = {"image": image, "action": torch.rand(size, size, 2) * 2 - 1, "reward": torch.rand(size, size, 1),
             "is_first": no, "is_last": no.unsqueeze(-1), "is_terminal": no.unsqueeze(-1)}  # fmt: skip
    batch = TensorDict(batch, (size, size)).to(DEVICE)
    start = agent.rssm.initial(size)
    buffer = SimpleNamespace(sample=lambda: (batch.copy(), None, start), update=lambda *_: None)
    return lambda: agent.update(buffer)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # they print
    name, *precision, path, size, threads = sys.argv[1:]
    sys.path[0] = path
    torch.set_num_threads(int(threads))
    builders: dict = {"mummi": mummi, "dreamer-pytorch": dreamer_pytorch, "r2dreamer": r2dreamer}
    update = builders[name](int(size), *precision)
    while True:
        start = time.perf_counter()
        update()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        took, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"{1e3 * took:.1f} {peak / 1e6:.2f}", file=answers)
        if not sys.stdin.readline():
            break
