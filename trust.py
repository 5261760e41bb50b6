"""Which readings to believe: sensors that lie while they are flagged present, found by the density ratio.

MuMMI learns log f(x^m, z) = -|| mu^m(x^m) - g(z) ||^2, Eq. (16): high where a reading and a state belong together.
Before a reading is fused, `Trust` compares it with the state that was predicted without it, with the other readings,
and with its sensor's own last ones. What is usual is measured on the run's own episodes, in which no sensor lies: no
fault is ever shown to it.

    usual = measure(agent.model, replay)
    trust = Trust(agent.model, usual, false_alarms=0.005)
    trusted = trust(memory, observation, present, first)     # (B, M): give it to `Agent.act` in place of `present`

Shapes: T steps, B sequences, M modalities, D size of a code: D_f, or a reading's with decoders. Time first.
"""

import math
from collections import deque

import numpy as np
import torch

from mssm import State, gaussian, sample

AHEAD = 14  # steps, the longest prediction that readings are held against; as long as the longest missing segment
RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)  # of false alarms, for which distances are kept
ROWS = 6000  # steps of the newest episodes that are measured


# ---- 1. Codes and distances ----------------------------------------------------------------------


def read(model, observation, present):
    """Encode each sensor's readings, with its expert's log std. -> M codes (T, B, D), log std (T, B, M)

    A code is the expert's mean mu^m(x^m); of a model with decoders it is x^m itself.
    """
    features = model.encode(observation, present)
    experts = [gaussian(expert(x)) for expert, x in zip(model.experts, features)]
    log_std = torch.stack([std.log().mean(-1) for _, std in experts], -1)
    if hasattr(model, "decoders"):
        return [x.flatten(2) for x in model.scale(observation, present).values()], log_std
    return [mean for mean, _ in experts], log_std


def predict(model, state, action):
    """Predict each sensor's next code: g(z), or the decoders' output. -> M codes (N, D), h, the prior (N, 2 D_c)"""
    h = model.transition(state, action)
    prior = model.prior(h)
    latent = model.latent(h, gaussian(prior)[0])
    if hasattr(model, "decoders"):
        return [x.flatten(1) for x in model.decode(latent).values()], h, prior
    return [model.g(latent).float()] * len(model.modalities), h, prior


def distance(a, b):
    """-log f of Eq. (16), sensor by sensor. M codes (..., D), M codes (..., D) -> (..., M)"""
    return torch.stack([(x - y).square().sum(-1) for x, y in zip(a, b)], -1)


def between(model, codes):
    """`distance` of all pairs of sensors; 0 if they share no code. M codes (..., D) -> (..., M, M)"""
    if hasattr(model, "decoders"):
        return codes[0].new_zeros(*codes[0].shape[:-1], len(codes), len(codes))
    return torch.stack([distance([x] * len(codes), codes) for x in codes], -2)


# ---- 2. What is usual ----------------------------------------------------------------------------


