"""Moving backgrounds from files: find the clips of a source, split them, and read them as frames.

A source is a video, an array (.npy, or CVRL's natural_train.pkl), or a folder of videos or of folders of frames. Forms
of one clip, as in DAVIS (480p, Full-Resolution) and ILSVRC-VID (frames, snippets), count once; masks do not count.

    frames = open_clips("DAVIS", "train")(np.random.default_rng(0))     # an endless iterator of (64, 64, 3) uint8
    print(summary("DAVIS"))     # backgrounds DAVIS: 90 clips, 81 for training and 9 for evaluation
"""

import hashlib
import io
import itertools
import os
import pickle
import pickletools
import re
import sys
from pathlib import Path

import numpy as np

SIZE = 64  # pixels, height and width of a frame
MAX_FRAMES, MAX_PIXELS = 501, 2**26  # of a clip: an episode's worth; of a frame
VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}
FRAME_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png"}
FORMATS = "mov,mp4,m4v,matroska,webm,avi,mpeg,mpegvideo,mpegts,mjpeg,bmp_pipe,jpeg_pipe,png_pipe"
# Folders that hold no clips, and folders that hold a form of the clips: `480p/bear` and `Full-Resolution/bear` are one.
JUNK = re.compile(r"[.].*|__macosx|@eadir|[$]recycle.bin|lost[+]found|trash|thumb(nail)?s?|gt|"
                  r"(annotation|mask|label|segmentation|ground_?truth)s?(_.*)?", re.IGNORECASE)  # fmt: skip
FORM = re.compile(r"\d+p|\d+x\d+|[248]k|full-?resolution|jpegimages|frames|images|rgb|snippets|videos|clips", re.I)


# ---- 1. Find and split ----


def find_clips(source):
    """All clips by name, in natural order: each a video, a folder of frames, or an array (frames, 64, 64, 3)."""
    path = Path(source)
    if not os.path.exists(path):
        raise ValueError(f"backgrounds {path} do not exist or cannot be reached; give a path or 'procedural'")
    if path.suffix in (".npy", ".pkl"):
        return {str(i): array for i, array in enumerate(read_array(path))}
    if not path.is_dir():
        return {path.stem: path}
    found: dict = {}
    for data, pictures in walk(path):
        found.setdefault(clip_name(data.relative_to(path)), (data, pictures))  # of several forms, the first
    if not found:
        raise ValueError(f"backgrounds {path} hold neither videos nor folders of frames")
    several = {name: pair for name, pair in found.items() if pair[1] != 1}  # a single picture beside clips is none
    return {name: data for name, (data, _) in sorted((several or found).items(), key=lambda item: natural(item[0]))}


def walk(path):
    """Yield each video, and each folder of frames with their number, once; follow links to folders."""
    seen = {os.path.realpath(path): ()}

    def new(*parts):  # no link has led there before
        return seen.setdefault(os.path.realpath(Path(*parts)), parts) is parts

    def refuse(error):
        raise ValueError(f"backgrounds {error.filename} cannot be read: {error.strerror}") from error

    for folder, folders, names in os.walk(path, onerror=refuse, followlinks=True):
        folders[:] = [name for name in sorted(folders) if not JUNK.fullmatch(name) and new(folder, name)]
        suffixes = {name: Path(name).suffix.lower() for name in sorted(names) if not name.startswith(".")}
        videos = [name for name, suffix in suffixes.items() if suffix in VIDEO_SUFFIXES]
        yield from ((Path(folder, name), 0) for name in videos if new(folder, name))
        pictures = sum(suffix in FRAME_SUFFIXES for suffix in suffixes.values())
        if pictures and not videos:  # pictures beside videos are their thumbnails
            yield Path(folder), pictures


def clip_name(path):
    """The name that all forms of one clip share: its relative path without suffix and without FORM folders."""
    parts = [*path.parts[:-1], path.stem if path.suffix.lower() in VIDEO_SUFFIXES else path.name]
    return "/".join(part for part in parts if not FORM.fullmatch(part)) or "."


