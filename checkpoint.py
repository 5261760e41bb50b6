"""The folder of a run: configuration, metrics, checkpoints; and what may interrupt a run.

A checkpoint appears under its name only once it is whole and on disk. A run that is killed at any moment goes on
from its last one. If a message cannot be printed, only the message is lost.

    create_folder(folder, config)
    with closing(Log(folder, total)) as log, StopSignals(folder) as stop:  # metrics.jsonl and TensorBoard
        progress = restore(folder, agent, replay, rng, log)
        stop.check()                                  # raises Stopped after SIGTERM, Ctrl-C or a hang-up
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
import time
import zipfile
from collections import defaultdict
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from backgrounds import fingerprint
from envs import WorkerError
from trust import measure


@dataclass
class Progress:
    """How far a run is."""

    steps: int = 0  # environment steps
    updates: int = 0
    evaluated: int = 0  # environment steps at the last evaluation


# ---- 1. Messages and faults ----------------------------------------------------------------------


def say(text, file=None):
    """Print a line, above the progress bar if there is one. Never raises: a closed or ASCII output costs no work."""
    file = file or sys.stdout
    try:
        encoding = file.encoding or "utf-8"
        tqdm.write(text.encode(encoding, "replace").decode(encoding), file=file)
        file.flush()
    except (OSError, ValueError, AttributeError):  # nobody reads it, or it is closed
        mute(file)


def mute(file):
    """Redirect a file that nobody reads to /dev/null, so that flushing it does not fail when Python exits."""
    with suppress(OSError, ValueError, AttributeError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), file.fileno())


class Fault(Exception):
    """An expected failure, reported in one line."""


class Stopped(Fault):
    """A signal asked the run to end."""

    def __init__(self, number, folder=""):
        super().__init__(f"stopped by {signal.Signals(number).name}; go on with --resume {folder}".rstrip())
        self.number = number


class StopSignals:
    """Inside it SIGTERM, SIGHUP and Ctrl-C make the next `check` raise Stopped; a second Ctrl-C ends at once.

    folder  of the run, for the message
    """

    def __init__(self, folder=""):
        self.folder, self.received = folder, None

    def __enter__(self):
        numbers = [n for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self.receive) for number in numbers}  # nohup ignores SIGHUP
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number, _):
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        with suppress(OSError):  # print is not safe in a handler
            os.write(2, b"\nstopping: this update, then a checkpoint\n")

    def check(self):
        if self.received:
            raise Stopped(self.received, self.folder)


def explain(error):
    """One line and an exit code for an expected failure; None for a bug."""
    line = " ".join(str(error).split())
    if isinstance(error, Stopped):
        return line, 128 + error.number
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, Fault | WorkerError):
        return line, 1
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in line:
        return f"out of memory: if it is so again, start anew with a smaller batch, model or --num-envs ({line})", 1
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or line}; what was saved before is untouched", 1
    if isinstance(error, RuntimeError) and "loading state_dict" in line:
        return f"the checkpoint does not fit its configuration, or is of an older version: {line[:200]}", 2
    if isinstance(error, torch.AcceleratorError) or "CUDA error" in line:
        return f"the GPU failed; what was saved before is untouched ({line[:200]})", 1
    return (line, 2) if isinstance(error, ValueError) else None


def fail(program, error):
    """One line on stderr and an exit code for an expected failure; a bug is raised again, with its traceback."""
    if (known := explain(error)) is None:
        raise error
    advice = "; if the run is there, go on with --resume" if known[1] == 1 and program == "train.py" else ""
    say(f"{program}: {known[0]}{advice}", sys.stderr)
    sys.exit(known[1])


# ---- 2. Files ------------------------------------------------------------------------------------


def write_all(file, data):
    """Append bytes to an unbuffered file; a nearly full disk may take only part of them at once."""
    data = memoryview(data)
    while data:
        data = data[os.write(file.fileno(), data) :]


def write_file(path, data):
    """Write a file atomically: it is on disk before it replaces an older one."""
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


def write_tensors(path, values):
    """torch.save by way of `write_file`, which is safe on a full disk."""
    data = io.BytesIO()
    torch.save(values, data)
    write_file(path, data.getbuffer())


def write_config(folder, config):
    """config.json, in strict JSON: what is not finite is written as a string, like "-inf"."""
    values = asdict(replace(config, resume=""))
    values = {name: str(x) if isinstance(x, float) and not math.isfinite(x) else x for name, x in values.items()}
    write_file(folder / "config.json", (json.dumps(values, indent=2, allow_nan=False) + "\n").encode())


def open_locked(path):
    """A file to append to, locked if its file system has locks. Raises ValueError while another process has it."""
    file = open(path, "ab", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise ValueError(f"{path.parent} is in use by another process: wait until it ends, or stop it") from error
    except OSError:
        pass
    return file


def create_folder(folder, config):
    """A new run's folder, which appears with its configuration in it. Raises ValueError if there is one."""
    fresh, source = folder.with_name("." + folder.name), config.backgrounds  # no run has such a name
    fresh.mkdir(parents=True, exist_ok=True)
    write_config(fresh, config)
    write_file(fresh / "backgrounds.json", json.dumps({"path": source, "fingerprint": fingerprint(source)}).encode())
    try:
        os.rename(fresh, folder)
    except OSError as error:
        raise ValueError(f"{folder} exists already: give another --name, or go on with --resume {folder}") from error


