"""Networks compared on the same images: McNemar's test against enumeration, and what evaluate.py says of pairs."""

import itertools
import json
import shutil
from pathlib import Path

import picture_folders
import pytest
import torch

import evaluate
from harness import checkpoint, errors, images, metrics, report, scoring

pytestmark = pytest.mark.usefixtures("small_demo", "empty_plots")


@pytest.mark.parametrize("coins", range(11))
def test_mcnemar_counts_the_coins(coins: int) -> None:
    """Each of the 2ⁿ ways in which n coins fall is as likely; as uneven a count or a more uneven one is extreme."""
    for heads in range(coins + 1):
        ways = [sum(way) for way in itertools.product((0, 1), repeat=coins)]
        extreme = sum(abs(2 * way - coins) >= abs(2 * heads - coins) for way in ways)
        assert metrics.mcnemar(heads, coins - heads) == extreme / 2**coins


def test_mcnemar_of_many_images() -> None:
    assert metrics.mcnemar(20_000, 20_000) == 1
    assert metrics.mcnemar(0, 5_000) == 0  # 2⁻⁴⁹⁹⁹ is below the smallest number
    assert metrics.mcnemar(0, 1_000) == 2.0**-999
    normal = torch.special.erfc(torch.tensor((199 / 10_000**0.5) / 2**0.5, dtype=torch.float64)).item()
    assert metrics.mcnemar(5_100, 4_900) == pytest.approx(normal, rel=1e-3)  # with the correction for continuity
    with pytest.raises(ValueError, match="from 0 up"):
        metrics.mcnemar(-1, 3)


def run(*arguments: object) -> int:
    words = [str(argument) for argument in arguments]
    return errors.report(lambda: evaluate.main([*words, "--threads", "1", "--precision", "fp32"]))


def read(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def right_answers(path: Path, size: int) -> list[bool]:
    """Of a checkpoint on its own validation images."""
    trained = checkpoint.load_network(path)
    dataset, _, val = images.load_for_network(trained, images.recorded_source(path), fetch=False)
    answers = scoring.logits(trained.model, dataset.images[val], size).argmax(1)
    return (answers == dataset.labels[val]).tolist()


def alone(path: Path, other: Path, size: int) -> tuple[int, int]:
    """How many images the first alone answers rightly, and the other alone."""
    both = list(zip(right_answers(path, size), right_answers(other, size), strict=True))
    return both.count((True, False)), both.count((False, True))


@pytest.fixture
def other_split(tiny_run: Path, tmp_path: Path) -> Path:
    """The tiny run, but as if trained on another split."""
    folder = tmp_path / "other"
    shutil.copytree(tiny_run, folder)
    payload = checkpoint.load(folder / "last.pt")
    payload["recipe"]["split_seed"] = 1
    checkpoint.save(folder / "last.pt", payload)
    return folder


def test_two_networks_are_compared_the_second_against_the_first(tiny_runs, tmp_path, capsys) -> None:
    first, second = (folder / "last.pt" for folder in tiny_runs)
    assert run(first, second, "--size", 32, 40, "--out", tmp_path) == 0
    said = capsys.readouterr().out
    for row, size in zip(read(tmp_path)["pairs"], (32, 40), strict=True):
        own, reverse = alone(second, first, size)
        p_value = metrics.mcnemar(own, reverse)
        assert row == {
            "networks": [str(second)], "against": [str(first)], "size": size, "images": 40,
            "networks_alone_right": own, "against_alone_right": reverse, "p_value": p_value,
            "difference": pytest.approx((own - reverse) / 40),
        }  # fmt: skip
        sentence = f"{second} is right on {own} images where {first} is wrong, the reverse {reverse}, p = {p_value:.2g}"
        assert f"{sentence} (McNemar's exact test at {size} px)" in said
    assert "not independent" not in said


def test_pairs_are_pooled(tiny_runs, tmp_path, capsys) -> None:
    """The last epochs of two seeds against those before them."""
    names = [[folder / name for folder in tiny_runs] for name in ("last.pt", "previous.pt")]
    assert run(*names[0], "--against", *names[1], "--size", 40, "--out", tmp_path) == 0
    counts = [alone(last, before, 40) for last, before in zip(*names, strict=True)]
    own, reverse = (sum(of_pairs) for of_pairs in zip(*counts, strict=True))
    report, said = read(tmp_path), capsys.readouterr().out
    (row,) = report["pairs"]
    assert (row["networks_alone_right"], row["against_alone_right"], row["images"]) == (own, reverse, 80)
    assert row["p_value"] == metrics.mcnemar(own, reverse)
    assert f"over 2 pairs the networks before --against are right on {own} images where those after it are" in said
    assert "pairs that share images are not independent" in said
    gains = [(own - reverse) / 40 for own, reverse in counts]
    mean, deviation = sum(gains) / 2, abs(gains[0] - gains[1]) / 2**0.5
    assert (row["difference"], row["standard_deviation"]) == (pytest.approx(mean), pytest.approx(deviation))
    assert f"over these pairs accuracy differs by {mean:+.1%} ± {deviation:.1%} (mean and standard deviation)" in said
    for side, paths in ((report, names[0]), (report["against"], names[1])):
        assert [entry["name"] for entry in side["networks"]] == [str(path) for path in paths]
        assert side["over the networks"][0]["networks"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"report.json"}


def test_one_pair_and_ensembles(tiny_runs, tmp_path) -> None:
    first, second = tiny_runs
    assert run(first, "--against", second, "--out", tmp_path / "one") == 0
    (row,) = read(tmp_path / "one")["pairs"]
    assert (row["networks"], row["against"]) == ([str(first / "last.pt")], [str(second / "last.pt")])
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"report.json"}
    flags = ("--ensemble", "--out", tmp_path / "ensembles")
    assert run(first, second, "--against", first / "best.pt", second / "best.pt", second / "previous.pt", *flags) == 0
    (row,) = read(tmp_path / "ensembles")["pairs"]
    assert row["images"] == 40 and row["networks"] == [f"{first / 'last.pt'} + {second / 'last.pt'}"]


