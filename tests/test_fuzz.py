"""Whatever is given, as options, configuration or background: it works, or one line says what is wrong."""

import io
import json
import os
import pickle
from contextlib import redirect_stderr
from dataclasses import fields
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis", reason="pip install -r requirements-dev.txt")
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
import killer
from test_reliability import TOY

import envs
import checkpoint as runs
import train
from config import Config
from methods import METHODS
from mssm import MSSM
from pictures import of_evaluation

EXAMPLES = int(os.environ.get("FUZZ", 1))  # times as many
settings.register_profile("fuzz", deadline=None, derandomize="FUZZ" not in os.environ, database=None,
                          suppress_health_check=list(HealthCheck))  # fmt: skip
settings.load_profile("fuzz")


def works_or_says_why(action, *kinds):
    """What `action` returns; or None, where it raises an error that one line explains."""
    try:
        return action()
    except Exception as error:
        known = runs.explain(error)
        assert known is not None, f"no line for {error!r}"
        line, code = known
        assert "\n" not in line and line and code in (1, 2)
        assert not kinds or isinstance(error, kinds)
    return None


# ---- 1. Options and configurations ----

NUMBERS = st.one_of(
    st.integers(-5, 5), st.integers(-(2**70), 2**70), st.floats(), st.sampled_from(["1e400", "-0", "1_0", "0x10"])
).map(str)
WORDS = st.one_of(
    st.sampled_from([*envs.TASKS, *METHODS, "cpu", "released", "procedural", "runs", "..", "/", "a\nb", ""]),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=300),
)
VALUES = {float: NUMBERS, int: NUMBERS, str: WORDS, tuple[str, ...]: WORDS}


@st.composite
def options(draw):
    chosen = draw(st.lists(st.sampled_from(fields(Config)), max_size=4))
    given = draw(st.sampled_from([[], ["--task", "toy"]]))
    for field in chosen:
        name = "--" + field.name.replace("_", "-")
        if field.type is bool:
            given = [*given, "--no-" + name[2:] if field.default else name]
        else:
            given = [*given, f"{name}={draw(VALUES[field.type])}"]
    return given


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("empty"))
        yield Path.cwd()


@given(options())
@settings(max_examples=60 * EXAMPLES)
@example(["--task", "toy", "--name=../toy"])
@example(["--task", "toy", "--capacity=99999999999999999999"])
@example(["--backgrounds=" + "x" * 5000])
@example(["--discount=nan"])
def test_options_are_taken_or_refused(empty, given):
    with redirect_stderr(io.StringIO()) as said:
        try:
            works_or_says_why(lambda: train.parse(given), ValueError)
        except SystemExit as exit:  # tyro's own refusal, or --help
            assert exit.code in (0, 2)
    assert "Traceback" not in said.getvalue()
    assert list(empty.iterdir()) == []


@st.composite
def small(draw):
    """Options of a run of a hundred steps that takes a second."""
    numbers = {
        "num_envs": (1, 3), "eval_episodes": (1, 2), "d_h": (1, 9), "d_c": (1, 9), "d_f": (1, 9), "hidden": (1, 9),
        "units": (1, 9), "batch_size": (1, 4), "batch_length": (2, 101), "horizon": (2, 4), "mpc_iterations": (0, 2),
        "first_updates": (0, 2), "prefill": (0, 100), "log_every": (1, 3), "capacity": (101, 400),
        "eval_every": (1, 200), "seed": (0, 2**40), "expert_power": (1, 2),
    }  # fmt: skip
    values = {name: draw(st.integers(*bounds)) for name, bounds in numbers.items()}
    values["missing_rate"] = draw(st.floats(0, 1, exclude_max=True))
    values["discount"], values["return_lambda"] = draw(st.floats(0, 1)), draw(st.floats(0, 1))
    values["clip"] = draw(st.floats(0, 1e9, exclude_min=True))
    values["absent_logit"] = draw(st.sampled_from(["-inf", "-100", "0"]))
    values["method"], values["task"] = draw(st.sampled_from(list(METHODS))), draw(st.sampled_from(list(envs.TOY)))
    given = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    for name in ("sample_s_f", "prior_if_unobserved", "over_present"):
        given += ["--no-" + name.replace("_", "-")] * draw(st.integers(0, 1))
    return [*TOY, *given, "--channels", "1", "--steps", "100", "--updates-per-1000", "10"]


