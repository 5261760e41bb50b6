"""Replay: whole episodes in files, sequences drawn from them.

One array a key and one row a step, in `<folder>/<key>.npy`: sparse files that grow with what was
written and need no more resident memory than the page cache. A ring buffer: new episodes replace
the oldest. `spare` extra rows keep replaced episodes readable, until that many more are written,
so that a run can return to its checkpoint.

Row t of an episode holds the observation at t, the action that led to it and the reward that came
with it; row 0 is the reset, with a zero action and reward.

Shapes: T steps, B sequences, L rows of one episode. Time first.

    replay = Replay("runs/x/replay", {"rgb": ((64, 64, 3), "uint8"), "reward": ((), "float32")}, capacity=10**6)
    replay.add({"rgb": rgb, "reward": reward})               # one episode, (L, 64, 64, 3) and (L,)
    batch = replay.sample(50, 50, np.random.default_rng(0))  # {"rgb": (T, B, 64, 64, 3), ...}
"""

import math
import os
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

READERS = 4  # threads


class Column:
    """The rows of one key in a .npy file, which is made, sparse, if it does not exist.

    Rows are read from the file and written to it, not through a memory map of it: a map costs a page
    fault for every 4 kB that is touched for the first time, and its process is killed if the disk is full.

    rows  that the file is made for; one that exists may hold more
    Raises ValueError where the file holds another shape or type, fewer rows, or is damaged.
    """

    def __init__(self, path, rows, shape, dtype):
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        if not path.exists():
            fresh = path.with_suffix(".tmp")
            np.lib.format.open_memmap(fresh, "w+", dtype=dtype, shape=(rows, *shape))
            os.replace(fresh, path)  # never a file without its header
        self.file = open(path, "r+b", buffering=0)
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self.file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # what follows is not read next
        weakref.finalize(self, self.file.close)
        try:
            found = np.lib.format.open_memmap(path, "r")  # fails where a header is damaged or rows are missing
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{path} is damaged: {error}; put back a copy of the folder") from error
        if not found.ndim or len(found) < rows or found.shape[1:] != self.shape or found.dtype != self.dtype:
            wanted = f"{(rows, *shape)} {self.dtype}"
            raise ValueError(f"{path} holds {found.shape} {found.dtype}, not {wanted}: use another folder")
        self.rows, self.header = len(found), found.offset
        self.row_size = math.prod(shape) * self.dtype.itemsize  # bytes

    def read(self, first, out):
        """Fill `out` (L, ...), which is contiguous, with the rows from `first` on."""
        if os.preadv(self.file.fileno(), [out], self.header + first * self.row_size) != out.nbytes:
            raise OSError(f"{self.file.name} became shorter, or its disk fails")

    def write(self, first, rows):
        """Put rows (L, ...) at `first` and behind it. Raises OSError if the disk is full."""
        rows = np.ascontiguousarray(rows, self.dtype).data.cast("B")
        written, offset = 0, self.header + first * self.row_size
        while written < len(rows):
            written += os.pwrite(self.file.fileno(), rows[written:], offset + written)


