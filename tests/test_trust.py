"""Sensors that lie: the wrapper lies exactly as often as asked, and the rule finds lies by what honest readings showed."""

import contextlib
import itertools
import json
import math
from types import SimpleNamespace

import killer
import numpy as np
import pytest
import torch
from conftest import B, M, observe, random_batch, tiny_agent, tiny_model
from gymnasium.utils.env_checker import check_env

import evaluate
import methods
import train
from config import parse
from envs import DELAY, FAULTS, LyingSensors, ToyWorld, make_env, make_vector_env
from mssm import State
from tools import lying as roc
from trust import AHEAD, RATES, Trust, read, usual_distances

PENDULUM = {"task_kwargs": {"render_mode": "rgb_array"}}


# ---- 1. Faults -----------------------------------------------------------------------------------


def episode(faults, seed=0, steps=100, task="toy", **options):
    """Observations and what `info` says of lies, (steps + 1, ...) each, under actions that depend on nothing."""
    env, rng = make_env(task, missing_rate=options.pop("missing_rate", 0.0), faults=faults, **options), np.random.default_rng(7)
    observation, info = env.reset(seed=seed)
    seen, lying = [observation], [info.get("lying")]
    for _ in range(steps):
        observation, _, _, _, info = env.step(rng.uniform(-1, 1, env.action_space.shape).astype(np.float32))
        seen.append(observation)
        lying.append(info.get("lying"))
    env.close()
    return {name: np.array([x[name] for x in seen]) for name in seen[0]}, np.array(lying)