@given(small())
@settings(max_examples=5 * EXAMPLES)
def test_a_small_run_of_any_configuration_works_or_says_why(tmp_path_factory, given):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("small"))
        killer.without_pictures(patch.setattr)
        patch.setattr(train, "of_evaluation", of_evaluation)  # it depends on the configuration
        works_or_says_why(lambda: train.main(train.parse([*given, "--name", "small"])))
        if Path("runs").exists():
            works_or_says_why(lambda: train.main(train.parse(["--resume", "runs/small", "--steps", "150"])))
            assert not [path for path in Path("runs").iterdir() if not (path / "config.json").exists()]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(JSON | st.dictionaries(st.sampled_from([field.name for field in fields(Config)]), JSON, max_size=5))
@settings(max_examples=100 * EXAMPLES)
def test_a_configuration_file_is_taken_or_refused(empty, values):
    (empty / "config.json").write_text(json.dumps(values))
    with redirect_stderr(io.StringIO()) as said:
        works_or_says_why(lambda: train.parse(["--resume", "."]), ValueError)
    assert said.getvalue() == ""
    (empty / "config.json").unlink()


# ---- 2. Backgrounds ----


def written(suffix, shape=(3, 64, 64, 3)):
    """The bytes of a sound file."""
    array, data = np.arange(np.prod(shape)).astype(np.uint8).reshape(shape), io.BytesIO()
    if suffix == ".npy":
        np.save(data, array)
        return data.getvalue()
    if suffix == ".pkl":
        return pickle.dumps(array)
    import av

    format, codec, pixels = {
        ".mp4": ("mp4", "libx264", "yuv420p"), ".avi": ("avi", "mpeg4", "yuv420p"),
        ".mkv": ("matroska", "mjpeg", "yuvj420p"), ".png": ("image2pipe", "png", "rgb24"),
        ".jpg": ("image2pipe", "mjpeg", "yuvj420p"),
    }[suffix]  # fmt: skip
    with av.open(data, "w", format=format) as container:
        stream = container.add_stream(codec, rate=20)
        stream.width, stream.height, stream.pix_fmt = 66, 48, pixels
        for picture in array if format != "image2pipe" else array[:1]:
            picture = np.resize(picture, (48, 66, 3))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
    return data.getvalue()


SOUND = {suffix: written(suffix) for suffix in (".mp4", ".avi", ".mkv", ".png", ".jpg", ".npy", ".pkl")}


@st.composite
def damaged(draw):
    """A suffix and bytes: any, or of a sound file with some of them changed, cut out or repeated."""
    suffix = draw(st.sampled_from(list(SOUND)))
    if draw(st.integers(0, 4)) == 0:
        return suffix, draw(st.binary(max_size=200))
    data = bytearray(SOUND[draw(st.sampled_from([suffix] * 5 + list(SOUND)))])
    for _ in range(draw(st.integers(0, 6))):
        last = min(len(data) - 1, draw(st.sampled_from([200, 10**9])))  # often in the header
        data[draw(st.integers(0, last))] = draw(st.integers(0, 255))
    if draw(st.booleans()):
        first = draw(st.integers(0, len(data)))
        data[first : first + draw(st.integers(0, 1000))] = data[: draw(st.integers(0, 100))]
    return suffix, bytes(data)


def play(source):
    """Some frames of both splits; what envs.py promises of them."""
    for split in envs.SPLITS:
        for frame in islice(envs.open_backgrounds(str(source), split)(np.random.default_rng(0)), 5):
            assert frame.shape == (64, 64, 3) and frame.dtype == np.uint8
    return True


@pytest.mark.parametrize("suffix", SOUND)
def test_sound_backgrounds_play(tmp_path, suffix):
    (tmp_path / f"x{suffix}").write_bytes(SOUND[suffix])
    assert play(tmp_path / f"x{suffix}" if suffix in (".npy", ".pkl") else tmp_path)