class Replay:
    """A ring of `capacity` rows in `folder`; overwrites an existing folder's rows, unless `load_state_dict` is called.

    fields    {key: (shape, dtype)} of one row
    spare     rows that stay readable after they made room; an existing folder keeps its own number
    Raises ValueError where the folder holds arrays of another shape or type, or damaged ones.
    """

    def __init__(self, folder, fields, capacity, spare=0):
        self.capacity, self.cursor = capacity, 0
        self.episodes = np.empty((0, 3), int)  # first row, number of rows, serial; oldest first
        self.open = []  # rows of the episodes under way, a list an environment
        self.count = 0  # episodes ever added
        self.readers = ThreadPoolExecutor(READERS)
        Path(folder).mkdir(parents=True, exist_ok=True)
        # Which episode a row was written for, counted from 1: tells rows that were overwritten.
        fields = {**fields, "serial": ((), "int64")}
        paths = {key: Path(folder) / f"{key}.npy" for key in fields}
        missing = [path for path in paths.values() if not path.exists()]
        if missing and paths["serial"].exists():  # the last that is made
            raise ValueError(f"{missing[0]} is missing: put back a copy of the folder")
        new = capacity + spare if missing else capacity
        self.columns = {key: Column(paths[key], new, shape, dtype) for key, (shape, dtype) in fields.items()}
        self.rows = min(column.rows for column in self.columns.values())
        self.serial = self.columns.pop("serial")

    def __len__(self):
        """Rows that can be drawn from."""
        return int(self.episodes[:, 1].sum())

    def add(self, episode):
        """Append one episode, {key: (L, ...)}. Raises ValueError where a shape or type is not that of the fields, and
        if L is more than the capacity; OSError if the disk is full; the replay does not hold the episode then.
        """
        rows = len(next(iter(episode.values())))
        for key, column in self.columns.items():
            x = np.asarray(episode[key])
            fits = np.can_cast(x.dtype, column.dtype, "safe" if x.ndim == 4 and x.dtype.kind != "f" else "same_kind")
            if x.shape != (rows, *column.shape) or not fits:
                raise ValueError(f"{key} is {x.dtype} {x.shape}: give {column.dtype} {(rows, *column.shape)}")
        if rows > self.capacity:
            raise ValueError(f"an episode of {rows} steps does not fit a replay of {self.capacity}: enlarge it")
        first = self.cursor if self.cursor + rows <= self.rows else 0
        end = first + rows
        # Make room: forget what is overwritten now, and the oldest until the new one fits the capacity.
        starts, lengths, _ = self.episodes.T
        self.episodes = self.episodes[(starts + lengths <= first) | (starts >= end)]
        self.episodes = self.episodes[self.episodes[::-1, 1].cumsum()[::-1] <= self.capacity - rows]
        self.count += 1
        self.serial.write(first, np.full(rows, self.count))
        for key, column in self.columns.items():
            column.write(first, episode[key])
        self.episodes = np.append(self.episodes, [[first, rows, self.count]], axis=0)
        self.cursor = end

    def rows_of(self, key):
        """All rows of one key, (rows, ...), the oldest episode first."""
        column, parts = self.columns[key], [np.empty(0)] * len(self.episodes)
        for i, (start, rows, _) in enumerate(self.episodes):
            parts[i] = np.empty((rows, *column.shape), column.dtype)
            column.read(start, parts[i])
        return np.concatenate(parts)

    def begin(self, num_envs):
        """Start an episode in each of `num_envs` environments; what was under way is dropped."""
        self.open = [[] for _ in range(num_envs)]

    def record(self, step, done):
        """Append one step of every environment; an episode joins the replay when it is done.

        step     {key: (num_envs, ...)}
        done     (num_envs,)  bool, True at an episode's last step
        returns  the finished episodes, [{key: (L, ...)}]
        """
        finished = []
        for i, rows in enumerate(self.open):
            rows.append({key: np.array(value[i]) for key, value in step.items()})
            if done[i]:
                finished.append({key: np.stack([row[key] for row in rows]) for key in step})
                self.add(finished[-1])
                self.open[i] = []
        return finished

    def cut(self, shortest):
        """End the episodes under way; those of `shortest` rows or more (with `first`: all) join the replay."""
        for rows in self.open:
            if len(rows) >= (1 if "first" in self.columns else shortest):
                self.add({key: np.stack([row[key] for row in rows]) for key in rows[0]})
        self.open = []

    def sample(self, batch_size, length, rng):
        """Sequences of consecutive rows, drawn uniformly from all that lie inside one episode.

        Where `first` is kept, True in an episode's first row, a sequence begins at any row, and goes on with the
        beginning of another episode where one ends: every row is as likely as any other, in short episodes too.
        returns  {key: (T, B, ...)}
        Raises ValueError if no episode is long enough.
        """
        return self.read(self.choose(batch_size, length, rng), self.buffers(batch_size, length))

    def choose(self, batch_size, length, rng):
        """The parts of sequences, drawn as `sample` says, (P, 4): sequence, step in it, first row, number of rows."""
        starts, rows, _ = self.episodes.T
        windows = (rows if "first" in self.columns else np.maximum(rows - length + 1, 0)).cumsum()
        if not len(windows) or windows[-1] == 0:
            raise ValueError(f"no episode in the replay has {length} steps: collect more, or shorten --batch-length")
        drawn = rng.integers(windows[-1], size=batch_size)
        episode = np.searchsorted(windows, drawn, side="right")
        offset = drawn - np.concatenate([[0], windows])[episode]
        b, t, parts = np.arange(batch_size), np.zeros(batch_size, int), []
        while len(b):
            taken = np.minimum(rows[episode] - offset, length - t)
            parts.append(np.stack([b, t, starts[episode] + offset, taken], -1))
            b, t = np.stack([b, t + taken])[:, t + taken < length]
            episode, offset = rng.integers(len(rows), size=len(b)), 0
        return np.concatenate(parts)

    def buffers(self, batch_size, length, empty=np.empty):
        """{key: (B, T, ...)} for `read` to fill; `empty(shape, dtype)` makes one, in pinned memory perhaps."""
        return {key: empty((batch_size, length, *c.shape), c.dtype) for key, c in self.columns.items()}

    def read(self, parts, buffers):
        """The sequences that `choose` drew, as {key: (T, B, ...)}, views of the buffers."""

        def read(parts):
            for b, t, first, rows in parts:
                for key, column in self.columns.items():
                    column.read(first, buffers[key][b, t : t + rows])

        # Copying from the page cache keeps a core busy for longer than a GPU needs for an update.
        list(self.readers.map(read, np.array_split(parts, READERS)))
        return {key: buffer.swapaxes(0, 1) for key, buffer in buffers.items()}

    def state_dict(self):
        """Where the episodes lie; the rows themselves are on disk."""
        return {"cursor": self.cursor, "count": self.count, "episodes": self.episodes.tolist()}

    def load_state_dict(self, state):
        """Go back to a saved state: what was written after it is forgotten, and what that overwrote.

        returns  the number of episodes that were overwritten
        """
        self.cursor, self.count, self.open = state["cursor"], state["count"], []
        serials = np.empty(self.rows, np.int64)
        self.serial.read(0, serials)
        intact = [e for e in state["episodes"] if np.array_equal(serials[e[0] : e[0] + e[1]], np.full(e[1], e[2]))]
        self.episodes = np.array(intact, int).reshape(-1, 3)
        return len(state["episodes"]) - len(intact)

    def flush(self):
        """Write what the page cache holds to disk."""
        for column in (self.serial, *self.columns.values()):
            os.fsync(column.file.fileno())


