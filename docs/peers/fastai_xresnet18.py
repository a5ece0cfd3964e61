"""fastai: `Learner`, `xresnet18`, its augmentations and optimiser, label smoothing, `fit_flat_cos`.

A mix of its vision tutorial (`aug_transforms`) and of its own training script for Imagenette (the crop, `ranger`, flat
and cosine; nbs/examples/train_imagenette.py). Its `to_bf16` has no effect on a CPU, so a callback does that.
"""

import torch
from fastai.vision.all import (
    Callback,
    ImageDataLoaders,
    LabelSmoothingCrossEntropyFlat,
    Learner,
    Normalize,
    RandomResizedCrop,
    accuracy,
    aug_transforms,
    imagenet_stats,
    ranger,
    set_seed,
    xresnet18,
)
from measure import Epochs, flags

args = flags()
set_seed(args.seed)
loaders = ImageDataLoaders.from_folder(
    args.pictures,
    train="train",
    valid="val",
    bs=64,
    num_workers=2,
    item_tfms=RandomResizedCrop(args.size, min_scale=0.35),
    batch_tfms=[*aug_transforms(), Normalize.from_stats(*imagenet_stats)],
)
network = xresnet18(n_out=10)
epochs = Epochs("fastai xresnet18", args, sum(p.numel() for p in network.parameters()))


class BFloat16(Callback):
    order = 10  # after what changes the batch

    def before_batch(self):
        self.context = torch.autocast("cpu", torch.bfloat16)
        self.context.__enter__()

    def after_pred(self):
        self.learn.pred = self.pred.float()

    def after_loss(self):
        self.context.__exit__(None, None, None)


class Row(Callback):
    def after_epoch(self):
        epochs(float(self.recorder.log[3]))  # epoch, train_loss, valid_loss, accuracy


loss = LabelSmoothingCrossEntropyFlat()
learner = Learner(loaders, network, loss_func=loss, metrics=accuracy, opt_func=ranger, cbs=[BFloat16(), Row()])
learner.to_channelslast(use_amp=False)
learner.fit_flat_cos(args.epochs, 8e-3, wd=1e-2)
