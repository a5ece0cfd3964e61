"""fastai: `Learner`, `xresnet18`, its augmentations and optimiser, label smoothing, `fit_flat_cos`.

After its vision tutorial and its own training script for Imagenette (nbs/examples/train_imagenette.py).
"""

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


class Row(Callback):
    def after_epoch(self):
        epochs(float(self.recorder.log[3]))  # epoch, train_loss, valid_loss, accuracy


learner = Learner(
    loaders, network, loss_func=LabelSmoothingCrossEntropyFlat(), metrics=accuracy, opt_func=ranger, cbs=Row()
)
learner.fit_flat_cos(args.epochs, 8e-3, wd=1e-2)
