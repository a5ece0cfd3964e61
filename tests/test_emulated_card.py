"""Whole steps on an emulated CUDA device, in processes of their own; see the two programs for what is done there."""

import json

import pytest
from test_portability import python

pytestmark = pytest.mark.slow
MOST_LAUNCHES = 60  # and replays of graphs, per step


def answer(program: str, *command: str, **environment: str) -> dict:
    """What a program of the tests prints as JSON, on an emulated card."""
    done = python("-W", "ignore", "-m", *command, program=program, PYTHONPATH=".", **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("recipe", ["original", "cpu-long"])  # cpu-night looks up by values, which are not there
def test_a_step_is_few_launches_and_never_waits(emulated_card: str, recipe: str):
    counted = answer(emulated_card, "tests.count_launches", recipe, FAKE_CUDA_MATH="none")
    assert counted["launches"] + counted["replays"] <= MOST_LAUNCHES
    assert counted["replays"] == 2 and counted["syncs"] == counted["d2h"] == 0 and not counted["notes"]


@pytest.mark.parametrize("network", ["wide", "bottleneck"])
def test_a_step_whose_compiler_fails_is_repeated_without_it(emulated_card: str, network: str):
    done = answer(emulated_card, "tests.card_against_cpu", network, "fp32", "failing")
    assert done["losses"] < 1e-5 and done["weights"] < 1e-5 and done["finite"]
    assert len(done["notes"]) == 1 and "Python.h is missing" in done["notes"][0]


def test_a_compiled_and_captured_step_learns_what_the_cpu_s_does(emulated_card: str):
    done = answer(emulated_card, "tests.card_against_cpu", "wide", "fp32", "compiled", TRITON_INTERPRET="1")
    assert done["losses"] < 1e-5 and done["weights"] < 1e-5 and done["finite"]
    # the emulator executes what it captures on memory without values, which drawn crops do not survive
    assert [note.partition(" could")[0] for note in done["notes"]] in ([], ["augmented batch"])
