"""The pictures of training views that a run leaves: what the network was given, and what it was told they show."""

import re

import pytest
import torch
from conftest import TINY_RUN

import train
from augment import denormalise
from harness import plots
from harness.demo_shapes import DEMO_CLASSES

MIXED = "--mixup 1 --cutmix 1 --mix-probability 0.8 --erase 0.5".split()


@pytest.mark.parametrize("flags", [[], MIXED], ids=["plain", "mixed and erased"])
def test_sheets_of_views_show_the_first_batch_of_each_stage(flags, tmp_path, small_demo, empty_plots, monkeypatch):
    sheets, batches, step = {}, [], train.Trainer.step

    def note(trainer: train.Trainer, batch: train.Batch) -> tuple:
        batches.append(batch._replace(x=batch.x.clone()))
        return step(trainer, batch)

    def keep(path, images, titles, **_) -> None:
        sheets[path.name] = (images, titles)

    monkeypatch.setattr(train.Trainer, "step", note)
    monkeypatch.setattr(plots, "sample_sheet", keep)
    place = ["--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    assert train.main([*TINY_RUN, *flags, "--epochs", "1", "1", *place]) == 0
    assert list(sheets) == ["views-stage1.png", "views-stage2.png"]
    steps = len(batches) // 2
    for batch, (images, titles) in zip((batches[0], batches[steps]), sheets.values(), strict=True):
        torch.testing.assert_close(torch.from_numpy(images), denormalise(batch.x).clamp(0, 1))
        assert len(titles) == 32
        two = 0
        for title, label, other, share in zip(titles, *(part.tolist() for part in batch[1:]), strict=True):
            shown = dict(re.findall(r"(\w+) (\d+)%", title)) or {title: "100"}
            expected = dict.fromkeys(DEMO_CLASSES, 0.0)
            expected[DEMO_CLASSES[label]] += share
            expected[DEMO_CLASSES[other]] += 1 - share
            for name, value in expected.items():
                assert float(shown.get(name, 0)) == pytest.approx(100 * value, abs=0.51), (title, name, value)
            assert list(shown) == sorted(shown, key=lambda name: -int(shown[name])), title
            two += len(shown) == 2
        assert (two > 0) == bool(flags)
