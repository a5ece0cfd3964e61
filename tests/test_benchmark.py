"""The benchmark's two sides do the work that a job asks for, and its figures are those of closed forms."""

import dataclasses
import json
import multiprocessing
import os
import statistics
import sys

import pytest
import torch
from torchvision import transforms

import benchmark
from augment import ViewOptions
from benchmark import ThisProject
from harness import baseline, cost, demo_shapes
from harness.baseline import Baseline, Job, pil_views
from harness.cli import Runtime
from harness.errors import RunError
from recipes import RECIPES, build_network


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(baseline, "CORES", 1)
    monkeypatch.setattr(baseline, "DRAWN", 2)


SMALL = dataclasses.replace(RECIPES["original"], layers=(1, 1, 1), planes=(4, 4, 4))


def job(**changes) -> Job:
    runtime = Runtime(device="cpu", threads=1, precision="fp32")
    return Job(SMALL, runtime, None, size=32, batch=4, eval_size=40, steps=2)._replace(**changes)


def point(size: int, usual: list[float], ours: list[float]) -> dict:
    row = {"name": "a row", "usual": usual, "this project": ours}
    row["ratios"] = [b / a for a, b in zip(usual, ours, strict=True)]
    return {
        "size": size,
        "batch": 8,
        "rows": [row] * 4,
        "step_tflops": {"usual": 0.05, "this project": 0.4},
        "matmul_tflops": 0.8,
        "steps_to_settle": {"usual": 64, "this project": 32},
        "peak_memory": {"usual": 2**30, "this project": 3 * 2**29},
    }


@pytest.mark.parametrize("side", [Baseline, ThisProject])
def test_both_sides_train_and_score_what_a_job_asks_for(side, small, monkeypatch):
    trained = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (trained.append(1), step(self)))
    mine = side(job())
    for method, steps in (("views", 0), ("train_steps", 2), ("end_to_end", 2), ("score", 0)):
        trained.clear()
        assert getattr(mine, method)() == job().samples, method
        assert len(trained) == steps, method
    net = mine.net if side is Baseline else mine.trainer.net
    assert net.training and net.bn1.num_batches_tracked == 4


def test_one_core_makes_so_many_pil_views_at_most(small, monkeypatch):
    monkeypatch.setattr(baseline, "PIL_VIEWS", 3)
    made, mine = [], Baseline(job())
    monkeypatch.setattr(mine.pictures, "transform", lambda picture: made.append(picture))
    assert mine.views() == len(made) == 3


def test_the_baselines_loader_delivers_the_recipes_views(small):
    mine = Baseline(job(size=48))
    batches = list(mine.loader)
    assert [tuple(x.shape) for x, _ in batches] == [(4, 3, 48, 48)] * 2
    assert sorted(torch.cat([labels for _, labels in batches]).tolist()) == sorted(mine.pictures.labels[:8].tolist())
    (x, _), *_ = mine.eval_loader
    assert x.shape == (4, 3, 40, 40)
    torch.testing.assert_close(
        mine.pictures.images[3].transpose(1, 2, 0),
        demo_shapes.draw_shapes("train", 2)[0][3].permute(1, 2, 0).numpy(),
        atol=0,
        rtol=0,
    )


def test_the_baselines_views_are_the_originals():
    rotation, crop, colour, hflip, vflip = pil_views(ViewOptions(), 70)
    assert rotation.degrees == [-45, 45] and rotation.interpolation is transforms.InterpolationMode.NEAREST
    assert (crop.size, crop.scale, crop.ratio) == ((70, 70), (0.08, 1.0), (3 / 4, 4 / 3))
    assert crop.interpolation is transforms.InterpolationMode.BILINEAR and crop.antialias
    assert colour.brightness == colour.contrast == colour.saturation == (0.7, 1.3) and colour.hue == (-0.3, 0.3)
    assert hflip.p == vflip.p == 0.5


