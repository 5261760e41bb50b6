"""`train.py --help` is a page of the manual, and every default has an origin that is true."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import train
from config import EXAMPLES, Config, command_line

ROOT = Path(__file__).parent.parent
SOURCE = (ROOT / "config.py").read_text()
HELP = dict(re.findall(r"^    (\w+): (?:str|int|float|bool) = .*?  # (.*)", SOURCE, re.MULTILINE))
ORIGIN = re.compile(r"\[((?:(?:section V|Appendix [AB]|Table I(?:, II)?|Eq\. \(\d+\)|code|CVRL|ours)(?:: [^;\]]+)?(?:; )?)+)\]$")
README = dict(re.findall(r"^\| D(\d+) \|.*\| ([^|]+) \| [^|]+ \|$", (ROOT / "README.md").read_text(), re.MULTILINE))
PAPER = Config()


@pytest.mark.parametrize("field", fields(Config), ids=lambda field: field.name)
def test_every_default_has_its_value_in_the_paper_or_the_released_code(field):
    """And is one of them, or a deviation. "ours" stands alone."""
    origin = ORIGIN.search(HELP[field.name])
    assert origin, f"{field.name}: end its help with an origin such as [Appendix B: 200] or [ours]"
    values = [part.partition(": ")[2] for part in origin[1].split("; ")]
    assert "ours" not in origin[1] or origin[1] == "ours"
    if not any(values) or "Dev. D" in HELP[field.name]:
        return
    assert len(values) == 1, f"{field.name}: paper and released code differ, but no deviation is named"
    assert float(values[0]) == getattr(PAPER, field.name)


def test_every_option_of_a_deviation_names_it_and_the_other_way_round():
    in_help = {(int(n), name) for name, text in HELP.items() for n in re.findall(r"Dev\. D(\d+)", text)}
    in_readme = {
        (int(n), option.removeprefix("no-").replace("-", "_"))
        for n, cell in README.items() for option in re.findall(r"--([a-z][\w-]+)", cell)
    }  # fmt: skip
    assert in_help == in_readme


def test_the_options_of_a_deviation_reach_the_released_code():
    """Where the help gives the released code's value, the option accepts it."""
    for name, text in HELP.items():
        released = re.search(r"Dev\. D\d+.*code: ([^;\]]+)\]", text)
        if released and name != "precision":  # float16 losses are not offered
            option = "--" + name.replace("_", "-")
            value = getattr(PAPER, name)
            arguments = ["--no-" + option[2:]] if value is True else [option, released[1]]
            given = getattr(command_line(arguments, PAPER), name)
            assert str(given) == released[1] or float(given) == float(released[1])


def test_help_is_grouped_fits_100_columns_and_ends_with_examples():
    environment = os.environ | {"COLUMNS": "100", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, ROOT / "train.py", "--help"]
    process = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=True)
    page = process.stdout
    assert page.startswith(train.__doc__) and page.endswith(EXAMPLES) and process.stderr == ""
    assert max(map(len, page.splitlines())) <= 100
    boxes = re.findall(r"╭─ (\w+) options ─", page)
    assert boxes == [group.__name__.lower() for group in reversed(Config.__bases__)]
    options = re.findall(r"^│ --(?:no-)?([a-z][\w-]+)", page, re.MULTILINE)
    assert [name.replace("-", "_") for name in options] == [field.name for field in fields(Config)]


@pytest.mark.parametrize("line", EXAMPLES.splitlines()[1:])
def test_the_examples_are_commands(line):
    program, *arguments = shlex.split(line.split("  ")[1])[1:]
    assert program == "train.py"
    if "--help" not in arguments:
        command_line(arguments, PAPER)


def test_a_resumed_run_may_repeat_its_options():
    default = Config(sample_s_f=False, resume="runs/x")
    assert command_line(["--no-sample-s-f"], default).sample_s_f is False


def test_an_unknown_option_ends_with_code_2(tmp_path):
    command = [sys.executable, ROOT / "train.py", "--tusk", "toy"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert process.returncode == 2 and "--tusk" in process.stderr and process.stdout == ""
