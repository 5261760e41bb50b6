"""replay.py: what is drawn is what was stored, uniformly, never across an episode or the ring's seam."""

import numpy as np
import pytest

from replay import Replay

FIELDS = {"rgb": ((4, 4, 3), "uint8"), "episode": ((), "int64"), "step": ((), "int64"), "action": ((2,), "float32")}


def episode(number, rows):
    """Rows that know where they come from."""
    rng = np.random.default_rng(number)
    return {
        "rgb": rng.integers(0, 256, (rows, 4, 4, 3)).astype(np.uint8),
        "episode": np.full(rows, number),
        "step": np.arange(rows),
        "action": rng.normal(size=(rows, 2)).astype(np.float32),
    }


def filled(folder, lengths, capacity=1000):
    replay = Replay(folder, FIELDS, capacity)
    for number, rows in enumerate(lengths):
        replay.add(episode(number, rows))
    return replay


def kept(replay, draws=500):
    """The numbers of the episodes that are drawn."""
    return set(np.unique(replay.sample(draws, 1, np.random.default_rng(0))["episode"]))


def test_sequences_are_time_first_and_of_the_stored_type(tmp_path):
    batch = filled(tmp_path, [20]).sample(3, 5, np.random.default_rng(0))
    for key, (shape, dtype) in FIELDS.items():
        assert batch[key].shape == (5, 3, *shape) and batch[key].dtype == dtype


def test_sequences_stay_inside_one_episode_and_return_its_rows_unchanged(tmp_path):
    """Also across the seam: the ring goes round several times, and is drawn from after every episode."""
    lengths = [17, 9, 23, 12, 5, 30, 14, 8, 26, 11, 19]
    replay, rng = Replay(tmp_path, FIELDS, 70), np.random.default_rng(0)
    for number, rows in enumerate(lengths):
        replay.add(episode(number, rows))
        batch = replay.sample(100, 5, rng)
        for b in range(100):
            drawn, first = batch["episode"][0, b], batch["step"][0, b]
            source = episode(drawn, lengths[drawn])
            for key in FIELDS:
                np.testing.assert_array_equal(batch[key][:, b], source[key][first : first + 5])
    assert len(set(batch["episode"][0])) > 1


@pytest.mark.parametrize("key, wrong", [
    ("rgb", np.zeros((20, 3, 4, 4), np.uint8)), ("rgb", np.zeros((20, 4, 4, 3), np.float32)),
    ("rgb", np.zeros((20, 4, 4, 3), np.uint16)), ("action", np.zeros((19, 2), np.float32)),
    ("action", np.zeros((25, 2), np.float32)), ("step", np.zeros(20)),
], ids=["channels first", "floats", "wider", "a row short", "rows too many", "floats for whole numbers"])  # fmt: skip
def test_episodes_of_another_shape_or_type_are_refused_and_change_nothing(tmp_path, key, wrong):
    replay = filled(tmp_path, [20, 20])
    with pytest.raises(ValueError, match=f"{key} is {wrong.dtype}.*: give {np.dtype(FIELDS[key][1])}"):
        replay.add(episode(2, 20) | {key: wrong})
    assert len(replay) == 40 and (replay.rows_of("episode") == np.repeat([0, 1], 20)).all()
    replay.add(episode(2, 20) | {"action": np.zeros((20, 2))})  # double precision is another writing of the same
    assert len(replay) == 60


def test_every_window_is_as_likely_as_any_other(tmp_path):
    """Chi-square of 20,000 draws over all windows of episodes of unequal length."""
    lengths, length, draws = [7, 30, 4, 12, 5], 5, 20_000
    batch = filled(tmp_path, lengths).sample(draws, length, np.random.default_rng(0))
    windows = {(number, first) for number, rows in enumerate(lengths) for first in range(rows - length + 1)}
    drawn, counts = np.unique(np.stack([batch["episode"][0], batch["step"][0]]), axis=1, return_counts=True)
    assert set(map(tuple, drawn.T)) == windows  # 38: every one, the first and the last of each episode
    expected = draws / len(windows)
    assert ((counts - expected) ** 2 / expected).sum() < 70  # 37 degrees of freedom: p = 0.001 at 69.3


def test_the_oldest_episodes_make_room(tmp_path):
    replay = filled(tmp_path, [10, 10, 10], capacity=30)
    assert kept(replay) == {0, 1, 2} and len(replay) == 30
    replay.add(episode(3, 4))
    assert kept(replay) == {1, 2, 3} and len(replay) == 24
    replay.add(episode(4, 6))  # fits behind it
    assert kept(replay) == {1, 2, 3, 4} and len(replay) == 30
    replay.add(episode(5, 30))
    assert kept(replay) == {5} and len(replay) == 30


def test_what_is_drawn_is_a_copy(tmp_path):
    replay = filled(tmp_path, [10])
    replay.sample(4, 10, np.random.default_rng(0))["rgb"][:] = 0
    np.testing.assert_array_equal(replay.sample(1, 10, np.random.default_rng(0))["rgb"][:, 0], episode(0, 10)["rgb"])


def test_integers_are_no_depth(tmp_path):
    replay = Replay(tmp_path, {"depth": ((4, 4, 1), "float16")}, 100)
    with pytest.raises(ValueError, match="depth is uint16"):
        replay.add({"depth": np.full((9, 4, 4, 1), 1500, np.uint16)})


def joined(folder, lengths, draws, length=5):
    """A batch of a replay that keeps where episodes begin."""
    replay = Replay(folder, {"episode": ((), "int64"), "step": ((), "int64"), "first": ((), "bool")}, 1000)
    for number, rows in enumerate(lengths):
        replay.add({"episode": np.full(rows, number), "step": np.arange(rows), "first": np.arange(rows) == 0})
    return replay.sample(draws, length, np.random.default_rng(0))