# ---- Batches, read ahead ---------------------------------------------------------------------------


def replay_fields(observation_space, action_size, continues=False, first=False):
    """{key: (shape, dtype)} of what the replay keeps of one step; two bytes a pixel of depth.

    continues, first  also keep whether the episode goes on, and where it begins
    """
    half = lambda x: len(x.shape) == 3 and x.dtype == np.float32  # noqa: E731
    fields = {name: (x.shape, np.float16 if half(x) else x.dtype) for name, x in observation_space.items()}
    fields |= {"action": ((action_size,), np.float32), "reward": ((), np.float32)}
    fields |= {"continues": ((), np.float32)} if continues else {}
    return fields | ({"first": ((), np.bool_)} if first else {})


class Batches:
    """What `Agent.update` reads, drawn from the replay: the next batch while an update runs.

    A thread reads it from disk and, where there is a GPU, sends it there, from pinned memory on a
    stream of its own. Which sequences it holds is decided by the caller's thread, so that equal
    seeds give equal batches.
    """

    def __init__(self, replay, config, rng, device):
        self.replay, self.rng, self.device = replay, rng, device
        self.size = config.batch_size, config.batch_length
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.buffers = replay.buffers(*self.size, empty=pinned if self.stream else np.empty)
        self.thread, self.pending = ThreadPoolExecutor(1), None

    def next(self):
        """One batch: observation {name: (T, B, ...)}, present (T, B, M), action (T, B, A), reward (T, B)."""
        batch = (self.pending or self.draw()).result()
        self.pending = self.draw()
        if self.stream:  # its memory is not to be used again before the update has read it
            for x in batch.values():
                x.record_stream(torch.cuda.current_stream())
        beside = ("present", "action", "reward", "continues", "first")
        rest = {name: batch.pop(name) for name in beside if name in batch}
        return {"observation": batch, **rest}

    def draw(self):
        return self.thread.submit(self.load, self.replay.choose(*self.size, self.rng))

    def load(self, parts):
        batch = self.replay.read(parts, self.buffers)
        if self.stream is None:
            return {key: torch.tensor(x) for key, x in batch.items()}
        with torch.cuda.stream(self.stream):
            batch = {key: torch.as_tensor(x).to(self.device) for key, x in batch.items()}
        self.stream.synchronize()
        return batch

    def wait(self):
        """Wait until nothing is being read, so that rows may be overwritten."""
        if self.pending:
            self.pending.result()

    def drop(self):
        """Forget the batch drawn ahead: a run that is resumed here does not have it either."""
        self.wait()
        self.pending = None


def pinned(shape, dtype):
    """An array that the GPU can read by itself."""
    return torch.empty(shape, dtype=getattr(torch, np.dtype(dtype).name), pin_memory=True).numpy()


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        replay = Replay(folder, {"position": ((2,), "float32"), "reward": ((), "float32")}, capacity=1000)
        for _ in range(12):
            time = np.arange(rng.integers(50, 150), dtype=np.float32)
            replay.add({"position": np.stack([time, -time], -1), "reward": time})
        batch = replay.sample(4, 20, rng)
        assert (np.diff(batch["reward"], axis=0) == 1).all(), "a sequence crossed an episode's end"
        print(f"{len(replay)} of 1000 rows in {len(replay.episodes)} episodes; a batch holds "
              f"{ {key: x.shape for key, x in batch.items()} }")  # fmt: skip