def test_sides_take_turns_and_the_first_does_not_count():
    asked = []

    class Side:
        def __init__(self, name: str, rates: list[float]) -> None:
            self.name, self.rates = name, iter(rates)

        def ask(self, question, *arguments) -> float:
            assert question is benchmark.Process.rate and arguments == ("score", 1)
            asked.append(self.name)
            return next(self.rates)

    two = [Side("usual", [11.0, 25.0, 20.0]), Side("this project", [11.0, 100.0, 50.0])]
    row = benchmark.take_turns("scoring", two, 2, "score", 1)
    assert asked == ["usual", "this project"] * 3
    assert row == {"name": "scoring", "usual": [25.0, 20.0], "this project": [100.0, 50.0], "ratios": [4.0, 2.5]}


@pytest.mark.parametrize(
    "rates, settled",
    [
        ([], False),
        ([9.0] * 9, False),
        ([9.0] * 10, True),
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 9.0], False),
        ([1.0, 1.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.2, 9.2, 1.0], True),
        ([9.0] * 5 + [8.0] * 5, True),
        ([1.0] * 5 + [1.02] * 5, True),
        ([1.0] * 5 + [1.04] * 5, False),
    ],
)
def test_a_side_has_settled_when_it_gets_no_faster(rates, settled):
    assert benchmark.settled(rates, 5) is settled


@pytest.mark.parametrize("steps, least", [(1, 32), (2, 32), (5, 40), (100, 200)])
def test_settling_takes_steps_enough_and_ends_though_it_never_settles(steps, least, monkeypatch):
    side = HereProcess(lambda _: None, job(steps=steps))
    monkeypatch.setattr(benchmark.Process, "rate", lambda method: 1.0)
    assert side.settle() == least
    rates = iter([1.1**n for n in range(1000)])
    monkeypatch.setattr(benchmark.Process, "rate", lambda method: next(rates))
    assert 320 <= side.settle() < 320 + steps


def test_a_row_shows_medians_and_the_spread_of_the_ratios():
    row = point(70, [10.0, 20.0, 40.0], [1000.0, 5000.0, 1200.0])["rows"][0]
    assert benchmark.cells_of(row) == ["a row", "20.0", "1,200", "100.0 (30.0 to 250.0)"]


def test_a_points_footnote_is_of_arithmetic_and_memory():
    line = benchmark.footnote(point(70, [10.0], [50.0]))
    assert "usual 0.05 (6%), this project 0.4 (50%)" in line and "1.00 and 1.50 GiB" in line
    assert line.endswith("Steps to settle: 64 and 32.")


def test_a_forecast_is_samples_over_the_end_to_end_rates():
    measured = [point(70, [10.0, 10.0, 99.0], [100.0] * 3), point(120, [4.0] * 3, [1.0, 20.0, 40.0])]
    samples = {70: 300 * 80_000, 120: 140 * 80_000}
    assert benchmark.forecast(RECIPES["original"], measured) == {
        "usual": pytest.approx(samples[70] / 10 + samples[120] / 4),
        "this project": pytest.approx(samples[70] / 100 + samples[120] / 20),
    }
    assert benchmark.forecast(RECIPES["original"], measured[:1]) == {}


def test_a_forecast_is_by_the_end_to_end_rates_alone():
    measured = [point(size, [10.0], [100.0]) for size in (70, 120)]
    other = point(70, [999.0], [999.0])["rows"][0]
    for each in measured:
        each["rows"] = [other, other, each["rows"][0], other]
    seconds = benchmark.forecast(RECIPES["original"], measured)
    assert seconds == {"usual": pytest.approx(3_520_000), "this project": pytest.approx(352_000)}


def test_the_baseline_has_a_lasting_worker_a_core(monkeypatch):
    monkeypatch.setattr(baseline, "CORES", 2)
    monkeypatch.setattr(baseline, "DRAWN", 2)
    mine = Baseline(job())  # whose workers begin when it is first iterated
    for loader in (mine.loader, mine.eval_loader):
        assert (loader.num_workers, loader.persistent_workers) == (2, True)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere scripts spawn their workers, too")
