"""What the tests share: small models, random batches, one thread, a seed before every test."""

import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import methods
import mssm
from config import Config
from mssm import MSSM

MODALITIES = {"rgb": (64, 64, 3), "depth": (64, 64, 1), "touch": (2,)}
T, B, M, A = 4, 3, 3, 2  # steps, sequences, modalities, action size
D_H, D_C, D_F, D_X = 12, 5, 16, 64
TINY = dict(d_h=D_H, d_c=D_C, d_f=D_F, hidden=16, units=16, channels=D_X // 32)

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would a run


LONG = "reliability sweep train docs fuzz fast methods envs wiping trust tools pictures".split()  # begin with these


def pytest_collection_modifyitems(items):
    """Long files first, so that no process waits for another's at the end; those that open OpenGL after those that fork."""
    rank = {f"test_{name}": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONG)))
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    np.random.seed(0)


def tiny_model(fusion="product", heads="g", **kwargs):
    """An MSSM of three modalities that takes milliseconds; `kind` is a class made of it."""
    return kwargs.pop("kind", MSSM)(MODALITIES, A, fusion, heads, **TINY | kwargs)


def random_present(steps=T):
    """(T, B, M): about half is missing; everything at one step, nothing at another."""
    present = torch.rand(steps, B, M) > 0.5
    present[steps // 2, 0], present[steps // 2, 1] = True, False
    return present


def random_batch(steps=T):
    """What `Agent.update` reads; zero-filled where absent."""
    present = random_present(steps)
    observation = {
        "rgb": torch.randint(0, 256, (steps, B, 64, 64, 3), dtype=torch.uint8),
        "depth": 10 * torch.rand(steps, B, 64, 64, 1),
        "touch": 5 * torch.rand(steps, B, 2),
    }
    for m, (name, x) in enumerate(observation.items()):
        observation[name] = x * present[..., m].view(steps, B, *[1] * (x.ndim - 2)).to(x.dtype)
    action = torch.rand(steps, B, A) * 2 - 1
    return {"observation": observation, "present": present, "action": action, "reward": torch.rand(steps, B)}


def observe(model, batch, state=None):
    return model.observe(batch["observation"], batch["present"], batch["action"], state, batch.get("first"))


def tiny_config(method="mummi", **kwargs):
    small = dict(task="toy", device="cpu", precision="float32", horizon=4, free_nats=0.0)
    return Config(method=method, **TINY | small | kwargs)


def tiny_agent(method="mummi", **kwargs):
    """An agent of `make_agent`, as small."""
    space = {name: SimpleNamespace(shape=shape) for name, shape in MODALITIES.items()}
    return methods.make_agent(tiny_config(method, **kwargs), space, A)


def take_the_mean(monkeypatch):
    """No noise in s^f and s^c: every Gaussian of the model gives its mean."""
    posterior, fuse = mssm.posterior_or_prior, MSSM.fuse

    def fuse_to_the_mean(model, features, present):
        fused = fuse(model, features, present)
        return fused if fused.mean is None else fused._replace(s_f=fused.mean)

    monkeypatch.setattr("mssm.sample", lambda parameters, noise: mssm.gaussian(parameters)[0])
    monkeypatch.setattr("mssm.posterior_or_prior", lambda q, p, observed, noise: posterior(q, p, observed, 0 * noise))
    monkeypatch.setattr(MSSM, "fuse", fuse_to_the_mean)


def close(actual, expected, tolerance=1e-5):
    """Equal within the precision of float32, whatever the two types."""
    actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
