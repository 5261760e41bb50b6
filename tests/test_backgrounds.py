"""backgrounds.py: which clips are found, how they are split, what is read of them, what is refused."""

import os
import pickle
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

import backgrounds
from backgrounds import find_clips, fingerprint, open_clips, summary
from envs import make_env


def frames(source, split="train", count=10, seed=0):
    return np.stack(list(islice(open_clips(source, split)(np.random.default_rng(seed)), count)))


# ---- 1. Sources ----


def write_video(path, levels, size=(96, 80)):
    """A video of grey frames, each of one level."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.bit_rate = 4_000_000
        for level in levels:
            picture = np.full((size[1], size[0], 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())


def write_frames(folder, levels, name="{:05d}.jpg"):
    import av

    folder.mkdir(parents=True, exist_ok=True)
    for i, level in enumerate(levels):
        with av.open(str(folder / name.format(i)), "w", format="image2") as container:
            stream = container.add_stream("mjpeg")
            stream.width, stream.height, stream.pix_fmt = 120, 90, "yuvj420p"
            picture = np.full((90, 120, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
            container.mux(stream.encode())


def array_of(levels):
    return np.broadcast_to(np.uint8(levels)[:, None, None, None], (len(levels), 64, 64, 3)).copy()


LEVELS = [40, 80, 120, 160]


@pytest.mark.parametrize("axes", [4, 5])
def test_arrays_may_have_the_colours_first_as_those_of_cvrl(axes, tmp_path):
    clips = np.random.default_rng(0).integers(0, 256, (2, 5, 64, 64, 3)[5 - axes :], np.uint8)
    for name, array in (("last", clips), ("first", np.moveaxis(clips, -1, -3))):
        (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps(array))
    last, first = (backgrounds.read_array(tmp_path / f"{name}.pkl") for name in ("last", "first"))
    assert len(first) == axes - 3 and all(np.array_equal(a, b) for a, b in zip(last, first, strict=True))


def write_source(kind, folder):
    """One of the five kinds of background sources, each of two videos where it can hold two."""
    if kind == "video":
        write_video(folder / "clip.mp4", LEVELS)
        return folder / "clip.mp4"
    if kind == "videos":
        write_video(folder / "a.avi", [250] * 4)
        write_video(folder / "b.mp4", LEVELS)
    elif kind == "frames":
        write_frames(folder / "train" / "a", [250] * 4)
        write_frames(folder / "train" / "b", LEVELS)
    elif kind == "npy":
        np.save(folder / "videos.npy", np.stack([array_of([250] * 4), array_of(LEVELS)]))
        return folder / "videos.npy"
    else:
        with open(folder / "natural_train.pkl", "wb") as file:
            pickle.dump(array_of(LEVELS), file, protocol=int(kind[-1]))
        return folder / "natural_train.pkl"
    return folder


@pytest.mark.parametrize("kind", ["video", "videos", "frames", "npy", "pkl2", "pkl3", "pkl4", "pkl5"])
def test_background_sources(tmp_path, kind):
    source = write_source(kind, tmp_path)
    starts, several = set(), kind in ("videos", "frames", "npy")
    for seed in range(12):
        video = frames(source, seed=seed, count=13)
        assert video.shape == (13, 64, 64, 3) and video.dtype == np.uint8
        levels = video.mean((1, 2, 3))
        nearest = np.abs(levels[:, None] - LEVELS).argmin(1)
        assert np.abs(levels - np.array(LEVELS)[nearest]).max() < 4
        # Forwards and backwards for ever, without a cut.
        assert (np.abs(np.diff(nearest)) == 1).all() and set(nearest) == ({0, 1, 2, 3} if several else {0, 1, 2})
        starts.add(nearest[0])
    assert len(starts) > 1
    # Of several, the first of ten is for evaluation; of one, the last frames.
    assert frames(source, "eval").mean() == pytest.approx(250 if several else 160, abs=4)
    env = make_env("finger_spin", missing_rate=0, backgrounds=source)
    background = env.reset()[0]["rgb"][~env.unwrapped.foreground]
    env.close()
    assert np.ptp(background.astype(int), axis=0).max() <= 4


def test_one_frame_is_a_background_too(tmp_path):
    np.save(tmp_path / "one.npy", array_of([70]))
    for split in ("train", "eval"):
        assert (frames(tmp_path / "one.npy", split) == 70).all()
    assert "a single picture, the same in training and evaluation" in summary(tmp_path / "one.npy")


def test_a_video_is_scaled_not_cropped(tmp_path):
    import av

    picture = np.zeros((80, 96, 3), np.uint8)
    picture[:40, 48:, 0] = 255  # red in the upper right quarter
    (tmp_path / "video").mkdir()
    with av.open(str(tmp_path / "video" / "0.png"), "w", format="image2") as container:
        stream = container.add_stream("png")
        stream.width, stream.height, stream.pix_fmt = 96, 80, "rgb24"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
    expected = np.zeros((64, 64, 3), int)
    expected[:32, 32:, 0] = 255
    assert np.abs(frames(tmp_path, count=1)[0].astype(int) - expected).mean() < 2


class Payload:
    """What unpickling this would create must never appear."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("nested", [False, True])
