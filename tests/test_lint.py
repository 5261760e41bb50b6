"""The code is clean to ruff and to mypy, whose rules `ruff.toml` and `mypy.ini` explain, and warns of nothing when run."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("command", [("ruff", "check", "--no-cache", "."), ("mypy", "--cache-dir", "{cache}")])
def test_no_complaint(command, tmp_path):
    command = [part.format(cache=tmp_path) for part in command]
    process = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr


@pytest.mark.parametrize("name", ["mssm", "mummi_loss", "agent", "envs", "replay"])
def test_a_component_warns_of_nothing(name):
    """`python -W error` of its self-check."""
    process = subprocess.run([sys.executable, "-W", "error", ROOT / f"{name}.py"], capture_output=True, text=True, check=False)
    assert process.returncode == 0 and process.stderr == "", process.stderr
