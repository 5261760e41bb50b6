"""A component file copied to an empty folder works there: the usage example of its docstring runs, and proves itself.

(That its self-check runs there too: `test_audit.py`.)
"""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

MSSM = """
rgb, touch = torch.randint(0, 256, (6, 3, 64, 64, 3), dtype=torch.uint8), torch.rand(6, 3, 2)
present, action = torch.rand(6, 3, 2) > 0.4, torch.rand(6, 3, 4)
"""
LOSS = """
code, expert_mean, present = torch.randn(10, 4), torch.randn(10, 4), torch.rand(10) > 0.4
mean, std, prior_mean, prior_std = torch.rand(4, 10, 5) + 0.1
log_reward = torch.randn(10)
"""
AGENT = """
class World(nn.Module):
    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(3))
    def initial_state(self, batch_size, device=None):
        return Memory(torch.zeros(batch_size, 3), torch.zeros(batch_size, 4))
    def observe(self, observation, present, action, state=None):
        return observation["x"] + self.offset
    def state(self, filtered):
        return Memory(filtered.flatten(0, 1).detach(), torch.zeros(filtered.flatten(0, 1).shape[0], 4))
    def latent(self, x, last):
        return x
    def imagine_step(self, state, action):
        return Memory(state.state + action[:, :3], action)
    def reward(self, latent):
        return -latent.square().sum(-1)

model, objective = World(), lambda model, filtered, batch: ((model.offset - 1).square().sum(), {})
batch = {"observation": {"x": torch.rand(5, 2, 3)}, "present": torch.ones(5, 2, 1), "action": torch.zeros(5, 2, 4)}
num_envs, observation, present, first = 2, {"x": torch.rand(2, 3)}, torch.ones(2, 1), torch.ones(2).bool()
"""
REPLAY = "rgb, reward = np.ones((60, 64, 64, 3), np.uint8), np.arange(60, dtype=np.float32)"

EXAMPLES = {  # file: what its example is given, and what must hold after it
    "mssm.py": (MSSM, "assert reward.shape == (6, 3) and latent.shape == (6, 3, 230)"),
    "mummi_loss.py": (LOSS, "assert loss.isfinite() and bound.shape == (10,) and log_f.shape == (10, 10)"),
    "agent.py": (AGENT, "assert action.shape == (2, 4) and model.offset.abs().min() > 0 and 'actor_loss' in metrics"),
    "envs.py": ("", "assert set(observation) == {'rgb', 'depth', 'touch', 'present'}; envs.reset(); envs.close()"),
    "replay.py": (REPLAY, "assert batch['rgb'].shape == (50, 50, 64, 64, 3) and (np.diff(batch['reward'], axis=0) == 1).all()"),
}  # fmt: skip


def example(file):
    """The usage example: the last indented lines of the module's docstring that are code."""
    docstring = (ROOT / file).read_text().split('"""')[1]
    blocks = re.findall(r"(?:^    .*\n)+", docstring, re.MULTILINE)
    code = [block for block in blocks if re.search(r"^    \w.* = \w+\(", block, re.MULTILINE)]
    assert len(code) == 1, f"{file}: one usage example"
    return textwrap.dedent(code[0])


@pytest.mark.parametrize("file", EXAMPLES)
def test_the_docstrings_example_runs_in_an_empty_folder(file, tmp_path):
    given, check = EXAMPLES[file]
    shutil.copy(ROOT / file, tmp_path)
    assert 3 <= len(example(file).splitlines()) <= 6
    body = textwrap.indent(f"{given}\n{example(file)}\n{check}\n", "    ")
    # -I keeps this project off the path; workers that are spawned import the script again.
    script = f"import sys\nsys.path.insert(0, '.')\nfrom {file[:-3]} import *\nif __name__ == '__main__':\n{body}"
    (tmp_path / "example.py").write_text(script)
    command, environment = [sys.executable, "-I", "example.py"], os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
