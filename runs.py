"""The folder of a run: metrics, checkpoints, videos.

    log = Log(folder)                                  # metrics.jsonl and TensorBoard
    save_checkpoint(folder, agent, replay, rng, config, steps, updates)
    steps, updates = restore(folder, agent, replay, rng)
    write_video(folder / "video.mp4", seen)
"""

import json
import os
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

# ---- 1. Metrics ----------------------------------------------------------------------------------


class Log:
    """metrics.jsonl and TensorBoard."""

    def __init__(self, folder):
        from torch.utils.tensorboard import SummaryWriter

        self.file = open(folder / "metrics.jsonl", "a", buffering=1)
        self.board = SummaryWriter(folder)
        self.pending = defaultdict(list)
        self.latest = {}  # the last value of everything that was written

    def add(self, metrics):
        """Keep {name: ()} for the next `means`, without waiting for the GPU."""
        for name, value in metrics.items():
            self.pending[name].append(value)

    def means(self):
        """{name: float}, the means of all that was added since the last call."""
        means = {name: float(torch.stack(values).mean()) for name, values in self.pending.items()}
        self.pending.clear()
        return means

    def write(self, steps, values):
        """One line of {name: float} at an environment step."""
        self.file.write(json.dumps({"steps": steps, **values}) + "\n")
        self.latest.update(values)
        for name, value in values.items():
            self.board.add_scalar(name, value, steps)


# ---- 2. Checkpoints ------------------------------------------------------------------------------


def save_checkpoint(folder, agent, replay, rng, config, steps, updates):
    """Everything that `--resume` and `evaluate.py` need, written beside the old one and then renamed."""
    state = {
        "config": asdict(replace(config, resume="")), "steps": steps, "updates": updates, "agent": agent.state_dict(),
        "replay": replay.state_dict(), "rng": rng.bit_generator.state, "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all(),
    }  # fmt: skip
    replay.flush()
    with open(folder / "checkpoint.tmp", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(folder / "checkpoint.tmp", folder / "checkpoint.pt")


def restore(folder, agent, replay, rng):
    """Take up a run at its checkpoint. Returns the environment steps and updates it had done."""
    state = load_checkpoint(folder)
    agent.load_state_dict(state["agent"])
    replay.load_state_dict(state["replay"])
    rng.bit_generator.state = state["rng"]
    torch.set_rng_state(state["torch_rng"])
    torch.cuda.set_rng_state_all(state["cuda_rng"])
    return state["steps"], state["updates"]


def checkpoint_path(folder):
    """Where a run's checkpoint is. Raises ValueError if there is none."""
    path = Path(folder) / "checkpoint.pt"
    if not path.exists():
        raise ValueError(f"{path} is missing: give the folder of a run that has reached its first evaluation")
    return path


def load_checkpoint(folder):
    """The dictionary of `save_checkpoint`, on the CPU. Raises ValueError if there is none."""
    return torch.load(checkpoint_path(folder), map_location="cpu", weights_only=True)


# ---- 3. Videos -----------------------------------------------------------------------------------


def panel(name, x, present):
    """One modality as a picture (64, 64, 3) uint8: colour, depth in grey, a vector as bars, or a cross."""
    if not present:
        cross = np.eye(64, dtype=bool) | np.eye(64, dtype=bool)[::-1]
        return np.repeat(np.where(cross, 90, 0).astype(np.uint8)[..., None], 3, axis=-1)
    if x.dtype == np.uint8:
        return x
    if x.ndim == 3:  # metres: near is white, nothing within 10 m black
        grey = (255 * (1 - x / 10)).astype(np.uint8)
        return np.repeat(grey, 3, axis=-1)
    bars = np.full((64, 64, 3), 30, np.uint8)
    for i, value in enumerate(x / 8 if name == "touch" else x):  # touch: 8 is 3,000 newtons
        left, right = 64 * i // len(x) + 2, 64 * (i + 1) // len(x) - 2
        bars[63 - int(63 * np.clip(value, 0, 1)) :, left:right] = (90, 200, 120)
    return bars


def write_video(path, seen, fps=20):
    """What the first of the agents saw, one panel a modality, crossed out where missing, as an MP4.

    seen  one dictionary of (num_envs, ...) a step, from `run_episodes`
    """
    import av

    with av.open(str(path), "w") as container:
        stream = None
        for observation in seen:
            names = [name for name in observation if name != "present"]
            panels = [panel(name, observation[name][0], observation["present"][0, m]) for m, name in enumerate(names)]
            picture = np.concatenate(panels, 1).repeat(4, 0).repeat(4, 1)
            if stream is None:
                stream = container.add_stream("libx264", rate=fps, pix_fmt="yuv420p")
                stream.height, stream.width = picture.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
