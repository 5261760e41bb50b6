"""Pictures of what an agent sees, predicts and relies on: for TensorBoard and for videos.

    pictures = of_evaluation(agent.model, seen, "mummi")   # {name: (height, width, 3) uint8}
    write_video(Path("episode.mp4"), seen)                # world, sensors, action and reward

seen  one dictionary a decision, from `evaluate.run_episodes`. Everything here shows the first environment.

Shapes: T decisions, M sensors, A action size, D_f size of the fused code.
"""

import gc
import io
import itertools
import math
from functools import lru_cache

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps

from mssm import MAX_DEPTH, MIN_STD
from mummi_loss import info_nce, log_density_ratio, log_inner_product, mutual_information
from checkpoint import write_file
from envs import RESERVED

SIDE = 192  # pixels, of a panel of a film
LABEL = 24  # pixels, height of the line above a panel
STRIP = 16  # pixels, height of the line below bars
PAPER = 232  # behind panels: a white one has edges
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")  # Okabe and Ito's


# ---- 1. Panels -----------------------------------------------------------------------------------


def panel(x, present=True, limits=(0, 1), side=128):
    """One reading as a picture: colour, depth in grey, a vector as bars between `limits`, or a cross if missing."""
    if not present:
        cross = np.eye(64, dtype=bool) | np.eye(64, dtype=bool)[::-1]
        return np.repeat(np.where(cross, 90, 0).astype(np.uint8)[..., None], 3, axis=-1)
    if x.dtype == np.uint8:
        return x
    if x.ndim == 3:  # metres: near is white, nothing within 10 m black
        grey = (255 * (1 - np.clip(x, 0, MAX_DEPTH) / MAX_DEPTH)).astype(np.uint8)
        return np.repeat(grey, 3, axis=-1)
    return bars(x, limits, [f"{i}: {value:.2f}" if len(x) < 4 else f"{i}" for i, value in enumerate(x)], side)