def test_a_pickle_that_runs_code_is_refused(tmp_path, nested):
    payload = Payload(tmp_path / "executed")
    payload = np.array([payload, None], object) if nested else payload
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps(payload))
    with pytest.raises(ValueError, match="bad.pkl"):
        make_env("finger_spin", backgrounds=tmp_path / "bad.pkl")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("kind", ["missing", "empty", "garbage.mp4", "cut.mp4", "garbage.npy", "garbage.pkl",
                                  "float.npy", "small.npy", "a/0.jpg", "sound.mp4"])
def test_bad_backgrounds_are_named(tmp_path, kind):
    source = tmp_path / "source"
    if kind != "missing":
        source.mkdir()
    if kind.startswith(("garbage", "a/")):
        (source / "a").mkdir()
        (source / kind).write_bytes(b"no video at all" * 100)
    elif kind == "cut.mp4":
        write_video(tmp_path / "whole.mp4", LEVELS)
        (source / kind).write_bytes((tmp_path / "whole.mp4").read_bytes()[:600])
    elif kind == "float.npy":
        np.save(source / kind, array_of(LEVELS).astype(float))
    elif kind == "small.npy":
        np.save(source / kind, array_of(LEVELS)[:, ::2, ::2])
    elif kind == "sound.mp4":
        import av

        with av.open(str(source / kind), "w") as container:
            stream = container.add_stream("aac", rate=44100)
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            sound.sample_rate = 44100
            container.mux(stream.encode(sound))
            container.mux(stream.encode())
    named = source if kind in ("missing", "empty") else source / kind
    if named.suffix in (".npy", ".pkl"):
        source = named
    with pytest.raises(ValueError) as error:
        make_env("finger_spin", backgrounds=source)
    assert str(named) in str(error.value) and "\n" not in str(error.value)


def test_an_unreadable_video_among_good_ones_is_not_skipped(tmp_path):
    for name in ("a", "b", "c"):
        write_video(tmp_path / f"{name}.mp4", LEVELS)
    (tmp_path / "d.mp4").write_bytes(b"no video at all" * 100)
    with pytest.raises(ValueError, match="d.mp4"):
        for seed in range(20):
            frames(tmp_path, seed=seed)


# ---- 2. Clips ----