def check_backgrounds(folder, source):
    """Raises ValueError if a run has seen other backgrounds than these, wherever they lie."""
    path = Path(folder) / "backgrounds.json"
    if fingerprint(source) != (json.loads(path.read_text())["fingerprint"] if path.exists() else "procedural"):
        raise ValueError(f"backgrounds {source} hold other clips than those of {folder}: give their path or start anew")


# ---- 3. Metrics ----------------------------------------------------------------------------------


def quiet(arguments):
    """TensorBoard's thread need not say that the disk is full: `add_scalar` says it again."""
    if not issubclass(arguments.exc_type, OSError):
        threading.__excepthook__(arguments)


GROUPS = {  # of TensorBoard's scalars, by what their names begin with
    "return": ("train_return", "eval_"), "behaviour": ("actor", "critic", "imagined", "earned", "saturated", "action"),
    "sensors": ("information", "reconstruction"), "speed": ("updates",), "model": ("",),
}  # fmt: skip


class Log:
    """metrics.jsonl, TensorBoard and a progress bar of `total` environment steps.

    Raises ValueError while another process has the run open.
    """

    def __init__(self, folder, total):
        self.folder, self.board, self.purge_step = folder, None, None
        self.file = open_locked(folder / "metrics.jsonl")
        self.pending = defaultdict(list)
        self.batch = None  # the last one
        self.learnt = None  # (time, steps) of the first learnt step
        self.imagined = math.nan  # the newest imagined return
        self.bar = tqdm(total=total, unit="step", smoothing=0.05, ncols=80, file=sys.stderr or open(os.devnull, "w"))

    def add(self, metrics, batch):
        """Keep {name: ()} for the next `means`, without waiting for the GPU."""
        self.batch = batch
        for name, value in metrics.items():
            self.pending[name].append(value)

    def means(self):
        """{name: float}, the means of all that was added since the last call."""
        means = self.finite()
        self.pending.clear()
        if "reward_variance" in means:  # of all updates together: a batch without rewards has no variance of its own
            means["reward_error"] = means["reward_square_error"] / max(means["reward_variance"], 1e-12)
        return means

    def finite(self):
        """What `means` returns. Raises Fault where a loss or a gradient is not finite."""
        means = {name: float(torch.stack(values).mean()) for name, values in self.pending.items()}
        if all(math.isfinite(value) for name, value in means.items() if name.endswith(("_loss", "_norm"))):
            return means
        pending = [(age, name, x) for name, values in self.pending.items() for age, x in enumerate(reversed(values))]
        faults = [(age, name) for age, name, x in pending if not math.isfinite(x)] or [(0, "their sum")]
        first = max(faults)[0]
        write_tensors(self.folder / "batch.pt", self.batch)
        raise Fault(f"not finite, {first} updates ago: {', '.join(n for age, n in faults if age == first)}; the last "
                    f"batch is in {self.folder}/batch.pt; --resume goes on from the checkpoint, and --log-every 1 "
                    "stops at the faulty batch")  # fmt: skip

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
        self.imagined = values.get("imagined_return", self.imagined)
        if "train_return" in values:
            self.show(steps, f"return {values['train_return']:.4g}")
        if self.learnt:
            began, first = self.learnt
            speed = (steps - first) / max(time.monotonic() - began, 1e-9)
            self.board.add_scalar("speed/steps_per_second", speed, steps)
        for name, value in values.items():
            group = next(group for group, starts in GROUPS.items() if name.startswith(starts))
            self.board.add_scalar(f"{group}/{name}", value, steps)

    def show_pictures(self, steps, pictures, video):
        """In TensorBoard: {name: (height, width, 3) uint8}, and a GIF's bytes, which it plays."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        for name, picture in pictures.items():
            self.board.add_image(name, picture, steps, dataformats="HWC")
        width, height = struct.unpack("<HH", video[6:10])
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=video)
        self.board._get_file_writer().add_summary(Summary(value=[Summary.Value(tag="video", image=image)]), steps)

    def show(self, steps, text=None):
        """Move the bar; its rate counts from the first learnt step."""
        try:
            if text is not None:
                self.bar.set_postfix_str(text, refresh=steps == self.bar.n)
            self.bar.total = max(self.bar.total, steps)  # whole episodes may lead past the end
            self.bar.update(steps - self.bar.n)
        except (OSError, ValueError):  # nobody reads it
            self.bar.disable = True
            mute(sys.stderr)

    def learning(self, steps):
        """Say that learning begins at this step. Call it at every update."""
        if self.learnt is None:
            self.learnt = time.monotonic(), steps
            self.bar.initial, self.bar.start_t = self.bar.n, self.bar._time()
            self.bar.last_print_t = self.bar.start_t

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
        with suppress(OSError, ValueError):
            self.bar.close()
        self.file.close()
        if self.board is not None:
            self.board.close()


# ---- 4. Checkpoints ------------------------------------------------------------------------------


def save_checkpoint(folder, agent, replay, rng, log, config, progress):
    """Everything that `--resume` and `evaluate.py` need; the checkpoint before it is kept as well."""
    state = {
        "config": asdict(replace(config, resume="")), **asdict(progress), "agent": agent.state_dict(),
        "modalities": agent.model.modalities, "action_size": agent.action_size,
        "replay": replay.state_dict(), "log": log.state_dict(), "rng": rng.bit_generator.state,
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if agent.device.type == "cuda" else [],
    }  # fmt: skip
    if progress.steps >= config.steps and agent.model.fusion == "product" and len(replay):
        state["usual"] = measure(agent.model, replay)
    replay.flush()
    path = folder / "checkpoint.pt"
    write_tensors(folder / "checkpoint.new.pt", state)
    if path.exists():
        os.replace(path, folder / "checkpoint.previous.pt")
    os.replace(folder / "checkpoint.new.pt", path)


def save_weights(folder, path):
    """Write what `evaluate.py` and `load_agent` need of a trained run into one small file, its matrices as float16."""
    state, small = load_checkpoint(folder), lambda x: x.half() if x.dim() > 1 else x
    networks = {name: state["agent"][name] for name in ("model", "actor", "critic")}
    state["agent"] = {name: {key: small(x) for key, x in network.items()} for name, network in networks.items()}
    kept = {"config", "steps", "updates", "agent", "modalities", "action_size", "usual"} & set(state)
    write_tensors(Path(path), {name: state[name] for name in kept})


def restore(folder, agent, replay, rng, log):
    """Take up a run at its last intact checkpoint, or at its beginning if it has none. Returns its Progress."""
    path, state = newest_checkpoint(folder)
    if path is None:
        log.load_state_dict({"bytes": 0, "pending": {}}, -1, agent.device)
        return Progress()
    if not {"replay", "log", "evaluated", "rng", "torch_rng", "cuda_rng"} <= set(state):
        raise ValueError(f"{path} holds weights alone: evaluate it, or put back a whole checkpoint")
    agent.load_state_dict(state["agent"])
    if lost := replay.load_state_dict(state["replay"]):
        say(f"{lost} episodes of {path} are gone: going on without them", sys.stderr)
    log.load_state_dict(state["log"], state["steps"], agent.device)
    rng.bit_generator.state = state["rng"]
    torch.set_rng_state(state["torch_rng"])
    torch.cuda.set_rng_state_all(state["cuda_rng"][: torch.cuda.device_count()])
    if path.name != "checkpoint.pt":
        os.replace(path, folder / "checkpoint.pt")  # the next one must not push out the intact one
    return Progress(state["steps"], state["updates"], state["evaluated"])


def newest_checkpoint(folder):
    """Return the path and content of the last checkpoint, or of the one before if it is damaged; else None, None.

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
                say(f"{line}: taking {path}", sys.stderr)
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
            if {"config", "steps", "updates", "agent", "modalities"} <= set(state):
                return state
        reason = f"checksum of {damaged}" if damaged else "not a checkpoint of this version"
    except pickle.UnpicklingError:
        reason = "holds more than tensors and numbers, and is not opened"
    except Exception as error:  # a damaged file may raise anything
        reason = " ".join(str(error).split())[:100]
    raise ValueError(f"{path} is damaged or of another version ({reason})")


def only_runs(paths):
    """Keep the paths of runs and files of weights; print the others. Raises ValueError if none is left."""
    runs = [path for path in paths if not Path(path).exists() or Path(path).suffix == ".pt"
            or (Path(path) / "config.json").exists()]  # fmt: skip
    others = " ".join(str(path) for path in paths if path not in runs)
    if not runs:
        raise ValueError("no run was given: give folders like runs/toy-mummi-1" + f", not {others}" * bool(others))
    if others:
        say(f"no runs, left out: {others}", sys.stderr)
    return runs


def load_checkpoint(folder):
    """The last intact checkpoint of a run's folder, or a file of one. Raises ValueError if there is none."""
    if Path(folder).is_file():
        return read_checkpoint(Path(folder))
    path, state = newest_checkpoint(folder)
    if path is None:
        raise ValueError(f"{Path(folder) / 'checkpoint.pt'} is missing: give a run that has had its first evaluation")
    return state