@given(damaged())
@settings(max_examples=200 * EXAMPLES)
@example((".npy", written(".npy", (0, 3, 64, 64, 3))))
@example((".npy", written(".npy", (2, 0, 64, 64, 3))))
@example((".npy", written(".npy", (0, 64, 64, 3))))
@example((".npy", written(".npy", (64, 3))))
@example((".npy", SOUND[".npy"].replace(b"(3, 64", b"(9999999999, 64", 1)))
@example((".pkl", b"\x80\x02]r\xff\xff\xff\x7f."))  # a memo of 16 GB
@example((".pkl", b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"x."))
@example((".pkl", pickle.dumps({"a": [1]})))
@example((".mp4", b""))
@example((".mp4", SOUND[".mp4"].replace(b"avc1", b"none")))
@example((".mp4", b"#EXTM3U\n#EXTINF:1,\n/etc/hostname\n#EXT-X-ENDLIST\n"))
@example((".mp4", b"ffconcat version 1.0\nfile '/etc/hostname'\n"))
def test_a_background_plays_or_is_refused(tmp_path_factory, background):
    suffix, data = background
    path = tmp_path_factory.mktemp("background") / f"x{suffix}"
    path.write_bytes(data)
    works_or_says_why(lambda: play(path), ValueError)
    if suffix not in (".npy", ".pkl"):
        works_or_says_why(lambda: play(path.parent), ValueError)


@pytest.mark.parametrize("name", ["a\nb.mp4", "%03d.png", "pipe:0.mp4", "-i.mp4", "x" * 200 + ".mp4", "ü.mp4"])
def test_odd_file_names_play(tmp_path, name):
    (tmp_path / name).write_bytes(SOUND[Path(name).suffix])
    assert play(tmp_path)


@pytest.mark.parametrize("kind", ["fifo", "folder", "loop", "nowhere", "huge"])
def test_odd_files_are_refused(tmp_path, kind):
    path = tmp_path / "odd.png"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "nowhere":
        path.symlink_to("nowhere")
    else:  # a picture that says it has 100,000 x 100,000 pixels
        data = bytearray(SOUND[".png"])
        data[16:24] = (100_000).to_bytes(4, "big") * 2
        path.write_bytes(data)
    with pytest.raises(ValueError) as error:
        play(tmp_path)
    assert runs.explain(error.value)[1] == 2


def test_a_configuration_of_any_size_is_refused_or_fits():
    """Sizes at their limits ask for more memory than there is: one line, too."""
    works_or_says_why(lambda: torch.empty(2**16, 2**16, 2**16, dtype=torch.uint8))


# ---- 4. Observations ----

DTYPES = [torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool, torch.float16, torch.float32, torch.float64]
SHAPES = [(64, 64, 3), (64, 64, 1), (64, 64), (32, 32, 3), (2,), (1,), ()]
NAMES = st.one_of(st.sampled_from(["observation.images.top", "keys", "items", "0", "a.b", "self"]), st.text(max_size=20))


@given(NAMES, st.sampled_from(SHAPES), st.sampled_from(DTYPES), st.sampled_from(SHAPES), st.integers(1, 3))
@settings(max_examples=60 * EXAMPLES)
def test_an_observation_is_read_as_what_it_is_or_refused(name, declared, dtype, shape, columns):
    """Of any name, type and shape: only colour in uint8, depth and vectors in floats are read, with a column each."""

    def read():
        model = MSSM({name: declared, "other": (2,)}, 1, d_h=4, d_c=2, d_f=4, hidden=4, units=4, channels=1)
        observation = {name: torch.ones(2, 3, *shape).to(dtype), "other": torch.ones(2, 3, 2)}
        return model.observe(observation, torch.ones(2, 3, columns), torch.zeros(2, 3, 1))

    filtered = works_or_says_why(read, ValueError)
    colour, floats = len(declared) == 3 and declared[-1] > 1, dtype.is_floating_point
    fits = declared in SHAPES[:2] + SHAPES[4:6] and shape == declared and columns == 2
    assert (filtered is not None) == (fits and (dtype == torch.uint8 if colour else floats)) or name == "other"
    assert filtered is None or filtered.s_c.isfinite().all()


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
@given(st.text(max_size=50))
@settings(max_examples=30 * EXAMPLES)
def test_anything_can_be_said_to_any_output(encoding, text):
    for file in (io.TextIOWrapper(io.BytesIO(), encoding=encoding), None, io.StringIO()):
        runs.say(text, file)
    closed = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    closed.close()
    runs.say(text, closed)


def test_no_file_descriptor_is_left_by_an_output_that_nobody_reads():
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as file:
        for _ in range(3):
            runs.say("±" * 10_000, file)
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        runs.mute(io.StringIO())  # what has no file descriptor
    assert len(os.listdir("/proc/self/fd")) == files