@pytest.mark.parametrize("sensor", ["position", "camera"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_sensor_lies_exactly_as_often_as_asked_and_only_then(fault, sensor):
    if fault == "occluded" and sensor == "position":
        pytest.skip("a vector has no patch")
    honest, _ = episode({})
    lies, lying = episode({sensor: fault})
    m = ("position", "camera").index(sensor)
    assert not (lying[0, m] and fault in ("frozen", "delayed")), "there is nothing to repeat as yet"
    if fault in ("frozen", "delayed"):
        assert 40 <= lying[:, m].sum() <= 50
    else:
        assert lying[:, m].sum() == round(0.5 * 101)
    assert not lying[:, 1 - m].any() and lies["present"].all(), "nobody flags it"
    differs = (honest[sensor] != lies[sensor]).reshape(101, -1).any(1)
    assert not differs[lying[:, m] == 0].any(), "the truth at every other step"
    late = lying[:, m].astype(bool) & (np.arange(101) > DELAY)
    assert differs[late].mean() > 0.95, "and a lie at these"
    other = ("camera", "position")[m]
    np.testing.assert_array_equal(honest[other], lies[other])


def test_each_fault_is_what_it_is_called():
    honest, _ = episode({})
    truth = honest["camera"]
    black, lying = episode({"camera": "black"})
    assert not black["camera"][lying[:, 1] > 0].any()
    delayed, lying = episode({"position": "delayed"})
    late = [t for t in range(DELAY, 101) if lying[t, 0]]
    np.testing.assert_array_equal(delayed["position"][late], honest["position"][np.array(late) - DELAY])
    frozen, lying = episode({"position": "frozen"})
    for t in range(1, 101):
        if lying[t, 0]:
            np.testing.assert_array_equal(frozen["position"][t], frozen["position"][t - 1])
    covered, lying = episode({"camera": "occluded"})
    share = (covered["camera"][lying[:, 1] > 0] == 0).all(-1).mean((1, 2))
    assert abs(share - 0.5).max() < 0.02, "half of the picture"
    bias, lying = episode({"position": "bias"})
    moved = abs(bias["position"] - honest["position"])[lying[:, 0] > 0]
    assert np.isclose(moved, 0.25, atol=1e-6).mean() > 0.5 and moved.max() < 0.2501, "a quarter, or to the edge"
    noise, lying = episode({"camera": "noise"})
    assert noise["camera"][lying[:, 1] > 0].std() > 70 > truth.std()
    another, lying = episode({"position": "other"})
    assert np.linalg.norm(another["position"] - honest["position"], axis=1)[lying[:, 0] > 0].mean() > 0.1


def test_lies_are_seeded_and_any_rate_and_several_at_once():
    faults = {"position": "noise", "camera": "other"}
    a, lying = episode(faults, fault_rate=0.2)
    b, again = episode(faults, fault_rate=0.2)
    c, others = episode(faults, seed=1, fault_rate=0.2)
    assert (lying.sum(0) == 20).all() and np.array_equal(lying, again) and not np.array_equal(lying, others)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_what_is_flagged_missing_stays_so():
    seen, _ = episode({"position": "noise"}, missing_rate=0.375)
    honest, _ = episode({}, missing_rate=0.375)
    np.testing.assert_array_equal(seen["present"], honest["present"])
    assert not seen["position"][seen["present"][:, 0] == 0].any()


@pytest.mark.filterwarnings("ignore:.*different from the unwrapped version")
@pytest.mark.parametrize("task, faults, options", [
    ("toy_two_cameras", {"front": "occluded", "rear": "bias"}, {}),
    ("finger_spin", {"rgb": "other", "depth": "delayed", "touch": "noise"}, {}),
    ("Pendulum-v1", {"state": "bias", "camera": "frozen"}, PENDULUM),
])  # fmt: skip
def test_sensors_of_every_task_can_lie(task, faults, options):
    env = make_env(task, faults=faults, **options)
    check_env(env, skip_render_check=True)
    seen, lying = episode(faults, steps=30, task=task, **options)
    assert lying.any(0)[[list(env.observation_space).index(name) for name in faults]].all()
    assert all(env.observation_space[name].contains(x) for name in faults for x in seen[name])
    env.close()


@pytest.mark.parametrize("faults, rate, said", [
    ({"radar": "black"}, 0.5, "is no fault"), ({"camera": "asleep"}, 0.5, "is no fault"),
    ({"position": "occluded"}, 0.5, "no patch"), ({"camera": "black"}, 1.0, r"\[0, 1\)"), ({"camera": "other"}, 0.5, "another"),
])  # fmt: skip
def test_faults_that_cannot_be_are_refused(faults, rate, said):
    with pytest.raises(ValueError, match=said):
        LyingSensors(ToyWorld(("position", "camera")), faults, rate)


# ---- 2. What is usual ----------------------------------------------------------------------------


def usual_and_batch(**options):
    model, batch = tiny_model(**options), random_batch(steps=3 * AHEAD)
    present = batch["present"]
    with torch.no_grad():
        return model, batch, present, usual_distances(model, batch["observation"], present, batch["action"])


def test_a_share_of_the_clean_distances_is_unusual():
    model, batch, present, usual = usual_and_batch()
    with torch.no_grad():
        said, log_std = read(model, batch["observation"], present)
    at = RATES.index(0.1)
    T = len(present)
    nearest = torch.full((T, B, M), math.inf)
    for m, b, t in itertools.product(range(M), range(B), range(T)):
        for s in range(max(0, t - AHEAD), t):
            if present[t, b, m] and present[s, b, m]:
                nearest[t, b, m] = min(nearest[t, b, m], (said[m][t, b] - said[m][s, b]).square().sum())
    for m in range(M):
        again = (nearest[..., m] < usual["repeat"][at, m])[nearest[..., m].isfinite()].float().mean()
        assert 0.05 < again < 0.15
        for n in range(M):
            apart = (said[m] - said[n]).square().sum(-1)
            both = present[..., m] & present[..., n]
            assert 0.05 * (m != n) <= (apart > usual["quarrel"][at, m, n])[both].float().mean() < 0.15
        assert math.isclose(usual["log_std"][0, m], log_std[..., m][present[..., m]].quantile(0.5), rel_tol=1e-5)
    assert (usual["surprise"].diff(dim=1) >= 0).all(), "what was predicted longer ago may be farther off"
    assert (usual["surprise"].diff(dim=0) <= 0).all() and usual["surprise"].isfinite().all()


def test_surprise_is_the_distance_from_the_prediction_of_one_step_before():
    model, batch, present, usual = usual_and_batch()
    present[:] = True
    with torch.no_grad():
        torch.manual_seed(1)
        usual = usual_distances(model, batch["observation"], present, batch["action"])
        torch.manual_seed(1)
        said, _ = read(model, batch["observation"], present)
        filtered = observe(model, batch | {"present": present})
        far = []
        for t in range(1, 3 * AHEAD):
            h = model.transition(State(filtered.h[t - 1], filtered.s_c[t - 1]), batch["action"][t])
            g = model.g(model.latent(h, filtered.prior_mean[t]))
            far.append((said[0][t] - g).square().sum(-1))
    limit = torch.stack(far).quantile(1 - torch.tensor(RATES))
    torch.testing.assert_close(usual["surprise"][:, 0, 0], limit, rtol=1e-4, atol=1e-4)


def test_models_with_decoders_compare_readings_and_have_no_quarrels():
    model, batch, present, usual = usual_and_batch(heads="decoders")
    assert usual["quarrel"].isinf().all() and usual["surprise"].isfinite().all()
    memory = SimpleNamespace(state=model.initial_state(B), action=torch.zeros(B, 2))
    trust = Trust(model, usual)
    observation = {name: x[0] for name, x in batch["observation"].items()}
    assert trust(memory, observation, present[0], torch.ones(B).bool()).equal(present[0]), "a first step has no prediction"


# ---- 3. The rule, on ratios made by hand ---------------------------------------------------------


class Line:
    """Two sensors that say where a point is, which moves by the action: codes of one number."""

    fusion, modalities = "product", {"a": (1,), "b": (1,)}

    def __init__(self):
        self.unsure = [0.0, 0.0]
        self.experts = [lambda x, m=m: torch.cat([x, 0 * x + self.unsure[m]], -1) for m in range(2)]

    def parameters(self):
        return iter([torch.zeros(1)])

    def encode(self, observation, present):
        return list(observation.values())

    def transition(self, state, action):
        return state.h + action

    def prior(self, h):
        return torch.zeros(len(h), 2)

    def latent(self, h, s_c):
        return h

    def g(self, latent):
        return latent


def line(surprise=1.0, quarrel=4.0, repeat=0.0, growth=1.0):
    """A `Trust` of `Line`, with limits for squared distances; surprise grows with the steps ahead."""
    R, sure = len(RATES), math.log(math.log(2) + 0.1)
    ahead = surprise * growth ** torch.arange(AHEAD).float()
    usual = {"surprise": ahead[None, :, None].expand(R, AHEAD, 2), "quarrel": torch.full((R, 2, 2), quarrel),
             "repeat": torch.full((R, 2), repeat), "log_std": torch.full((R, 2), sure)}  # fmt: skip
    return Trust(Line(), usual)


def ask(trust, a, b, at=0.0, first=False, present=(1, 1)):
    """Whether it believes readings a and b where the prediction is `at`."""
    memory = SimpleNamespace(state=State(torch.tensor([[at]]), torch.zeros(1, 1)), action=torch.zeros(1, 1))
    observation = {"a": torch.tensor([[a]]), "b": torch.tensor([[b]])}
    return trust(memory, observation, torch.tensor([present]), torch.tensor([first]))[0].tolist()


def test_a_reading_far_from_the_prediction_is_dropped():
    trust = line(quarrel=math.inf)
    assert ask(trust, 0.0, 9.0, first=True) == [True, True], "at the first step nothing was predicted"
    assert ask(trust, 0.9, -0.9) == [True, True]
    assert ask(trust, 1.1, 0.0) == [False, True] and trust.suspicion[0, 0] > 1
    assert ask(trust, 0.1, -1.1) == [True, False]
    assert ask(trust, 0.0, 0.0) == [True, True]
    assert ask(trust, 5.0, 0.0, present=(0, 1)) == [False, True] and trust.suspicion[0, 0] == 0, "missing is no lie"


def test_a_sensor_that_was_silent_for_long_may_be_farther_off_and_then_gets_a_hearing():
    trust = line(quarrel=math.inf, growth=1.5)
    ask(trust, 0.0, 0.0, first=True)
    dropped = [ask(trust, 2.0, 0.0)[0] for _ in range(5)]  # 4 against 1, 1.5, 2.25, 3.375, 5.06
    assert dropped == [False, False, False, False, True]
    trust = line(quarrel=math.inf)
    ask(trust, 0.0, 0.0, first=True)
    assert [ask(trust, 9.0, 0.0)[0] for _ in range(2 * AHEAD + 2)] == ([False] * AHEAD + [True]) * 2


def test_of_two_that_quarrel_the_more_surprising_is_dropped():
    trust = line(surprise=100.0)
    ask(trust, 0.0, 0.0, first=True)
    assert ask(trust, 3.0, 0.1) == [False, True]
    assert ask(trust, 0.1, 3.0) == [True, False]
    assert ask(trust, 1.9, 0.1) == [True, True], "they agree"
    assert ask(trust, 3.0, 0.1, present=(1, 0)) == [True, False], "nobody contradicts"


def test_an_expert_that_is_less_sure_than_usual_loses_a_quarrel():
    trust = line(surprise=100.0)
    ask(trust, 0.0, 0.0, first=True)
    trust.model.unsure[0] = 3.0
    assert ask(trust, -1.2, 1.4) == [False, True]


def test_a_reading_that_repeats_is_dropped_where_honest_ones_never_do():
    trust = line(repeat=0.01)
    ask(trust, 0.5, 0.0, first=True)
    assert ask(trust, 0.5, 0.2) == [False, True]
    assert ask(trust, 0.7, 0.2) == [True, False]
    assert ask(trust, 0.9, 0.0) == [True, False], "of some steps ago"
    assert ask(trust, 0.5, 0.4, present=(0, 1)) == [False, True]
    assert ask(trust, 0.7, 0.4, first=True) == [True, True], "an episode begins"
    trust = line(repeat=0.0)
    ask(trust, 0.5, 0.0, first=True)
    assert ask(trust, 0.5, 0.0) == [True, True], "here honest ones stand still as well"
    trust = line(surprise=100.0)
    ask(trust, 0.5, 0.0, first=True)
    assert ask(trust, 0.5, -2.0) == [False, True], "but then it loses a quarrel"


def test_what_has_no_experts_and_other_rates_are_refused():
    with pytest.raises(ValueError, match="concatenation"):
        Trust(tiny_model("concatenate", "projections"), {})
    with pytest.raises(ValueError, match="0.005"):
        Trust(Line(), {}, false_alarms=0.3)


# ---- 4. In an agent ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a short run of the toy task, trained to its end."""
    folder = tmp_path_factory.mktemp("trust")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        killer.without_pictures(patch.setattr)
        train.main(parse([*"--task toy --name a --steps 800 --prefill 400 --first-updates 2 --updates-per-1000 5 --device cpu "
                          "--eval-every 800 --eval-episodes 2 --num-envs 2".split()]))  # fmt: skip
    return folder / "runs" / "a"


def test_a_finished_run_knows_what_is_usual(run):
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    assert state["usual"]["surprise"].shape == (len(RATES), AHEAD, 2)


def test_where_nothing_is_dropped_the_agent_acts_bit_for_bit_as_without_the_rule(run):
    agent = methods.load_agent(run).agent
    usual = torch.load(run / "checkpoint.pt", weights_only=True)["usual"]
    usual = {name: torch.full_like(x, 0 if name == "repeat" else math.inf) for name, x in usual.items()}
    usual["log_std"] = torch.zeros_like(usual["log_std"])
    envs = make_vector_env("toy", 2, split="eval")
    plain, seen = evaluate.run_episodes(agent, envs, [1, 2])
    again, other = evaluate.run_episodes(agent, envs, [1, 2], trust=Trust(agent.model, usual))
    envs.close()
    np.testing.assert_array_equal(plain, again)
    for x, y in zip(seen, other):
        np.testing.assert_array_equal(x["action"], y["action"])
        np.testing.assert_array_equal(y["trusted"], y["present"])


def test_evaluation_tells_what_lies_cost_and_how_they_are_found(run, capsys, monkeypatch):
    monkeypatch.chdir(run.parent.parent)
    film, write = "evaluation-None-camera=black-trust.mp4", evaluate.write_video
    monkeypatch.setattr(evaluate, "write_video", lambda path, seen: write(path, seen) if path.name == film else None)
    options = dict(runs=("runs/a",), episodes=2, faults=("camera=black", "noise"), trust=True, references=False, video=True)
    evaluate.main(evaluate.Options(**options))
    table = capsys.readouterr().out
    for row in ("| None | ", "| None, camera=black | ", "| None, position=noise | ", "| None, camera=noise | "):
        assert f"position+camera {row}" in table
    assert "mummi, trust" in table and "ROC area" in table
    assert (run / film).stat().st_size > 1000
    assert "camera=frozen" not in table
    report = json.loads((run / "evaluation.json").read_text(), parse_constant=pytest.fail)  # strict: no NaN
    honest = next(record for record in report["records"] if record["trust"] and not record["fault"])
    assert honest["detection"]["camera"]["delay"] is None  # nothing lied


@pytest.mark.parametrize("other", [{}, {"missing": "High"}, {"task": "toy_xy"}, {"label": "free_nats 3.0"}], ids=str)
def test_a_roc_curve_is_of_one_condition(tmp_path, other):
    found = {"roc": [[0.0, 0.5], [1.0, 1.0]], "area": 0.75}
    record = {"method": "mummi", "task": "toy", "missing": "None", "sensors": "position+camera", "label": "",
              "fault": "camera=black", "detection": {"camera": found}}  # fmt: skip
    path = tmp_path / "lies.json"
    path.write_text(json.dumps({"records": [record, record | other, {"method": "mummi", "fault": "", "detection": {}}]}))
    with pytest.raises(ValueError, match="mixes tasks") if other else contextlib.nullcontext():
        roc.main(roc.Options(path))
    assert (tmp_path / "lies-roc.png").exists() != bool(other)


def test_a_run_without_experts_has_nothing_to_trust_or_to_calibrate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    killer.without_pictures(monkeypatch.setattr)
    tiny = "--task toy --method cvrl --steps 400 --prefill 400 --first-updates 1 --eval-episodes 1 --num-envs 1"
    train.main(parse(tiny.split()))
    for what in ("trust", "calibration"):
        with pytest.raises(ValueError, match="--trust and --calibration compare experts"):
            evaluate.main(evaluate.Options(runs=("runs/toy-cvrl-1",), **{what: True}))


def test_faults_that_are_unknown_are_refused_in_one_line(run):
    for fault in ("asleep", "camera=asleep", "radar=black", "position=occluded"):
        with pytest.raises(ValueError, match="--faults"):
            evaluate.faults_to_try(evaluate.Options(runs=(), faults=(fault,)), {"position": (2,), "camera": (64, 64, 3)})
    assert len(evaluate.faults_to_try(evaluate.Options(runs=(), faults=("all",)), {"position": (2,), "camera": (64, 64, 3)})) == 14
    twice = evaluate.faults_to_try(evaluate.Options(runs=(), faults=("black", "camera=black")), {"position": (2,), "camera": (64, 64, 3)})
    assert twice == [{}, {"position": "black"}, {"camera": "black"}], "each once: it would count as more episodes"


def test_a_table_of_detections_leaves_names_as_they_are():
    found = dict(area=math.nan, lies=math.nan, honest=0.5, found=math.nan, delay=math.nan)
    record = {"run": "runs/fernando", "missing": "None", "fault": "", "detection": {"resonance": found}}
    assert "| runs/fernando | None | none | resonance | | | 50.0% | | |\n" in evaluate.detection_markdown([record])


def test_detection_counts_lies_segments_and_delays():
    lying = np.array([0, 1, 1, 0, 1, 0])
    suspicion = np.array([0.1, 0.5, 3.0, 0.2, 2.0, 1.5])
    seen = [[{name: np.array([[value]]) for name, value in {"lying": x, "suspicion": s, "trusted": s <= 1, "present": 1}.items()}
             | {"reward": [0.0]}
             for x, s in zip(lying, suspicion)]]  # fmt: skip
    found = evaluate.detection(seen, 0)
    assert (found["lies"], found["honest"], found["found"], found["delay"]) == (2 / 3, 1 / 3, 1.0, 0.5)
    assert math.isclose(found["area"], 8 / 9) and found["roc"][-1] == [1.0, 1.0]
    for step in seen[0]:
        step["present"] = 0 * step["present"]
    found = evaluate.detection(seen, 0)
    assert found.pop("roc") == [] and all(math.isnan(value) for value in found.values()), "never present"


def test_a_player_can_be_told_to_trust(run):
    plain, wary = methods.load_agent(run), methods.load_agent(run, trust=True)
    wary.trust.surprise[0] = 0  # nothing is believed one step after it was
    wary.trust.surprise[1:] = 0
    for player in (plain, wary):
        player.act({"position": [0.5, 0.5]})
        player.act({"position": [0.9, 0.1]})
    assert not torch.equal(plain.memory.state.h, wary.memory.state.h) or not torch.equal(
        plain.memory.state.s_c, wary.memory.state.s_c
    )
    agent = tiny_agent("cvrl")
    with pytest.raises(ValueError, match="concatenation"):
        Trust(agent.model, {})