def bars(values, limits, texts, side=128, gap=2, limit=None):
    """Values as bars from the line of 0, green up and orange down. (D,) -> (side, side, 3) uint8

    texts  below the bars, side by side; left out where there is no room
    limit  a value at which to draw a line, too
    """
    (low, high), picture, height = limits, np.full((side, side, 3), 30, np.uint8), side - STRIP
    gap = min(gap, side // (3 * len(values)))
    row = lambda value: round((height - 1) * float((high - np.clip(value, low, high)) / (high - low)))  # noqa: E731
    for i, value in enumerate(values):
        if not np.isnan(value):
            left, right = side * i // len(values) + gap, side * (i + 1) // len(values) - gap
            top, bottom = sorted((row(0), row(value)))
            picture[top : bottom + 1, left : max(right, left + 1)] = (90, 200, 120) if value >= 0 else (213, 94, 0)
    picture[[row(x) for x in (0, limit) if x is not None]] = 170
    picture[height:] = 0
    canvas = Image.fromarray(picture)
    for i, text in enumerate(texts if len(texts) <= side / 16 else ()):
        place = side * (i + 0.5) / len(texts), side - STRIP / 2
        ImageDraw.Draw(canvas).text(place, text, (220, 220, 220), ImageFont.load_default(11), anchor="mm")
    return np.asarray(canvas)


def limits_of(values):
    """The lowest and the highest of all numbers and of 0."""
    numbers = [0.0, *(float(x) for value in values for x in np.ravel(value) if np.isfinite(x))]
    return (min(numbers), max(numbers)) if any(numbers) else (0.0, 1.0)


def limits_of_vectors(seen):
    """{name: `limits_of` its readings} of every sensor that is a vector."""
    readings = lambda m, name: [step[name][0] for step in seen if step["present"][0, m]]  # noqa: E731
    return {x: limits_of(readings(m, x)) for m, x in enumerate(sensors(seen)) if seen[0][x].ndim == 2}


def square(picture, side):
    """A picture of any size, as large as it can be in a black square (side, side, 3) uint8."""
    image = Image.fromarray(np.asarray(picture, np.uint8)).convert("RGB")
    way = Image.Resampling.BOX if max(image.size) > side else Image.Resampling.NEAREST
    return np.asarray(ImageOps.pad(image, (side, side), way))


def labelled(picture, label, side=128, alarm=False):
    """A picture in a square below a line of text, which an alarm makes red, as uint8."""
    return np.concatenate([line_of_text(label, side, alarm), square(picture, side)])


@lru_cache(maxsize=64)  # a video repeats most of its labels in every frame
def line_of_text(text, width, alarm=False):
    """Black or red, in the largest letters that fit, (LABEL, width, 3) uint8."""
    canvas = Image.new("RGB", (width, LABEL), (PAPER,) * 3)
    fonts = [ImageFont.load_default(size) for size in (14, 13, 12, 11, 10, 9)]
    font = next((font for font in fonts if font.getlength(text) <= width - 6), fonts[-1])
    ImageDraw.Draw(canvas).text((4, LABEL / 2), text, (200, 30, 30) if alarm else (0, 0, 0), font, anchor="lm")
    return np.asarray(canvas)


def grid(pictures, most=5):
    """Tile pictures of one size, with thin gaps, in the fewest rows of equal length, at most `most` pictures."""
    rows = math.ceil(len(pictures) / most)
    pictures = [np.pad(x, ((0, 4), (0, 4), (0, 0)), constant_values=PAPER) for x in pictures]
    pictures += [np.full_like(pictures[0], PAPER)] * (-len(pictures) % rows)
    return np.concatenate([np.concatenate(row, 1) for row in np.split(np.array(pictures), rows)])


def first_episode(seen):
    """Without the decisions that waited for other environments, which have no reward."""
    return [step for step in seen if not np.isnan(step["reward"][0])]


def sensors(seen):
    """Names of the modalities, in the order of `present`."""
    return [name for name in seen[0] if name not in RESERVED]


# ---- 2. Videos -----------------------------------------------------------------------------------


def frames(seen, every=1):
    """The world, what the agent saw of it, its action and its reward, decision by decision: pictures of one size."""
    seen = first_episode(seen)
    rewards = [float(step["reward"][0]) for step in seen]
    limits = limits_of_vectors(seen) | {"reward": limits_of(rewards), "action": (-1, 1)}
    labels = {name: f"{name}, {low:.3g} to {high:.3g}" for name, (low, high) in limits.items()}
    watched = [m for m in range(len(sensors(seen))) if any("trusted" in x and x["lying"][0, m] for x in seen)]
    for t in range(0, len(seen), every):
        step, here, panels = seen[t], seen[t]["present"][0], []
        if "rendered" in step:
            text = f"world; {sum(here)} of {len(here)} sensors work"
            panels.append(labelled(step["rendered"], text, SIDE, alarm=not any(here)))
        for name, p, told in zip([*sensors(seen), "action"], [*here, 1], [*verdicts(step, here), ""]):
            shown = panel(step[name][0], p, limits.get(name), SIDE)
            panels.append(labelled(shown, f"{name}: {told}" if told else labels.get(name, name), SIDE, alarm=told))
        for m in watched:
            last = [math.nan] * (63 - t) + [min(3.0, step["suspicion"][0, m]) for step in seen[max(0, t - 63) : t + 1]]
            label = f"{sensors(seen)[m]}: suspicion, 0 to 3"
            panels.append(labelled(bars(last, (0, 3), ["above 1 it is not believed"], SIDE, 0, 1), label, SIDE))
        text = f"now {rewards[t]:.2f}, sum {sum(rewards[: t + 1]):.1f}"
        last = [math.nan] * (63 - t) + rewards[max(0, t - 63) : t + 1]
        panels.append(labelled(bars(last, limits["reward"], [text], SIDE, gap=0), labels["reward"], SIDE))
        yield grid(panels)


def verdicts(step, here):
    """What to say of each sensor: that it is missing, that it lies, that it is not believed; or nothing."""
    M = len(here)
    lying, trusted = (step.get(name, [[default] * M])[0] for name, default in (("lying", 0), ("trusted", 1)))
    return [
        "missing" if not p else ", ".join(["lies"] * bool(lies) + ["not believed"] * (not t))
        for p, lies, t in zip(here, lying, trusted)
    ]


def write_video(path, seen, fps=20):
    """An episode as an MP4; a sensor is crossed out where it was missing."""
    import av

    data = io.BytesIO()
    with av.open(data, "w", format="mp4") as container:
        stream = None
        for picture in frames(seen):
            if stream is None:
                stream = container.add_stream("libx264", rate=fps, pix_fmt="yuv420p", options={"preset": "veryfast"})
                stream.height, stream.width = picture.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
    write_file(path, data.getbuffer())


def gif(seen, most=60, fps=10):
    """An episode in at most so many frames, as the bytes of a GIF: what TensorBoard can play."""
    every = math.ceil(len(first_episode(seen)) / most)
    octree = Image.Quantize.FASTOCTREE  # 50 times as fast as the default
    first, *others = [Image.fromarray(x).quantize(method=octree) for x in frames(seen, every=every)]
    data = io.BytesIO()
    first.save(data, "GIF", save_all=True, append_images=others, duration=1000 // fps, loop=0)
    return data.getvalue()


# ---- 3. What the model makes of an episode -------------------------------------------------------


def episode(model, seen):
    """What `MSSM.observe` reads: observation {name: (T, 1, ...)}, present (T, 1, M), action (T, 1, A)."""
    device = next(model.parameters()).device
    stack = lambda name: torch.as_tensor(np.stack([step[name][:1] for step in seen])).to(device)  # noqa: E731
    action = stack("action").float()
    return {name: stack(name) for name in sensors(seen)}, stack("present"), torch.cat([action[:1] * 0, action[:-1]])


def in_units(x):
    """What a decoder predicts, back in the units of its sensor: the inverse of `mssm.scale`."""
    if x.ndim == 3 and x.shape[-1] == 3:
        return (255 * (x + 0.5)).clamp(0, 255).byte().cpu().numpy()
    return (MAX_DEPTH * (x + 0.5) if x.ndim == 3 else x).cpu().numpy()


def seen_picture(seen, moments=8):
    """Moments of the episode, a row a sensor, crossed out where missing."""
    times, limits = np.linspace(0, len(seen) - 1, moments).astype(int), limits_of_vectors(seen)
    shown = [labelled(seen[t]["rendered"], f"world, t = {t}") for t in times if "rendered" in seen[t]]
    for m, name in enumerate(sensors(seen)):
        for t in times:
            sensor = panel(seen[t][name][0], seen[t]["present"][0, m], limits.get(name))
            shown.append(labelled(sensor, f"{name}, t = {t}"))
    return grid(shown, moments)


def open_loop_picture(model, seen, given=10, ahead=(1, 2, 4, 8, 12, 16, 24)):
    """What the decoders show of `given` decisions that were seen, and then by imagination alone.

    Above each prediction is what the sensor gave. The actions are those that were executed.
    """
    (observation, present, action), given = episode(model, seen), min(given, len(seen))
    filtered = model.observe({k: x[:given] for k, x in observation.items()}, present[:given], action[:given])
    state = type(model.initial_state(1))(filtered.h[-1], filtered.s_c[-1])
    latents = list(model.latent(filtered.h, filtered.s_c))
    for t in range(given, min(given + max(ahead), len(seen))):
        state = model.imagine_step(state, action[t])
        latents.append(model.latent(*state))
    decoded = model.decode(torch.cat(latents))  # {name: (T, ...)}
    for m, name in enumerate(sensors(seen)):
        decoded[name] = decoded[name] * getattr(model, f"std_{m}") + getattr(model, f"mean_{m}")  # a vector's units
    times = [0, given - 1] + [given - 1 + k for k in ahead if given - 1 + k < len(latents)]
    rows, limits = [], limits_of_vectors(seen)  # all rows, one after the other
    for m, name in enumerate(sensors(seen)):
        kinds = ["model, seen so far" if t < given else f"imagined, {t - given + 1} ahead" for t in times]
        shown = [panel(seen[t][name][0], seen[t]["present"][0, m], limits.get(name)) for t in times]
        predicted = [panel(in_units(decoded[name][t]), True, limits.get(name)) for t in times]
        rows += [labelled(x, f"{name}, t = {t}") for x, t in zip(shown, times)]
        rows += [labelled(x, kind) for x, kind in zip(predicted, kinds)]
    return grid(rows, len(times))


def to_array(figure):
    """A matplotlib figure as (height, width, 3) uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def calibration_picture(model, seen):
    """How sure every sensor's expert is, and how much of the product is its own, over an episode.

    A model that relies on one sensor alone shows one colour below, whatever is present.
    """
    observation, present, _ = episode(model, seen)
    present = present.bool()  # (T, 1, M)
    fused = model.fuse(model.encode(observation, present), present)
    share = model.expert_shares(fused, present)[:, 0].T.cpu().numpy()  # (M, T)
    log_std = torch.where(present, fused.expert_std.log().mean(-1), math.nan)[:, 0].T.cpu().numpy()
    figure = Figure(figsize=(9, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    bottom = np.zeros(len(seen))
    for name, colour, line, part in zip(sensors(seen), itertools.cycle(COLOURS), log_std, share):
        above.plot(line, color=colour, label=name)
        below.fill_between(np.arange(len(seen)), bottom, bottom + part, color=colour, step="mid", linewidth=0)
        bottom += part
    above.axhline(math.log(MIN_STD), color="0.6", linestyle=":", label="surest possible")
    highest = max(math.log(MIN_STD) + 1, np.nanmax(log_std, initial=-math.inf) + 0.2)
    above.set(ylabel="mean log std", ylim=(math.log(MIN_STD) - 0.1, highest))
    above.set_title("how sure each expert is: lower is surer; gaps where its sensor is missing")
    above.legend(loc="upper right", ncols=min(len(share) + 1, 6))
    title = "whom the product of experts listens to; white where nothing is present"
    below.set(ylabel="share of the precision", ylim=(0, 1), xlim=(0, len(seen)), xlabel="decision", title=title)
    return to_array(figure)


def density_ratios(model, filtered, fused_too):
    """{name: log f (T, T)} and {name: present (T,)} of one filtered episode, with the heads that the model has."""
    latent = model.latent(filtered.h, filtered.s_c)[:, 0]
    fused, present = filtered.fused, filtered.present[:, 0]  # (T, M)
    if model.fusion == "concatenate":  # [CVRL]
        log_f = {"all sensors": log_inner_product(model.project_z(latent), model.project_x(fused.s_f[:, 0]))}
        return log_f, {"all sensors": present.any(-1)}
    means = dict(zip(model.modalities, fused.expert_mean[:, 0].unbind(1)))
    if fused_too:
        means["product of all"] = fused.mean[:, 0]
    log_f = {name: log_density_ratio(model.g(latent), mean) for name, mean in means.items()}
    return log_f, dict(zip(log_f, [*present.T, present.any(-1)]))


def similarity_picture(model, seen, fused_too, most=100):
    """Which observation every latent points to, Eq. (15), among those of an episode: best on the diagonal.

    fused_too  also of the product's mean, which MuMMI-b learns with
    """
    log_f, present = density_ratios(model, model.observe(*episode(model, seen[:most])), fused_too)
    rows = math.ceil(len(log_f) / 4)
    columns = math.ceil(len(log_f) / rows)
    figure = Figure(figsize=(3.6 * columns, 4 * rows + 0.3), layout="constrained")
    for i, (name, ratio) in enumerate(log_f.items()):
        axis, here = figure.add_subplot(rows, columns, i + 1), present[name]
        probability = ratio.masked_fill(~here, -math.inf).softmax(-1).cpu().numpy()
        shown = np.where(here.cpu().numpy() & here.cpu().numpy()[:, None], probability, np.nan)
        axis.imshow(np.sqrt(shown), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axis.set_facecolor("0.85")
        nats, best = float(mutual_information(info_nce(ratio, here), here)), math.log(max(1, int(here.sum())))
        axis.set(title=f"{name}: {nats:.1f} of {best:.1f} nats", xlabel="observation at step", ylabel="latent at step")
    figure.suptitle("InfoNCE within one episode: dark where a latent points to; grey where missing", fontsize=10)
    return to_array(figure)


@torch.no_grad()
def of_evaluation(model, seen, method):
    """{name: picture} of an evaluation's first episode: whatever the model of that method has the heads for."""
    seen, device = first_episode(seen), next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # looking changes nothing of what follows
        pictures = {"seen": seen_picture(seen)}
        if hasattr(model, "decoders"):
            pictures["open_loop"] = open_loop_picture(model, seen)
        else:
            pictures["similarity"] = similarity_picture(model, seen, fused_too=method == "mummi_b")
        if model.fusion == "product":
            pictures["calibration"] = calibration_picture(model, seen)
    gc.collect()  # matplotlib's figures refer to themselves: 40 MB of them would wait for the collector
    return pictures