def measure(model, replay):
    """`usual_distances` of the newest episodes of a replay, about ROWS steps from their beginnings."""
    (starts, rows, _), device = replay.episodes.T, next(model.parameters()).device
    length = int(np.median(rows[-50:]))
    parts = [(b, 0, start, length) for b, start in enumerate(starts[rows >= length][-max(1, ROWS // length) :])]
    batch = replay.read(parts, replay.buffers(len(parts), length))
    batch = {name: torch.as_tensor(x, device=device) for name, x in batch.items()}
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(0)
        return usual_distances(model, batch, batch["present"].bool(), batch["action"])


def usual_distances(model, observation, present, action):
    """Quantiles of the distances of honest readings, from episodes {name: (T, B, ...)}, (T, B, M), (T, B, A).

    surprise  (R, AHEAD, M)  from what was predicted 1 to AHEAD steps before; exceeded at the RATES (R,)
    quarrel   (R, M, M)      between two sensors' codes at one step; exceeded at the RATES. Infinite with decoders
    repeat    (R, M)         from the nearest of the sensor's own last AHEAD codes; lower quantiles at the RATES
    log_std   (R, M)         median of the expert's log std, repeated R times
    """
    (said, log_std), filtered = read(model, observation, present), model.observe(observation, present, action)
    rates = torch.tensor(RATES, device=action.device)

    def quantiles(x, here, at):
        x = x[here][torch.randperm(int(here.sum()))[:100_000]]  # torch.quantile takes no more
        return torch.quantile(x, at) if len(x) else torch.full_like(at, math.inf)

    def each(x, here, at):
        return torch.stack([quantiles(a, b, at) for a, b in zip(x.unbind(-1), here.unbind(-1))], -1)

    surprise, state, known = [], State(filtered.h, filtered.s_c), present.any(-1)
    for k in range(1, AHEAD + 1):
        state, known = State(*(x[:-1].flatten(0, 1) for x in state)), known[:-1]
        expected, h, prior = predict(model, state, action[k:].flatten(0, 1))
        far = distance([x[k:].flatten(0, 1) for x in said], expected)
        surprise.append(each(far, (present[k:] & known.unsqueeze(-1)).flatten(0, 1), 1 - rates))
        state = State(h, sample(prior, torch.randn_like(state.s_c)))
        state = State(*(x.unflatten(0, known.shape) for x in state))
    both = present.unsqueeze(-1) & present.unsqueeze(-2)
    quarrel = each(between(model, said).flatten(-2), both.flatten(-2), 1 - rates).unflatten(-1, both.shape[-2:])
    nearest = torch.full(present.shape, math.inf, device=action.device)
    for k in range(1, AHEAD + 1):
        near, both = distance([x[k:] for x in said], [x[:-k] for x in said]), present[k:] & present[:-k]
        nearest[k:] = torch.minimum(nearest[k:], near.masked_fill(~both, math.inf))
    return {
        "surprise": torch.stack(surprise, 1).cummax(1).values,
        "quarrel": torch.full_like(quarrel, math.inf) if hasattr(model, "decoders") else quarrel,
        "repeat": each(nearest, nearest.isfinite(), rates),
        "log_std": each(log_std, present, torch.full_like(rates, 0.5)),
    }


# ---- 3. The rule ---------------------------------------------------------------------------------


class Trust:
    """Decide, step by step, whose reading is fused: those whose suspicion is at most 1.

    A reading is dropped
    1. if it repeats itself, being nearer to one of its sensor's last AHEAD readings than honest ones are;
    2. if it quarrels with another, being farther from it than honest ones are, and is the more surprising of the two:
       by a running average of -log f times its expert's variance, or because it is an exact repetition;
    3. if it is farther from the prediction than honest ones are that many steps after its sensor was last believed.
       After AHEAD steps, this test is skipped.

    model         with fusion "product", see `mssm.py`
    usual         from `measure`
    false_alarms  share of honest readings that each of these tests may reject, one of RATES
    Raises ValueError where the model has no experts, and for another rate.
    """

    def __init__(self, model, usual, false_alarms=0.005):
        if false_alarms not in RATES:
            raise ValueError(f"the rate of false alarms is {false_alarms}; choose one of {', '.join(map(str, RATES))}")
        if model.fusion != "product":
            raise ValueError("fusion by concatenation has no experts: nothing tells which of its sensors lies")
        self.model, self.suspicion = model, torch.empty(0)  # (B, M) of the last step
        at, device = RATES.index(false_alarms), next(model.parameters()).device
        self.surprise, self.quarrel, self.repeat, self.log_std = (
            usual[name][at].to(device) for name in ("surprise", "quarrel", "repeat", "log_std")
        )
        self.surprise = torch.cat([self.surprise, torch.full_like(self.surprise[:1], math.inf)])  # (AHEAD + 1, M)

    @torch.no_grad()
    def __call__(self, memory, observation, present, first):
        """Arguments as for `Agent.act`; returns (B, M) bool, where a sensor is present and believed."""
        present, goes_on = present.bool(), ~first.unsqueeze(-1)
        said, log_std = read(self.model, {k: x.unsqueeze(0) for k, x in observation.items()}, present.unsqueeze(0))
        said, log_std = [x[0] for x in said], log_std[0]
        expected, _, _ = predict(self.model, State(*(x * goes_on for x in memory.state)), memory.action * goes_on)
        if first.all():  # silent: steps since a sensor was believed; past: [(codes, where they are of this episode)]
            self.silent, self.odd = torch.full_like(present, AHEAD, dtype=torch.long), torch.zeros_like(log_std)
            self.past = deque()
        silent = torch.where(goes_on, self.silent, AHEAD)
        self.past = deque([(codes, seen & goes_on) for codes, seen in self.past], AHEAD)

        nearest, far = torch.full_like(log_std, math.inf), distance(said, expected)  # (B, M)
        for codes, seen in self.past:
            nearest = torch.minimum(nearest, distance(said, codes).masked_fill(~(seen & present), math.inf))
        repeat = torch.where(nearest < self.repeat, self.repeat / nearest, 0)
        heard = present & (repeat <= 1)
        odd = far / self.surprise[0] * (2 * (log_std - self.log_std)).exp()
        odd = torch.where(self.past[-1][1] & present, (odd + self.odd) / 2, odd) if self.past else odd
        doubt = odd.masked_fill(nearest == 0, math.inf)
        worse = (doubt.unsqueeze(-1) > doubt.unsqueeze(-2)) & heard.unsqueeze(-1) & heard.unsqueeze(-2)
        quarrel = torch.where(worse, between(self.model, said) / self.quarrel, 0).amax(-1)
        surprise = far / self.surprise.gather(0, silent)
        self.suspicion = torch.where(present, torch.stack([repeat, quarrel, surprise]).amax(0), 0)

        trusted = present & (self.suspicion <= 1)
        self.silent, self.odd = torch.where(trusted, 0, (silent + 1).clamp(max=AHEAD)), odd
        self.past.append((said, present))
        return trusted
