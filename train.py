"""Train MuMMI, or one of its baselines, on one task: `python train.py --task finger_spin`.

The loop of Appendix A: environments step in worker processes; meanwhile the agent learns from
sequences drawn from the replay. Everything a run leaves is in its folder, `runs/<name>`:

    config.json      what `--help` lists
    metrics.jsonl    a line an episode, an evaluation and every `log_every` updates
    checkpoint.pt    after every evaluation and at SIGTERM, SIGHUP or Ctrl-C; `--resume runs/<name>`
                     goes on from there; checkpoint.previous.pt is the one before
    replay/          the collected episodes
    video-*.mp4      the world, and what the agent saw, did and got, in an evaluation episode
    events.out.*     metrics, video and more pictures for `tensorboard --logdir runs`

Tasks: finger_spin, walker_stand, walker_walk, walker_run, cup_catch, table_wiping, toy,
toy_two_cameras, toy_xy, or what gymnasium.make takes, like Hopper-v5 or my_package:Reach-v0.

Evaluate it with `python evaluate.py runs/<name>`. The help of an option ends with its value in the
paper, as in [Appendix B: 200], else in the authors' released code, [code: 50]; [ours] is in
neither. Dev. D1 is a row of the deviations in docs/paper.md.
"""

import sys
import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import count

import numpy as np
import torch

import envs as environments
from backgrounds import summary
from checkpoint import (Log, Progress, Stopped, StopSignals, check_backgrounds, create_folder, fail, restore,
                        save_checkpoint, say, write_config)  # fmt: skip
from config import decide, parse, run_folder, sensing
from envs import TASKS, WorkerError, seeds
from evaluate import act, run_episodes
from fast import choose_precision, restart_with_quiet_threads
from methods import make_agent
from pictures import gif, of_evaluation, write_video
from replay import Batches, Replay, replay_fields

ROUND = 1000  # decisions between resets of all environments, where episodes differ in length

# ---- 1. The protocol -----------------------------------------------------------------------------


def updates_due(config, steps):
    """Number of updates that are due after `steps` environment steps."""
    if steps < config.prefill:
        return 0
    return config.first_updates + int((steps - config.prefill) * config.updates_per_1000 / 1000)


def spare_rows(config, envs):
    """Rows to keep beyond the replay's capacity: as many as two checkpoint intervals write."""
    length, repeat = (envs.get_attr(x)[0] for x in ("episode_steps", "action_repeat"))
    episodes = config.eval_every // (repeat * length) + 2 * config.num_envs
    return min(2 * episodes * (length + ROUND * (config.task not in TASKS) + 1), config.capacity)


def random_action(config, rng, action, first, t):
    """The random phase's next action (num_envs, A): uniform, or the untrained actor's, tanh of a Gaussian.  Dev. D27

    first  (num_envs,)  where episodes begin; actions are redrawn there and every `prefill_hold` decisions
    """
    if not config.prefill_hold:
        return rng.uniform(-1, 1, action.shape).astype(np.float32)
    drawn = np.tanh(config.initial_std * rng.standard_normal(action.shape)).astype(np.float32)
    return np.where((first | (t % config.prefill_hold == 0))[:, None], drawn, action)


def standardise(model, replay):
    """Set the mean and deviation by which the model scales each vector, from present readings."""
    present = replay.rows_of("present").astype(bool)
    for m, (name, shape) in enumerate(model.modalities.items()):
        if len(shape) == 1 and present[:, m].any():
            seen = replay.rows_of(name)[present[:, m]].astype(np.float64)
            getattr(model, f"mean_{m}").copy_(torch.tensor(seen.mean(0)))
            std = seen.std(0)  # if constant in the random phase, 1: it may move later
            getattr(model, f"std_{m}").copy_(torch.tensor(np.where(std < 1e-6, 1, std.clip(1e-3))))


# ---- 2. The loop ---------------------------------------------------------------------------------


def learn(agent, batches, config, log, progress, check):
    """Make all updates that are due after so many environment steps."""
    due = updates_due(config, progress.steps)
    while len(batches.replay) and progress.updates < due:
        started = time.perf_counter()
        if progress.updates == 0 and config.standardise == "on":
            standardise(agent.model, batches.replay)
        if progress.updates == 0 and agent.device.type == "cuda":
            say("the first updates compile kernels and capture CUDA graphs: up to two minutes")
        batch = batches.next()
        log.add(agent.update(batch, behaviour=progress.updates >= config.model_updates), batch)
        progress.updates += 1
        log.learning(progress.steps)
        if progress.updates <= config.first_updates:
            log.show(progress.steps, f"learning {progress.updates} of {config.first_updates}")
        if progress.updates == config.model_updates + 2 and agent.device.type == "cpu":  # the second whole one
            left = (updates_due(config, config.steps) - progress.updates) * (time.perf_counter() - started)
            text = f"{left / 3600:.1f} hours" if left > 3600 else f"{left / 60:.0f} min" if left > 60 else "a minute"
            say(f"no GPU: the updates left will take about {text} on this CPU")
        if progress.updates % config.log_every == 0:
            log.write(progress.steps, {"updates": progress.updates, **log.means()})
        check()