def test_a_spawned_sides_workers_are_forked_as_a_scripts_are_and_end_with_it(small):
    benchmark.Process._side = mine = Baseline(job())
    mine.end_to_end(), mine.score()
    workers = multiprocessing.active_children()
    assert len(workers) == 2 * baseline.CORES
    for loader in (mine.loader, mine.eval_loader):
        assert loader.multiprocessing_context.get_start_method() == "fork"
    del mine, loader
    benchmark.Process._end()
    assert not multiprocessing.active_children()


def test_points_are_the_recipes_unless_others_are_asked_for():
    assert benchmark.points(RECIPES["original"]) == [(70, 128, 96), (120, 64, 144)]
    assert benchmark.points(RECIPES["cpu"]) == [(size, 128, 80) for size in (32, 48, 64)]
    assert benchmark.points(RECIPES["original"], size=96, batch=256) == [(96, 256, 96)]
    assert benchmark.points(RECIPES["original"], size=120) == [(120, 64, 144)]


class HereProcess(benchmark.Process):
    """A side in this process: what it is asked is asked the same way, without the seconds that a process costs."""

    def __init__(self, kind: type[Baseline] | type[ThisProject], job: Job) -> None:
        self.steps, self.side = job.steps, kind(job)

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, question, *arguments):
        benchmark.Process._side = self.side
        return question(*arguments)