def tree(folder, *names):
    """Files of these names that hold nothing; `find_clips` reads none."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def pictures(folder, count=3, suffix="jpg"):
    return [f"{folder}/{i:05d}.{suffix}" for i in range(count)]


def test_a_davis_tree_is_its_clips(tmp_path):
    animals = [f"animal-{i}" for i in range(12)]
    for animal in animals:
        for folder, suffix in (("JPEGImages/480p", "jpg"), ("JPEGImages/Full-Resolution", "jpg"), ("Annotations/480p", "png"),
                               ("Annotations/Full-Resolution", "png"), ("Annotations_unsupervised/480p", "png")):
            tree(tmp_path, *pictures(f"{folder}/{animal}", suffix=suffix))
    tree(tmp_path, "ImageSets/480p/train.txt", "README.md", "preview.png")
    clips = find_clips(tmp_path)
    assert list(clips) == [f"animal-{i}" for i in range(12)]  # in natural order: 2 before 10
    assert all(path.relative_to(tmp_path).parts[:2] == ("JPEGImages", "480p") for path in clips.values())
    assert summary(tmp_path) == f"backgrounds {tmp_path}: 12 clips, 10 for training and 2 for evaluation"


def test_an_ilsvrc_tree_is_its_clips(tmp_path):
    for part in range(2):
        for clip in range(3):
            name = f"train/ILSVRC2015_VID_train_000{part}/ILSVRC2015_train_{part}{clip:07d}"
            tree(tmp_path, *(f"Data/VID/{name}/{i:06d}.JPEG" for i in range(4)), f"Data/VID/snippets/{name}.mp4",
                 *(f"Annotations/VID/{name}/{i:06d}.xml" for i in range(4)))
    assert len(find_clips(tmp_path)) == 6


def test_junk_is_no_clip(tmp_path):
    tree(tmp_path, "a.mp4", "a.jpg", "b.mp4", "b.jpg", ".hidden.mp4", "._a.mp4")  # with thumbnails
    for folder in (".thumbnails", "thumbnails", "Thumbs", ".ipynb_checkpoints", "Trash", ".Trash-1000/files", "$RECYCLE.BIN",
                   "lost+found", "__MACOSX", "@eaDir", "annotations", "Masks", "labels", "Segmentations", "gt"):
        tree(tmp_path, f"{folder}/c.mp4", *pictures(f"{folder}/d"))
    tree(tmp_path, "cover/1.png", *pictures("trashed"))
    assert list(find_clips(tmp_path)) == ["a", "b", "trashed"]
    tree(tmp_path, "sub/masks/e.mp4")
    assert list(find_clips(tmp_path / "sub" / "masks")) == ["e"]  # what was asked for by name


def test_forms_of_a_clip_are_one_and_clips_of_one_name_are_several(tmp_path):
    tree(tmp_path, "videos/a.mp4", *pictures("frames/a"), "1080p/a.mkv", "640x480/a.mkv", *pictures("a/rgb"))
    assert list(find_clips(tmp_path)) == ["a"]
    tree(tmp_path, "one/video.mp4", "two/video.mp4", *pictures("three/frames"), *pictures("four/frames"))
    assert list(find_clips(tmp_path)) == ["a", "four", "one/video", "three", "two/video"]


def test_links_to_folders_are_followed_once(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    tree(inside, *pictures("a"))
    tree(outside, *pictures("b"), "c.mp4")
    (inside / "linked").symlink_to(outside)
    (inside / "linked-again").symlink_to(outside)
    (inside / "copy.mp4").symlink_to(outside / "c.mp4")
    (outside / "back").symlink_to(inside)
    (inside / "a" / "itself").symlink_to(inside)
    assert list(find_clips(inside)) == ["a", "copy", "linked/b"]


def test_no_clip_is_in_both_splits(tmp_path):
    for count in (1, 2, 3, 10, 11, 25):
        np.save(tmp_path / "clips.npy", np.stack([array_of([10 * i + j for j in range(2)]) for i in range(count)]))
        seen = {}
        for split in ("train", "eval"):
            draw = open_clips(tmp_path / "clips.npy", split)
            played = (islice(draw(np.random.default_rng(seed)), 2) for seed in range(40 * count))
            seen[split] = {int(frame[0, 0, 0]) for clip in played for frame in clip}
        assert seen["train"] | seen["eval"] == {10 * i + j for i in range(count) for j in range(2)}
        assert not seen["train"] & seen["eval"] and len(seen["eval"]) == (2 * -(-count // 10) if count > 1 else 1)


def test_frames_play_in_natural_order(tmp_path):
    write_frames(tmp_path / "clip", [10 * i for i in range(13)], "{}.jpg")
    (tmp_path / "clip" / ".5.jpg").write_bytes(b"hidden")
    levels = backgrounds.read_clip(tmp_path / "clip").mean((1, 2, 3))
    assert levels == pytest.approx([10 * i for i in range(13)], abs=2)


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_a_video_is_turned_as_its_file_says(tmp_path, degrees):
    import av

    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:32, 32:] = 255  # upper right
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 64, "yuv420p", 4_000_000
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
    # The matrix in the track's header, as a telephone writes it: turn clockwise to show.
    cos, sin = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    data = (tmp_path / "a.mp4").read_bytes()
    upright = np.array([1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30], ">i4").tobytes()
    turned = np.array([cos << 16, sin << 16, 0, -sin << 16, cos << 16, 0, 0, 0, 1 << 30], ">i4").tobytes()
    start = data.index(upright, data.index(b"tkhd"))
    (tmp_path / "a.mp4").write_bytes(data[:start] + turned + data[start + len(turned) :])
    expected = np.rot90(picture, -degrees // 90)
    assert np.abs(frames(tmp_path, count=1)[0].astype(int) - expected).mean() < 5


# ---- 3. What identifies the data ----


def test_a_fingerprint_moves_with_its_data_and_changes_with_them(tmp_path, monkeypatch):
    tree(tmp_path / "here", *pictures("a"), "b.mp4")
    first = fingerprint(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    assert first == fingerprint(tmp_path / "elsewhere") == fingerprint("here") and len(first) == 16
    (tmp_path / "here" / "b.mp4").write_bytes(b"longer")
    tree(tmp_path / "elsewhere", "a/00003.jpg")
    assert len({first, fingerprint("here"), fingerprint("elsewhere"), fingerprint("procedural")}) == 4
    np.save("one.npy", array_of([1, 2]))
    np.save("two.npy", array_of([3, 2]))
    assert fingerprint("one.npy") != fingerprint("two.npy")
    tree(tmp_path / "odd", os.fsdecode(b"\xff.mp4"), "b.mp4")
    assert len(fingerprint("odd")) == 16


def test_a_summary_is_one_line(tmp_path):
    np.save(tmp_path / "one.npy", array_of(LEVELS))
    assert summary(tmp_path / "one.npy").endswith("501 frames of one video; its last tenth is for evaluation, the rest for training")


def test_the_file_works_alone(tmp_path):
    shutil.copy(backgrounds.__file__, tmp_path)
    write_frames(tmp_path / "clips" / "a", LEVELS)
    result = subprocess.run([sys.executable, "-I", "backgrounds.py", "clips"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and "one clip" in result.stdout and "(64, 64, 3)" in result.stdout, result.stderr