def collect(config, agent, envs, batches, log, progress, check):
    """Collect an episode in every environment, and make all updates that are due by then.

    If episodes differ in length, each environment runs for ROUND decisions, then to the end of its episode.

    check    called after every decision and update: it may raise; progress and replay are up to date then
    """
    replay, repeat = batches.replay, envs.get_attr("action_repeat")[0]
    # Seeds depend on the step alone: neither evaluations nor a stop change the episodes that follow.
    observation, _ = envs.reset(seed=seeds(config.seed, progress.steps, count=config.num_envs))
    memory, first = agent.initial_memory(config.num_envs), np.ones(config.num_envs, bool)
    action, reward = np.zeros(envs.action_space.shape, np.float32), np.zeros(config.num_envs)
    done = terminated = over = ~first
    replay.begin(config.num_envs)
    for t in count():
        if done.any():
            batches.wait()
        step = {**observation, "action": action, "reward": reward, "continues": 1.0 - terminated, "first": first}
        for episode in replay.record(step, done):
            log.write(progress.steps, {"train_return": float(episode["reward"].sum())})
        over = over | (done & (t >= ROUND))
        if done.all() or over.all():
            replay.cut(config.batch_length)  # episodes that are still under way
            learn(agent, batches, config, log, progress, check)  # the updates due by now
            return batches.drop()
        check()

        if progress.updates == 0:
            action = random_action(config, batches.rng, action, first, t)
        else:
            action, memory = act(agent, memory, observation, first, explore=True)
        envs.step_async(action)
        learn(agent, batches, config, log, progress, check)  # environments step meanwhile
        observation, reward, terminated, truncated, _ = envs.step_wait()

        first, done = done, terminated | truncated  # the step after an episode's last is a reset,
        action = np.where(first[:, None], 0, action)  # without an action
        progress.steps += repeat * int((~first).sum())
        log.show(progress.steps)


def earned_return(seen, discount):
    """The mean discounted sum of the rewards that followed a step: what `imagined_return` should be.

    seen  from `run_episodes`; where time cut an episode off, rewards are assumed to go on alike
    """
    reward, continues = (np.array([step[name] for step in seen]) for name in ("reward", "continues"))  # (T, num_envs)
    ends = (~np.isnan(reward) & (continues == 0)).any(0) | (discount == 1)
    total = weight = following = steps = np.zeros(len(ends))
    for r in reversed(reward):
        on = ~np.isnan(r)
        following, steps = on * (np.nan_to_num(r) + discount * following), on * (1 + discount * steps)
        total, weight = total + following, weight + np.where(ends, on, (1 - discount) * steps)
    return float(total.sum() / weight.sum())


def evaluate(config, agent, envs, log, progress, folder, save, check):
    """Let the agent act in evaluation episodes; log, film and save."""
    returns, seen = run_episodes(agent, envs, seeds(config.seed, count=config.eval_episodes), check, film=True)
    mean, std = float(returns.mean()), float(returns.std())
    earned = earned_return(seen, config.discount)
    values = {"updates": progress.updates, "eval_return": mean, "eval_std": std, "earned_return": earned}
    log.write(progress.steps, values)
    write_video(folder / f"video-{progress.steps:08}.mp4", seen)
    log.show_pictures(progress.steps, of_evaluation(agent.model, seen, config.method), gif(seen))
    progress.evaluated = progress.steps
    save()
    say(f"step {progress.steps}: return {mean:.1f} ± {std:.1f} over {len(returns)} episodes; discounted, "
        f"{earned:.3g} was earned and {log.imagined:.3g} imagined")  # fmt: skip


def main(config):
    """Train from the configuration; see the module's docstring for what it leaves."""
    folder, config = run_folder(config), decide(config)
    if config.backgrounds != "procedural":
        say(summary(config.backgrounds))
    if config.task not in environments.TOY and not config.resume:
        small = "small networks for one CPU core, about two hours; --preset paper has the paper's sizes, for a GPU"
        paper = "the paper's sizes, for a GPU; --preset small has small networks for one CPU core"
        say(f"preset {config.preset}: {small if config.preset == 'small' else paper}")
    # Worker processes first: they are forked, and must not inherit a CUDA context.
    make = partial(environments.make_vector_env, config.task, **sensing(config))
    with (
        closing(make(num_envs=config.num_envs)) as envs,
        closing(make(num_envs=config.eval_episodes, split="eval")) as eval_envs,
    ):
        space, action_size = envs.single_observation_space, envs.single_action_space.shape[0]
        agent = make_agent(config, space, action_size)
        config = replace(config, precision=choose_precision(config, agent.device))
        if not config.resume:
            create_folder(folder, config)

        with closing(Log(folder, config.steps)) as log, StopSignals(folder) as stop:
            check_backgrounds(folder, config.backgrounds)
            fields = replay_fields(space, action_size, config.continuation == "on", config.task not in TASKS)
            replay = Replay(folder / "replay", fields, config.capacity, spare_rows(config, envs))
            rng = np.random.default_rng(config.seed)
            progress = restore(folder, agent, replay, rng, log) if config.resume else Progress()
            if progress.evaluated >= config.steps:
                say(f"{folder} is finished at step {progress.steps} and stays as it is; --steps {2 * progress.steps} "
                    "would train on")  # fmt: skip
            else:
                write_config(folder, config)
            batches = Batches(replay, config, rng, agent.device)
            save = partial(save_checkpoint, folder, agent, replay, rng, log, config, progress)
            try:
                while progress.evaluated < config.steps:
                    until = min((progress.evaluated // config.eval_every + 1) * config.eval_every, config.steps)
                    while progress.steps < until:
                        collect(config, agent, envs, batches, log, progress, stop.check)
                    evaluate(config, agent, eval_envs, log, progress, folder, save, stop.check)
            except (Stopped, WorkerError):
                # Keep all that was learned and seen: episodes under way end here.
                batches.drop()
                replay.cut(config.batch_length)
                save()
                raise
    say(f"{folder}: trained for {progress.steps:,} steps; next: python evaluate.py {folder}")


if __name__ == "__main__":
    restart_with_quiet_threads()
    try:
        main(parse(sys.argv[1:], __doc__))
    except (Exception, KeyboardInterrupt) as error:
        fail("train.py", error)