def test_rows_are_of_what_their_names_say(monkeypatch, capsys):
    asked, before = [], torch.get_num_threads()
    images = {"views": 1.0, "train_steps": 2.0, "end_to_end": 4.0, "score": 8.0, "matmul_tflops": 16.0}

    class Side:
        def __init__(self, job: Job) -> None:
            pass

        def __getattr__(self, method: str):
            return lambda: asked.append((method, torch.get_num_threads())) or images[method]

    fakes = {"Baseline": Side, "ThisProject": Side, "Process": HereProcess, "timed": lambda method: (0.5, method())}
    for name, value in fakes.items():
        monkeypatch.setattr(benchmark, name, value)
    torch.set_num_threads(2)
    try:
        found = benchmark.measure(job(), 2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    every = {"views": 1, "train_steps": 2, "end_to_end": 2, "score": 2, "matmul_tflops": 2}
    assert set(asked) == set(every.items())
    for row, method in zip(found["rows"], ("views", "train_steps", "end_to_end", "score"), strict=True):
        assert {rate for side in benchmark.SIDES for rate in row[side]} == {2 * images[method]}
    names = [row["name"].split()[0] for row in found["rows"]]
    assert names == ["views", "training", "end", "scoring"] and found["matmul_tflops"] == 16
    gflop = cost.step_gflop(build_network(SMALL, 10), 32)
    for side in benchmark.SIDES:
        rate = statistics.median(found["rows"][1][side])
        assert found["step_tflops"][side] == pytest.approx(rate * gflop / 1e3, rel=1e-9)
    _, warming, _, *table, _, footnote = capsys.readouterr().out.splitlines()  # a Markdown table, row by row
    assert warming == "warming up at 32 px …" and footnote == benchmark.footnote(found)
    assert table[0] == "| 32 px, batch 4 | usual, images/s | this project, images/s | times faster |"
    assert table[1] == "| --- | ---: | ---: | ---: |"
    assert table[2:] == [benchmark.table_line(benchmark.cells_of(row)) for row in found["rows"]]
    assert table[3] == "| training step | 4.0 | 4.0 | 1.0 (1.0 to 1.0) |"


def test_a_side_answers_from_a_process_of_its_own():
    with benchmark.Process(ThisProject, job()) as side:
        assert side.ask(benchmark.Process.rate, "train_steps") > 0
        assert side.ask(os.getpid) != os.getpid()
        assert side.ask(benchmark.Process.peak_memory) > 2**26
        with pytest.raises(AttributeError, match="no attribute 'rest'"):
            side.ask(benchmark.Process.call, "rest")


def test_a_side_that_cannot_begin_or_is_ended_is_a_sentence():
    with benchmark.Process(int, job()) as side, pytest.raises(TypeError, match="must be a string"):
        side.ask(os.getpid)
    with benchmark.Process(ThisProject, job()) as side, pytest.raises(RunError, match="was killed, probably"):
        side.ask(os._exit, 9)


def test_the_command_prints_a_table_and_writes_every_figure(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(RECIPES, "original", SMALL)
    monkeypatch.setattr(benchmark, "Process", HereProcess)
    monkeypatch.setitem(benchmark.PRODUCT_SIDE, "cpu", 64)
    file = tmp_path / "speed.json"
    flags = "--size 32 --batch 2 --steps 1 --turns 2 --device cpu --threads 1 --precision fp32".split()
    assert benchmark.main([*flags, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "| end to end |" in printed and "training recipe" not in printed  # of two sizes one has no rate
    found = json.loads(file.read_text())
    assert (found["precision"], found["threads"], found["compile"], found["seconds"]) == ("fp32", 1, False, {})
    (only,) = found["points"]
    names = ["views by one core", "training step", "end to end", "scoring at 96 px"]
    assert [row["name"] for row in only["rows"]] == names
    for row in only["rows"]:
        assert len(row["usual"]) == len(row["this project"]) == 2 and min(row["usual"] + row["this project"]) > 0
        assert row["ratios"] == [b / a for a, b in zip(row["usual"], row["this project"], strict=True)]
    assert only["matmul_tflops"] > 0 and min(only["peak_memory"].values()) > 2**26


def test_a_missing_folder_is_a_sentence(tmp_path, capsys):
    assert benchmark.errors.report(lambda: benchmark.main(["--data-dir", str(tmp_path), "--device", "cpu"])) == 1
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--size", "31"], ["--turns", "0"], ["--recipe", "demo"], ["--threads", "-1"]])
def test_bad_usage_ends_with_status_2(flags):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(flags)
    assert stop.value.code == 2


def test_the_forecast_is_said_of_the_right_side(small, capsys, monkeypatch):
    """80,000 samples in each of 440 epochs: 3,520,000 s at 10 a second, a tenth of it at 100."""
    monkeypatch.setattr(benchmark, "measure", lambda job, turns: point(job.size, [10.0], [100.0]))
    assert benchmark.main("--device cpu --threads 1 --precision fp32".split()) == 0
    said = capsys.readouterr().out
    assert "training recipe original on 4,000 images takes 4.1 days; the usual way takes 40.7 days.\n" in said


def test_what_cannot_be_written_is_said_before_anything_is_measured(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "measure", lambda *_: pytest.fail("measured"))
    flags = [*"--device cpu --threads 1 --json".split(), str(tmp_path / "none" / "speed.json")]
    assert benchmark.errors.report(lambda: benchmark.main(flags)) == 1
    assert str(tmp_path / "none") in capsys.readouterr().err


def test_memory_that_nobody_counts_is_no_figure():
    uncounted = point(70, [10.0], [50.0]) | {"peak_memory": {"usual": None, "this project": None}}
    assert "Peak memory: not known here. Steps" in benchmark.footnote(uncounted)
    assert "Peak memory: 1.00 and 1.50 GiB. Steps" in benchmark.footnote(point(70, [10.0], [50.0]))


def test_this_projects_side_works_at_the_sizes_of_the_job(small):
    mine, seen = ThisProject(job()), []
    mine.trainer.net.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    steps = [(4, 3, 32, 32)] * 2
    for method, shapes in (("train_steps", steps), ("end_to_end", steps), ("score", [(8, 3, 40, 40)])):
        seen.clear()
        getattr(mine, method)()
        assert seen == shapes, method