def natural(name):
    """A key to sort by in which 2 comes before 10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))], name


def open_clips(source, split):
    """A function draw(rng) that plays a clip of the split from a random frame on, to and fro for ever."""
    clips = list(find_clips(source).values())
    # Every tenth clip is for evaluation; of a lone one, the last tenth.
    mine = [clip for i, clip in enumerate(clips) if (i % 10 == 0) == (split == "eval")] if len(clips) > 1 else clips
    read_clip(mine[0], max_frames=1)  # fail here rather than in the midst of training

    def draw(rng):
        frames = read_clip(mine[rng.integers(len(mine))])
        if len(clips) == 1 and len(frames) > 1:
            cut = min(len(frames) - 1, round(0.9 * len(frames)))
            frames = frames[:cut] if split == "train" else frames[cut:]
        order = [*range(len(frames)), *range(len(frames) - 2, 0, -1)]
        start = rng.integers(len(frames))
        return (frames[i] for i in itertools.cycle(order[start:] + order[:start]))

    return draw


def summary(source):
    """One line: how many clips a source holds and how they are split."""
    clips = find_clips(source)
    count, held_out = len(clips), -(-len(clips) // 10)
    if count > 1:
        return f"backgrounds {source}: {count} clips, {count - held_out} for training and {held_out} for evaluation"
    if len(read_clip(next(iter(clips.values())), max_frames=2)) == 1:
        return f"backgrounds {source}: a single picture, the same in training and evaluation"
    clip = f"one clip, or the first {MAX_FRAMES} frames of one video"
    return f"backgrounds {source}: {clip}; its last tenth is for evaluation, the rest for training"


def fingerprint(source):
    """A hash of all clips' names and sizes, which identifies the data of a source wherever it lies."""
    if source == "procedural":
        return source

    def size(data):
        if isinstance(data, np.ndarray):
            return data.shape, hashlib.sha256(data[0].tobytes()).hexdigest()
        return len(frame_files(data)), next(iter(frame_files(data)), data).stat().st_size

    identity = [(name, size(data)) for name, data in find_clips(source).items()]
    return hashlib.sha256(repr(identity).encode("utf-8", "backslashreplace")).hexdigest()[:16]


# ---- 2. Read ----


def frame_files(folder):
    """The frames of a folder in natural order; none of a video."""
    pictures = (f for f in folder.glob("[!.]*") if f.suffix.lower() in FRAME_SUFFIXES)
    return sorted(pictures, key=lambda file: natural(file.name))


def read_clip(data, max_frames=MAX_FRAMES):
    """The first frames of a clip, scaled and turned as the file says: (frames, 64, 64, 3) uint8; an array as it is."""
    if isinstance(data, np.ndarray):
        return data
    import av

    pictures, frames = frame_files(data), []
    for file in pictures[:max_frames] or [data]:
        if not file.is_file():
            raise ValueError(f"background {file} is no file; remove it")
        try:
            # FFmpeg sees no picture's name, where "%d" would mean a series, and opens no playlist to other files.
            stream = io.BytesIO(file.read_bytes()) if pictures else open(file, "rb")
            with stream, av.open(stream, options={"format_whitelist": FORMATS}) as container:
                size = container.streams.video[0].codec_context
                if size is None or size.width * size.height > MAX_PIXELS:
                    raise ValueError("its codec is unknown, or it has more than 8,192 x 8,192 pixels")
                for frame in itertools.islice(container.decode(video=0), max_frames - len(frames)):
                    picture = frame.reformat(SIZE, SIZE, "rgb24", interpolation="AREA").to_ndarray()
                    frames.append(np.rot90(picture, round(frame.rotation / 90)))  # both count counterclockwise
        except Exception as error:  # a damaged file may raise anything
            raise ValueError(f"background {file} is not readable as video: {error}") from error
    if not frames:
        raise ValueError(f"background {data} holds no frames; remove it")
    return np.stack(frames)


def read_array(path):
    """The clips in a .npy or .pkl file, each (frames, 64, 64, 3) uint8."""
    try:
        if path.suffix == ".npy":
            array = np.lib.format.open_memmap(path, "r")
        else:
            with open(path, "rb") as file:
                for opcode, number, _ in pickletools.genops(file):
                    if "PUT" in opcode.name and number > path.stat().st_size:
                        raise ValueError("it asks for more memory than it can use")
                file.seek(0)
                array = np.asarray(ArrayUnpickler(file).load())
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"backgrounds {path} are not an array: {error}") from error
    if array.ndim in (4, 5) and array.shape[-3:] == (3, SIZE, SIZE):  # CVRL's have the colours first
        array = np.moveaxis(array, -3, -1)
    if array.dtype != np.uint8 or array.ndim not in (4, 5) or array.shape[-3:] != (SIZE, SIZE, 3) or not array.size:
        raise ValueError(f"backgrounds {path} are {array.dtype} {array.shape}; needed are uint8 "
                         "(frames, 64, 64, 3) or (videos, frames, 64, 64, 3)")  # fmt: skip
    return list(array) if array.ndim == 5 else [array]


class ArrayUnpickler(pickle.Unpickler):
    """Admit arrays and plain containers only: any other pickle may run any code."""

    def find_class(self, module, name):
        arrays = "multiarray._reconstruct numeric._frombuffer numpy.ndarray numpy.dtype _codecs.encode".split()
        if f"{module}.{name}".removeprefix("numpy.core.").removeprefix("numpy._core.") not in arrays:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an array")
        return super().find_class(module, name)


if __name__ == "__main__":
    print(clip_name(Path("JPEGImages/480p/bear")), sorted(["10.png", "9.png"], key=natural))
    for source in sys.argv[1:]:  # a folder of yours
        print(summary(source), fingerprint(source), next(open_clips(source, "train")(np.random.default_rng(0))).shape)
