"""The folder of a run: configuration, metrics, checkpoints; and what may cut a run short.

Whatever is written is whole: a file appears under its name only once it is on disk. A run that is killed
at any moment goes on from its last checkpoint.

    create_folder(folder, config)
    with closing(Log(folder)) as log, StopSignals() as stop:  # metrics.jsonl and TensorBoard
        progress = restore(folder, agent, replay, rng, log)
        stop.check()                                          # raises Stopped after SIGTERM or Ctrl-C
        save_checkpoint(folder, agent, replay, rng, log, config, progress)
"""

import fcntl
import io
import json
import math
import os
import pickle
import signal
import struct
import sys
import threading
import zipfile
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from envs import WorkerError


@dataclass
class Progress:
    """How far a run is."""

    steps: int = 0  # environment steps
    updates: int = 0
    evaluated: int = 0  # environment steps at the last evaluation


# ---- 1. Faults -----------------------------------------------------------------------------------


class Fault(Exception):
    """Something that is no bug ended the run; one line says what."""


class Stopped(Fault):
    """A signal asked the run to end."""

    def __init__(self, number):
        super().__init__(f"stopped by {signal.Signals(number).name}; go on with --resume")
        self.number = number


class StopSignals:
    """Within it SIGTERM and Ctrl-C wait for the next `check`, which raises Stopped; a second Ctrl-C does not wait."""

    def __enter__(self):
        self.received = None
        self.before = {number: signal.signal(number, self.receive) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number, _):
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        os.write(2, b"\nstopping: the update in hand, then a checkpoint\n")  # print is not safe in a handler

    def check(self):
        if self.received:
            raise Stopped(self.received)


def explain(error):
    """One line and an exit code for what is no bug; None for anything else."""
    line = " ".join(str(error).split())
    if isinstance(error, Stopped):
        return line, 128 + error.number
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, Fault | WorkerError):
        return line, 1
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in line:
        return f"out of memory: lower --batch-size, --batch-length or --num-envs, or the sizes of the model ({line})", 1
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or line}; the last checkpoint is untouched: go on with --resume", 1
    if isinstance(error, RuntimeError) and "loading state_dict" in line:
        return f"the checkpoint does not fit its configuration: {line}", 2
    if isinstance(error, torch.AcceleratorError) or "CUDA error" in line:
        return f"the GPU failed; the last checkpoint is untouched: go on with --resume ({line[:200]})", 1
    return (line, 2) if isinstance(error, ValueError) else None


def fail(program, error):
    """One line on stderr and an exit code for what is no bug; a bug is raised again, with its traceback."""
    known = explain(error)
    if known is None:
        raise error
    print(f"{program}: {known[0]}", file=sys.stderr)
    sys.exit(known[1])


# ---- 2. Files ------------------------------------------------------------------------------------


def write_all(file, data):
    """Bytes at the end of an unbuffered file; a nearly full disk takes a part before it refuses."""
    data = memoryview(data)
    while data:
        data = data[os.write(file.fileno(), data) :]


def write_file(path, data):
    """Bytes in a file that is whole and on disk before it takes the place of an older one."""
    fresh = path.with_name(path.name + ".tmp")
    try:
        with open(fresh, "wb", buffering=0) as file:
            write_all(file, data)
            os.fsync(file.fileno())
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
    os.replace(fresh, path)
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)  # the new name, too
    os.close(directory)


def write_config(folder, config):
    """config.json, in strict JSON: what is not finite is written as a string, like "-inf"."""
    values = asdict(replace(config, resume=""))
    values = {name: str(x) if isinstance(x, float) and not math.isfinite(x) else x for name, x in values.items()}
    write_file(folder / "config.json", (json.dumps(values, indent=2, allow_nan=False) + "\n").encode())


def create_folder(folder, config):
    """A new run's folder, which appears with its configuration in it. Raises ValueError if there is one."""
    fresh = folder.with_name(folder.name + ".tmp")
    fresh.mkdir(parents=True, exist_ok=True)
    write_config(fresh, config)
    try:
        os.rename(fresh, folder)
    except OSError as error:
        raise ValueError(f"{folder} exists already: give another --name, or go on with --resume {folder}") from error