def test_an_ensemble_of_several_sizes_is_compared_too() -> None:
    def scored(size: object) -> report.Evaluation:
        return report.Evaluation({"name": "a", "results": [{"size": size}]}, [torch.ones(4, dtype=torch.bool)])

    (row,) = report.pairs([scored([80, 112])], [scored(80)])
    assert row["size"] == [80, 112, 80] and row["p_value"] == 1


def test_networks_of_other_images_are_no_pair(tiny_run, other_split, tmp_path, capsys) -> None:
    assert run(tiny_run, other_split, "--out", tmp_path / "two") == 0
    assert "pairs" not in read(tmp_path / "two") and "McNemar" not in capsys.readouterr().out
    assert run(tiny_run, "--against", other_split, "--out", tmp_path / "against") == 1
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "were not scored on the same images" in said.err
    assert f"{other_split / 'last.pt'}" in said.err and "95% interval" in said.out  # the table is not lost
    assert "pairs" not in read(tmp_path / "against") and "against" in read(tmp_path / "against")  # nor the report


@pytest.mark.parametrize(
    "flags, complaint",
    [
        ("--against {b} {b}/best.pt", "--against takes as many networks as come before it, 1"),
        ("--against {a}", "the same network is given twice"),
        ("--against {b} --protocol original", "--protocol original and --against cannot be combined"),
        ("{b} --against {a}/best.pt --ensemble", "--ensemble needs at least two networks"),
    ],
)
def test_usage(flags: str, complaint: str, tiny_runs, capsys) -> None:
    first, second = map(str, tiny_runs)
    words = flags.replace("{a}", first).replace("{b}", second).split()
    assert run(first, *words) == 2
    assert complaint in capsys.readouterr().err


def test_views_are_not_images_to_compare_networks_by(tiny_runs, tmp_path, capsys) -> None:
    assert run(*tiny_runs[:2], "--protocol", "original", "--out", tmp_path) == 0
    assert "pairs" not in read(tmp_path) and "McNemar" not in capsys.readouterr().out


def test_the_table_says_which_figure_and_which_side_is_which() -> None:
    def entry(name: str, accuracy: float) -> dict:
        result = {"size": 40, "tta": "none", "accuracy": accuracy, "interval_95": [0.1, 0.9], "loss": 1.5}
        result |= {"calibration_error": 0.25, "per_class": {}}
        return {"name": name, "members": [1], "notes": [], "shown": 0, "results": [result]}

    sides = [entry("a", 0.5), entry("b", 0.7)], [entry("c", 0.2), entry("d", 0.4)]
    lines = report.text(*sides).splitlines()
    assert lines[0].split() == "network size tta accuracy 95% interval loss calibration error".split()
    assert lines[1].split() == "a 40 none 50.0% 10.0% to 90.0% 1.500 25.0%".split()
    means = "(mean and standard deviation of 2 networks"
    assert lines[5:] == [
        f"accuracy 60.0% ± 14.1% at 40 px {means} before --against)",
        f"accuracy 30.0% ± 14.1% at 40 px {means} after it)",
    ]


def test_the_report_of_other_networks_is_not_replaced_unasked(tiny_runs, tmp_path, capsys) -> None:
    first, second = tiny_runs
    a, b, c = (
        Path(shutil.copytree(run, tmp_path / name)) for run, name in ((first, "a"), (second, "b"), (second, "c"))
    )
    assert run(a, b) == 0
    before = (tmp_path / "evaluation-val" / "report.json").read_bytes()
    checkpoint.save(c / "last.pt", checkpoint.load(c / "last.pt") | {"epoch": 3})  # another network than b's
    assert run(a, c) == 1
    assert f"{tmp_path / 'evaluation-val'} holds the figures of {b / 'last.pt'} too; name" in capsys.readouterr().err
    assert (tmp_path / "evaluation-val" / "report.json").read_bytes() == before
    assert run(a, b, c) == 0 and run(a, c, "--out", tmp_path / "evaluation-val") == 0  # they stay, and as asked
    b.rename(tmp_path / "moved")
    assert run(a, c) == 0 and run(a, tmp_path / "moved", "--out", tmp_path / "evaluation-val") == 0
    (tmp_path / "moved").rename(tmp_path / "elsewhere")
    assert run(a, tmp_path / "elsewhere") == 0  # the same file under another name
    assert run(a, "--against", b.with_name("elsewhere")) == 0
    assert run(a, "--against", c) == 1 and "holds the figures of" in capsys.readouterr().err


def test_networks_of_other_pictures_are_no_seeds_of_one_run(tmp_path, capsys) -> None:
    for start, name in enumerate("ab"):
        pictures = picture_folders.fill(tmp_path / f"pictures-{name}", 6, start=500 * start)
        (tmp_path / name).mkdir()
        picture_folders.save_untrained(tmp_path / name / "last.pt", pictures, 32)
        places = {"runtime": {"data_dir": str(tmp_path), "images": str(pictures)}}
        (tmp_path / name / "config.json").write_text(json.dumps(places))
    assert run(tmp_path / "a", tmp_path / "b") == 0
    assert "these networks differ in more than their seeds and splits" in capsys.readouterr().err