@pytest.mark.parametrize("lengths", [[100], [5, 60, 7, 3, 30], [2, 1, 3]])
def test_where_first_is_kept_a_sequence_goes_on_with_the_beginning_of_an_episode(tmp_path, lengths):
    """Whole to its end, then from a beginning; never from one row to another that does not follow it."""
    batch = joined(tmp_path, lengths, 1000)
    ends = np.array(lengths)[batch["episode"]] == batch["step"] + 1
    follows = (np.diff(batch["step"], axis=0) == 1) & (np.diff(batch["episode"], axis=0) == 0)
    assert (follows == ~ends[:-1]).all() and ((batch["step"] == 0) == batch["first"]).all()
    assert (batch["first"][1:] == ends[:-1]).all() and ends[:-1].any()


def test_an_episode_that_is_cut_is_kept_however_short_where_first_is_kept(tmp_path):
    for fields, kept in (({}, 0), ({"first": ((), "bool")}, 3)):
        replay = Replay(tmp_path / str(kept), {"x": ((), "int64"), **fields}, 1000)
        replay.begin(1)
        for x in range(3):
            replay.record({"x": np.array([x]), "first": np.array([x == 0])}, np.array([False]))
        replay.cut(shortest=5)
        assert len(replay) == kept


@pytest.mark.parametrize("lengths", [[5, 60, 7, 3, 30], [2, 1, 3]])
def test_where_first_is_kept_every_row_is_as_likely_as_any_other(tmp_path, lengths):
    """At the beginning of a sequence, at its end and between: chi-square of 20,000 draws, short episodes and all."""
    batch, total = joined(tmp_path, lengths, 20_000), sum(lengths)
    for t in (0, 2, 4):
        rows = np.cumsum([0, *lengths])[batch["episode"][t]] + batch["step"][t]
        counts, expected = np.bincount(rows, minlength=total), 20_000 / total
        bound = total + 4 * (2 * total) ** 0.5  # four standard deviations above its mean
        assert len(counts) == total and ((counts - expected) ** 2 / expected).sum() < bound


def test_what_is_recorded_is_a_copy(tmp_path):
    replay, same = Replay(tmp_path, {"x": ((2,), "float32")}, 100), np.zeros((1, 2), np.float32)
    replay.begin(1)
    for t in range(4):
        same[:] = t
        finished = replay.record({"x": same}, np.array([t == 3]))
    assert finished[0]["x"][:, 0].tolist() == [0, 1, 2, 3]


def test_record_keeps_the_environments_apart_until_each_is_done(tmp_path):
    replay, a, b = Replay(tmp_path, FIELDS, 100), episode(0, 6), episode(1, 4)
    replay.begin(2)
    finished = []
    for t in range(6):
        step = {key: np.stack([a[key][t], b[key][min(t, 3)]]) for key in FIELDS}
        finished += replay.record(step, np.array([t == 5, t == 3]))
    assert len(finished) == 2 and len(replay) == 10
    for actual, expected in zip(finished, (b, a)):
        for key in FIELDS:
            np.testing.assert_array_equal(actual[key], expected[key])
    replay.begin(2)  # what was under way is dropped
    assert len(replay) == 10 and replay.open == [[], []]


def test_reopened_it_goes_on_from_the_saved_state(tmp_path):
    """A resumed run sees what was there at the checkpoint; what came after is forgotten."""
    replay = filled(tmp_path, [10, 10])
    state = replay.state_dict()
    replay.flush()
    replay.add(episode(2, 10))
    reopened = Replay(tmp_path, FIELDS, 1000)
    assert len(reopened) == 0
    reopened.load_state_dict(state)
    assert kept(reopened) == {0, 1}
    batch = reopened.sample(20, 10, np.random.default_rng(0))
    for b in range(20):
        np.testing.assert_array_equal(batch["rgb"][:, b], episode(batch["episode"][0, b], 10)["rgb"])
    reopened.add(episode(3, 10))  # where episode 2 was
    assert kept(reopened) == {0, 1, 3}


def test_reopened_it_does_not_draw_what_was_overwritten_since(tmp_path):
    replay = filled(tmp_path, [10, 10, 10], capacity=30)
    state = replay.state_dict()
    replay.add(episode(3, 4))  # the ring goes round: over the first rows of episode 0
    reopened = Replay(tmp_path, FIELDS, 30)
    reopened.load_state_dict(state)
    assert kept(reopened) == {1, 2}


def test_an_empty_replay_takes_no_room_on_disk(tmp_path):
    replay = Replay(tmp_path, {"rgb": ((64, 64, 3), "uint8")}, 10_000)
    replay.add({"rgb": np.ones((10, 64, 64, 3), np.uint8)})
    replay.flush()
    file = (tmp_path / "rgb.npy").stat()
    assert file.st_size > 100e6 and file.st_blocks * 512 < 1e6


def test_what_cannot_be_done_is_refused_with_advice(tmp_path):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="collect more"):
        Replay(tmp_path / "empty", FIELDS, 10).sample(1, 1, rng)
    with pytest.raises(ValueError, match="no episode in the replay has 6 steps"):
        filled(tmp_path / "short", [5, 5]).sample(1, 6, rng)
    with pytest.raises(ValueError, match="enlarge"):
        filled(tmp_path / "long", [11], capacity=10)
    with pytest.raises(ValueError, match="use another folder"):
        Replay(tmp_path / "short", FIELDS, 1001)
    with pytest.raises(ValueError, match="use another folder"):
        Replay(tmp_path / "short", FIELDS | {"action": ((2,), "float64")}, 1000)
