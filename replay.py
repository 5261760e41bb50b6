"""Replay: whole episodes in files, sequences drawn inside them.

One array a key and one row a step, in `<folder>/<key>.npy`: sparse files that grow with what was
written and need no more resident memory than the page cache. A ring: the oldest episodes make room.

Row t of an episode holds the observation at t, the action that led to it and the reward that came
with it; row 0 is the reset, with a zero action and reward.

Shapes: T steps, B sequences, L rows of one episode. Time first.

    replay = Replay("runs/x/replay", {"rgb": ((64, 64, 3), "uint8"), "reward": ((), "float32")}, capacity=10**6)
    replay.add({"rgb": rgb, "reward": reward})               # one episode, (L, 64, 64, 3) and (L,)
    batch = replay.sample(50, 50, np.random.default_rng(0))  # {"rgb": (T, B, 64, 64, 3), ...}
"""

import os
from pathlib import Path

import numpy as np


class Column:
    """The rows of one key in a .npy file, which is made, sparse, if it does not exist.

    Rows are read from the file and written to it, not through a memory map of it: a map costs a page
    fault for every 4 kB that is touched for the first time, and its process is killed if the disk is full.

    Raises ValueError where the file holds another shape or type.
    """

    def __init__(self, path, shape, dtype):
        array = np.lib.format.open_memmap(path, "r+" if path.exists() else "w+", dtype=dtype, shape=shape)
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(f"{path} holds {array.shape} {array.dtype}, not {shape} {dtype}: use another folder")
        self.shape, self.dtype, self.header = shape[1:], array.dtype, array.offset
        self.row_size = array.nbytes // shape[0]  # bytes
        self.file = open(path, "r+b", buffering=0)

    def read(self, first, out):
        """Fill `out` (L, ...), which is contiguous, with the rows from `first` on."""
        os.preadv(self.file.fileno(), [out], self.header + first * self.row_size)

    def write(self, first, rows):
        """Put rows (L, ...) at `first` and behind it. Raises OSError if the disk is full."""
        rows = memoryview(np.ascontiguousarray(rows, self.dtype)).cast("B")
        written, offset = 0, self.header + first * self.row_size
        while written < len(rows):
            written += os.pwrite(self.file.fileno(), rows[written:], offset + written)


class Replay:
    """A ring of `capacity` rows in `folder`; an existing folder is continued, not overwritten.

    fields    {key: (shape, dtype)} of one row
    Raises ValueError where the folder holds arrays of another shape or type.
    """

    def __init__(self, folder, fields, capacity):
        self.capacity, self.cursor = capacity, 0
        self.episodes = []  # (first row, number of rows, serial), oldest first
        self.open = []  # rows of the episodes under way, a list an environment
        self.count = 0  # episodes ever added
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.columns = {
            key: Column(Path(folder) / f"{key}.npy", (capacity, *shape), dtype) for key, (shape, dtype) in fields.items()
        }
        # Which episode a row was written for, counted from 1: tells rows that were overwritten.
        self.serial = Column(Path(folder) / "serial.npy", (capacity,), "int64")

    def __len__(self):
        """Rows that can be drawn from."""
        return sum(rows for _, rows, _ in self.episodes)

    def add(self, episode):
        """Append one episode, {key: (L, ...)}. Raises ValueError if L is more than the capacity."""
        rows = len(next(iter(episode.values())))
        if rows > self.capacity:
            raise ValueError(f"an episode of {rows} steps does not fit a replay of {self.capacity}: enlarge it")
        first = self.cursor if self.cursor + rows <= self.capacity else 0
        end = first + rows
        self.episodes = [e for e in self.episodes if e[0] + e[1] <= first or e[0] >= end]  # make room
        self.count += 1
        self.serial.write(first, np.full(rows, self.count))
        for key, column in self.columns.items():
            column.write(first, episode[key])
        self.episodes.append((first, rows, self.count))
        self.cursor = end

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
            rows.append({key: value[i] for key, value in step.items()})
            if done[i]:
                finished.append({key: np.stack([row[key] for row in rows]) for key in step})
                self.add(finished[-1])
                self.open[i] = []
        return finished

    def sample(self, batch_size, length, rng):
        """Sequences of consecutive rows, drawn uniformly from all that lie inside one episode.

        returns  {key: (T, B, ...)}
        Raises ValueError if no episode is long enough.
        """
        return self.read(self.choose(batch_size, length, rng), self.buffers(batch_size, length))

    def choose(self, batch_size, length, rng):
        """The first rows (B,) of sequences, drawn as `sample` says."""
        starts = np.array([start for start, _, _ in self.episodes])
        windows = np.array([max(0, rows - length + 1) for _, rows, _ in self.episodes]).cumsum()
        if not len(windows) or windows[-1] == 0:
            raise ValueError(f"no episode in the replay has {length} steps: collect more or shorten the sequences")
        drawn = rng.integers(windows[-1], size=batch_size)
        episode = np.searchsorted(windows, drawn, side="right")
        return starts[episode] + drawn - np.concatenate([[0], windows])[episode]

    def buffers(self, batch_size, length, empty=np.empty):
        """{key: (B, T, ...)} for `read` to fill; `empty(shape, dtype)` makes one, in pinned memory perhaps."""
        return {key: empty((batch_size, length, *c.shape), c.dtype) for key, c in self.columns.items()}

    def read(self, first, buffers):
        """The sequences that begin at the rows `first` (B,), as {key: (T, B, ...)}, views of the buffers."""
        for key, column in self.columns.items():
            for row, out in zip(first, buffers[key]):
                column.read(row, out)
        return {key: buffer.swapaxes(0, 1) for key, buffer in buffers.items()}

    def state_dict(self):
        """Where the episodes lie; the rows themselves are on disk."""
        return {"cursor": self.cursor, "count": self.count, "episodes": [list(e) for e in self.episodes]}

    def load_state_dict(self, state):
        """Go back to a saved state: what was written after it is forgotten, and what that overwrote."""
        self.cursor, self.count = state["cursor"], state["count"]
        serials = np.empty(self.capacity, np.int64)
        self.serial.read(0, serials)
        self.episodes = [
            (start, rows, serial) for start, rows, serial in state["episodes"]
            if (serials[start : start + rows] == serial).all()
        ]  # fmt: skip

    def flush(self):
        """Write what the page cache holds to disk."""
        for column in (self.serial, *self.columns.values()):
            os.fsync(column.file.fileno())


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        replay = Replay(folder, {"position": ((2,), "float32"), "reward": ((), "float32")}, capacity=1000)
        for _ in range(12):
            rows = rng.integers(50, 150)
            time = np.arange(rows, dtype=np.float32)
            replay.add({"position": np.stack([time, -time], -1), "reward": time})
        batch = replay.sample(4, 20, rng)
        assert (np.diff(batch["reward"], axis=0) == 1).all(), "a sequence crossed an episode's end"
        print(f"{len(replay)} of 1000 rows in {len(replay.episodes)} episodes; a batch holds "
              f"{ {key: x.shape for key, x in batch.items()} }")  # fmt: skip