# ---- 3. Metrics ----------------------------------------------------------------------------------


def quiet(arguments):
    """TensorBoard's thread need not say that the disk is full: `add_scalar` says it again."""
    if not issubclass(arguments.exc_type, OSError):
        threading.__excepthook__(arguments)


SHOWN = ("train_return", "model_loss", "actor_loss", "critic_loss")  # by the progress bar


class Log:
    """metrics.jsonl, TensorBoard and a progress bar of `total` environment steps.

    Raises ValueError while another process has the run open.
    """

    def __init__(self, folder, total):
        self.folder, self.board, self.purge_step = folder, None, None
        self.file = open(folder / "metrics.jsonl", "ab", buffering=0)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.file.close()
            raise ValueError(f"{folder} is in use by another process: wait until it ends, or stop it") from error
        except OSError:
            pass  # a file system without locks
        self.pending = defaultdict(list)
        self.batch = None  # the last one
        self.latest = {}  # the last value of what the bar shows
        self.bar = tqdm(total=total, unit="step", smoothing=0.05)

    def add(self, metrics, batch):
        """Keep {name: ()} for the next `means`, without waiting for the GPU."""
        self.batch = batch
        for name, value in metrics.items():
            self.pending[name].append(value)

    def means(self):
        """{name: float}, the means of all that was added since the last call."""
        means = self.finite()
        self.pending.clear()
        return means

    def finite(self):
        """What `means` returns. Raises Fault where a loss or a gradient is not finite."""
        means = {name: float(torch.stack(values).mean()) for name, values in self.pending.items()}
        if all(math.isfinite(value) for name, value in means.items() if name.endswith(("_loss", "_norm"))):
            return means
        age, names = self.first_fault() or (0, ["their sum"])
        torch.save(self.batch, self.folder / "batch.pt")
        raise Fault(f"not finite, {age} updates ago: {', '.join(names)}; the batch of the last update is in "
                    f"{self.folder}/batch.pt; --resume goes on from the checkpoint, with --log-every 1 it stops "
                    "at the very batch")  # fmt: skip

    def first_fault(self):
        """How many updates ago something was first not finite, and its names; None if only a sum is not."""
        count = len(next(iter(self.pending.values())))
        for i in range(count):
            names = [name for name, values in self.pending.items() if not math.isfinite(values[i])]
            if names:
                return count - 1 - i, names
        return None

    def write(self, steps, values):
        """One line of {name: int or float} at an environment step."""
        strict = {name: x if math.isfinite(x) else None for name, x in values.items()}
        end = os.fstat(self.file.fileno()).st_size
        try:
            write_all(self.file, (json.dumps({"steps": steps, **strict}) + "\n").encode())
        except OSError:
            self.file.truncate(end)  # no half line
            raise
        if self.board is None:
            from torch.utils.tensorboard import SummaryWriter

            threading.excepthook = quiet
            self.board = SummaryWriter(self.folder, purge_step=self.purge_step)
        self.latest |= {name: strict[name] for name in SHOWN if name in strict}
        for name, value in values.items():
            self.board.add_scalar(name, value, steps)

    def show_pictures(self, steps, pictures, video):
        """In TensorBoard: {name: (height, width, 3) uint8}, and a GIF's bytes, which it plays."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        for name, picture in pictures.items():
            self.board.add_image(name, picture, steps, dataformats="HWC")
        width, height = struct.unpack("<HH", video[6:10])
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=video)
        self.board._get_file_writer().add_summary(Summary(value=[Summary.Value(tag="video", image=image)]), steps)

    def show(self, steps):
        """Move the bar."""
        self.bar.set_postfix(self.latest, refresh=False)
        self.bar.update(steps - self.bar.n)

    def state_dict(self):
        """Where the file ends, and what waits for the next line."""
        self.finite()
        os.fsync(self.file.fileno())
        pending = {name: torch.stack(values).cpu() for name, values in self.pending.items()}
        return {"bytes": os.fstat(self.file.fileno()).st_size, "pending": pending}

    def load_state_dict(self, state, steps, device):
        """Forget what was written after environment step `steps`, also in TensorBoard."""
        self.pending = defaultdict(list, {name: list(x.to(device)) for name, x in state["pending"].items()})
        self.file.truncate(min(state["bytes"], os.fstat(self.file.fileno()).st_size))
        self.purge_step = steps + 1
        self.bar.n = self.bar.initial = max(steps, 0)

    def close(self):
        self.bar.close()
        self.file.close()
        if self.board is not None:
            self.board.close()


# ---- 4. Checkpoints ------------------------------------------------------------------------------


def save_checkpoint(folder, agent, replay, rng, log, config, progress):
    """Everything that `--resume` and `evaluate.py` need; the checkpoint before it is kept as well."""
    state = {
        "config": asdict(replace(config, resume="")), **asdict(progress), "agent": agent.state_dict(),
        "replay": replay.state_dict(), "log": log.state_dict(), "rng": rng.bit_generator.state,
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if agent.device.type == "cuda" else [],
    }  # fmt: skip
    data = io.BytesIO()  # torch itself is not safe on a full disk
    torch.save(state, data)
    replay.flush()
    path = folder / "checkpoint.pt"
    write_file(folder / "checkpoint.new.pt", data.getbuffer())
    if path.exists():
        os.replace(path, folder / "checkpoint.previous.pt")
    os.replace(folder / "checkpoint.new.pt", path)


def restore(folder, agent, replay, rng, log):
    """Take up a run at its last intact checkpoint, or at its beginning if it has none. Returns its Progress."""
    path, state = newest_checkpoint(folder)
    if path is None:
        log.load_state_dict({"bytes": 0, "pending": {}}, -1, agent.device)
        return Progress()
    agent.load_state_dict(state["agent"])
    lost = replay.load_state_dict(state["replay"])
    if lost:
        print(f"{lost} episodes of {path} are gone: going on without them", file=sys.stderr)
    if "log" in state:
        log.load_state_dict(state["log"], state["steps"], agent.device)
    rng.bit_generator.state = state["rng"]
    torch.set_rng_state(state["torch_rng"])
    for device, value in enumerate(state["cuda_rng"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(value, device)
    if path.name != "checkpoint.pt":
        os.replace(path, folder / "checkpoint.pt")  # the next one must not push out the intact one
    return Progress(state["steps"], state["updates"], state.get("evaluated", state["steps"]))


def newest_checkpoint(folder):
    """The last checkpoint's path and what it holds; of the one before, if it is damaged. None, None if there are none.

    Raises ValueError if there are only damaged ones.
    """
    damaged = []
    for path in (Path(folder) / "checkpoint.pt", Path(folder) / "checkpoint.previous.pt"):
        if path.exists():
            try:
                state = read_checkpoint(path)
            except ValueError as error:
                damaged.append(str(error))
                continue
            for line in damaged:
                print(f"{line}: taking {path}", file=sys.stderr)
            return path, state
    if damaged:
        raise ValueError(f"{'; '.join(damaged)}: put back a copy of a checkpoint, or start a new run")
    return None, None


def read_checkpoint(path):
    """The dictionary of `save_checkpoint`, on the CPU. Runs no code, whatever the file holds.

    Raises ValueError where the file is damaged: every tensor is compared with its checksum.
    """
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
        if damaged is None:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if {"config", "steps", "updates", "agent", "replay"} <= set(state):
                return state
        reason = f"checksum of {damaged}" if damaged else "not a checkpoint of this program"
    except pickle.UnpicklingError:
        reason = "holds more than tensors and numbers, and is not opened"
    except Exception as error:  # a damaged file raises whatever it likes
        reason = " ".join(str(error).split())[:100]
    raise ValueError(f"{path} is damaged ({reason})")


def load_checkpoint(folder):
    """The last intact checkpoint of a run. Raises ValueError if there is none."""
    path, state = newest_checkpoint(folder)
    if path is None:
        raise ValueError(f"{Path(folder) / 'checkpoint.pt'} is missing: give the folder of a run that has reached its "
                         "first evaluation")  # fmt: skip
    return state
