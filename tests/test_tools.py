"""tools.benchmark and the programs that draw the documentation: what they refuse, what they write."""

import json
from pathlib import Path
from typing import get_args

import pytest

import tools
from envs import make_env
from tools import benchmark, contact_sheet, diagrams

PNG = b"\x89PNG"


def test_a_bare_benchmark_explains_its_sections_and_times_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    benchmark.main(benchmark.Options())
    said = capsys.readouterr().out
    assert all(f"\n    {section} " in said for section in get_args(benchmark.Section))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options, message", [
    (dict(sections=("peers",), r2dreamer="/nowhere"), "--r2dreamer /nowhere: give a folder with a checkout"),
    (dict(sections=("action",), dreamer_pytorch="."), "--dreamer-pytorch .: give a folder with a checkout, and the section"),
    (dict(sections=("action",), output="/dev/null/x"), "--output /dev/null/x cannot be written"),
])  # fmt: skip
def test_bad_input_is_refused_before_anything_is_timed(monkeypatch, options, message):
    monkeypatch.setattr(benchmark, "machine", lambda: pytest.fail("it began"))
    with pytest.raises(ValueError, match=message):
        benchmark.main(benchmark.Options(**options))


@pytest.fixture
def small(monkeypatch):
    """Models and batches that take milliseconds."""
    make, tiny = benchmark.make, dict(batch_size=2, batch_length=3, d_f=16, channels=2, d_h=8, units=8, hidden=8)
    monkeypatch.setattr(benchmark, "make", lambda modalities=3, **options: make(modalities, **tiny | options))
    monkeypatch.setattr(benchmark, "machine", lambda: {"gpu": None})


def test_sections_of_the_agent_are_written_as_json(small, tmp_path, capsys):
    output = tmp_path / "new" / "times.json"
    benchmark.main(benchmark.Options(("stages", "action"), output=str(output)))
    report = json.loads(output.read_text())
    assert list(report) == ["machine", "unit", "action", "stages"]
    assert set(report["action"]) == {"1", "8", "16"} and report["action"]["8"]["median"] > 0
    stages = report["stages"]
    assert sum(stages.values()) == pytest.approx(2 * stages["update"], abs=0.1) and min(stages.values()) >= 0
    assert capsys.readouterr().out.endswith(f"{output}: stages, action; compare with results/benchmark and docs/speed.md\n")


def test_ours_is_timed_beside_others_in_a_process_of_its_own():
    """float32 and bfloat16; without checkouts there are no others."""
    results = benchmark.peers("", "", settings=((1, 2),))
    assert {"2x2 1 threads mummi float32", "2x2 1 threads mummi bfloat16"} < set(results)
    assert results["2x2 1 threads mummi float32"]["median"] > 0


def test_the_benchmark_goes_on_where_an_episode_ends(monkeypatch):
    env = make_env("Pendulum-v1")
    env.reset()
    for _ in range(500):
        benchmark.random_decision(env)
    assert env.t == 500 - 2 * 201  # two episodes of 200, each with its reset


def test_a_peer_that_cannot_be_imported_is_named(tmp_path):
    with pytest.raises(ValueError, match="r2dreamer has failed; it says why above"):
        benchmark.peers("", tmp_path, settings=((1, 2),))


def test_a_files_suffix_is_not_doubled_and_its_folder_is_made(tmp_path):
    for output in ("new/fig", "new/fig.png", "new/fig.svg"):
        assert tools.output_files(tmp_path / output, ".png", ".svg") == [tmp_path / "new/fig.png", tmp_path / "new/fig.svg"]
    assert tools.output_files("run-0.5", ".png")[0].name == "run-0.5.png"


def test_diagrams_and_contact_sheets_are_drawn_where_they_are_asked_for(tmp_path, monkeypatch):
    """By default in runs, not among the documentation."""
    monkeypatch.chdir(tmp_path)
    diagrams.main()
    contact_sheet.main(contact_sheet.Options(("toy",)))
    names = ["runs/diagrams/two_slices.png", "runs/diagrams/density_ratio.png", "runs/contact_sheets/toy.png"]
    assert all((tmp_path / name).read_bytes().startswith(PNG) for name in names)


def test_a_sheet_of_an_agent_shows_its_own_episode_and_the_moments_asked_for(tmp_path):
    agent = Path(__file__).parent.parent / "pretrained" / "cup_catch.pt"
    drawn = contact_sheet.draw("cup_catch", str(agent), (10, 28))
    assert [axes.get_title() for axes in drawn.axes[:10]] == [str(t) for t in range(10, 30, 2)]
    (reward,) = [axes for axes in drawn.axes if axes.get_ylabel() == "reward"]
    assert reward.get_xlim() == (9, 29)
    assert reward.lines[0].get_ydata().sum() > 100, "random actions earn 0"
    with pytest.raises(ValueError, match="checkpoint.pt is missing"):
        contact_sheet.main(contact_sheet.Options(agent=str(tmp_path / "nothing"), output=str(tmp_path)))
    with pytest.raises(ValueError, match="toy and --agent: an agent acts in its own task; give one of both"):
        contact_sheet.main(contact_sheet.Options(("toy",), agent=str(agent), output=str(tmp_path)))
    with pytest.raises(ValueError, match="--moments 10 501: give two decisions of 0 to 500, in order"):
        contact_sheet.main(contact_sheet.Options(agent=str(agent), moments=(10, 501), output=str(tmp_path)))
