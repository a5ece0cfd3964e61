"""The command end of training: wrong flags, damaged data, numbers gone wrong, and the same bits again."""

import dataclasses
import signal
import types
import typing
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

import errors
import plots
import train
from augment import Views
from settings import Recipe, Runtime, Stage

FLAGS = "--demo --threads 1 --epochs 2 1 --crop-size 32 32 --eval-size 32 32 --batch 32 32 --planes 4 4 8".split()


@pytest.fixture(autouse=True)
def training_in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(plots, "_save", lambda figure, path: figure)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def command(*argv: str) -> int:
    """The exit status of `train.py`."""
    return errors.report(partial(train.main, list(argv)))


def run(folder: Path, *flags: str) -> int:
    """Train for three tiny epochs on the small demo."""
    return command(*FLAGS, "--data-dir", str(folder.parent / "data"), "--out", str(folder), *flags)


def error(capsys: pytest.CaptureFixture) -> str:
    """The one line on stderr."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


# wrong flags


def wrong_flags() -> Iterator[list[str]]:
    """For each setting, from its own limits: values of a wrong type, size, sign and number."""
    for owner in (Stage, Recipe, Runtime, Views):
        hints = typing.get_type_hints(owner)
        for item in dataclasses.fields(owner):
            if "help" in item.metadata:
                kinds = [k for k in typing.get_args(hints[item.name]) or (hints[item.name],) if k is not types.NoneType]
                flag = f"--{item.name.replace('_', '-')}"
                yield from _wrong_values(flag, kinds[0], item.metadata, owner, len(kinds))


def _wrong_values(flag: str, kind: type, limits: typing.Mapping, owner: type, number: int) -> Iterator[list[str]]:
    if kind is bool:
        yield [f"{flag}=yes"]
        return
    if owner is Stage:
        number = 2
        yield [flag, "1", "2", "3"]
    yield [flag, *["1"] * (number - 1)]
    if "choices" in limits:
        yield [flag, "others"]
    if kind not in (int, float):
        return
    wrong = ["many", "", "nan", "inf", "-inf", "-1", "1e400", "1,5"]
    wrong += ["1.5", "0x10", str(limits.get("low", 1) - 1)] if kind is int else []
    wrong += [repr(limits["above"])] if "above" in limits else []
    wrong += [str(limits["high"] * 2 + 1)] if "high" in limits else []
    for value in wrong:
        yield [flag, *[value] * number]


INCONSISTENT = {
    "--epochs": ["--epochs 0 0", "--epochs 5"],
    "--crop-size": ["--crop-size 32,, 32", "--crop-size 32,31 32", "--crop-size a,b 32", "--crop-size , 32"],
    "--crop-scale": ["--crop-scale 0.5 0.1", "--crop-scale 0 1", "--crop-scale 0.5 1.5"],
    "--crop-ratio": ["--crop-ratio 2 1", "--crop-ratio 0 1", "--crop-ratio -1 1"],
    "--rotation": ["--rotation 181"],
    "--hue": ["--hue 0.6"],
    "--fold": ["--fold 3", "--fold 3 --train-on all", "--recipe original --fold 1 --train-on all"],
    "--recipe": ["--recipe none", "--recipe original --demo", "--recipe"],
    "--batch": ["--batch 128 8192"],
    "--image-size": ["--image-size 64"],
    "--demo": ["--demo --images data", "--demo=yes"],
    "--unknown": ["--unknown 1"],
    "--epoch": ["--epoch 3 3"],
    "budget": ["--planes 200 200 200", "--budget 1000"],
}


def test_wrong_flags(tmp_path: Path, small_demo, monkeypatch, capsys) -> None:
    """One usage message that names the flag, status 2, and no run folder."""
    monkeypatch.chdir(tmp_path)
    cases = [(case[0].partition("=")[0], case) for case in wrong_flags()]
    cases += [(flag, line.split()) for flag, lines in INCONSISTENT.items() for line in lines]
    assert len(cases) > 300
    fails = []
    for flag, case in cases:
      try:
        assert command(*([] if case[0] == "--recipe" else ["--demo"]), *case) == 2, case
        usage, _, message = capsys.readouterr().err.partition("train.py: error: ")
        assert usage.startswith("usage: train.py") and message.count("\n") == 1, (case, message)
        assert flag in message, (case, message)
      except BaseException as e: fails.append(repr(e)[:300]); capsys.readouterr()
    open("/tmp/w/f/fails","w").write("\n".join([*fails,str(len(cases))])); assert not fails
    assert [path.name for path in tmp_path.iterdir()] == ["data"]  # the demo's: some cases need to know its size
