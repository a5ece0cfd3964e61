"""timm: `resnet10t`, its smallest ResNet, trained from its pieces with the flags of its documented recipes.

RandAugment, erasing, Mixup and CutMix, label smoothing, LAMB with a cosine, an average of the weights.
"""

import timm
import torch
from measure import Epochs, flags
from timm.data import Mixup, create_loader
from timm.data.dataset_factory import create_dataset
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3, random_seed

args = flags()
random_seed(args.seed)
cpu = torch.device("cpu")
shape = {"input_size": (3, args.size, args.size), "batch_size": 64, "num_workers": 2, "device": cpu}
train = create_loader(
    create_dataset("", args.pictures, split="train", is_training=True),
    is_training=True,
    auto_augment="rand-m7-mstd0.5-inc1",
    re_prob=0.25,
    re_mode="pixel",
    use_prefetcher=False,
    **shape,
)
val = create_loader(
    create_dataset("", args.pictures, split="val"), crop_pct=1.0, interpolation="bicubic", use_prefetcher=False, **shape
)
network = timm.create_model("resnet10t", num_classes=10)
optimizer = create_optimizer_v2(network, "lamb", lr=5e-3, weight_decay=0.02)
schedule = CosineLRScheduler(optimizer, args.epochs, warmup_t=max(1, args.epochs // 20), warmup_lr_init=1e-5)
mixup = Mixup(mixup_alpha=0.1, cutmix_alpha=1.0, prob=0.5, label_smoothing=0.1, num_classes=10)
average = ModelEmaV3(network, decay=0.998, use_warmup=True)
loss_function = SoftTargetCrossEntropy()
epochs = Epochs("timm resnet10t", args, sum(p.numel() for p in network.parameters()))
for epoch in range(args.epochs):
    schedule.step(epoch)
    network.train()
    for images, labels in train:
        images, labels = mixup(images, labels)
        optimizer.zero_grad()
        loss_function(network(images), labels).backward()
        optimizer.step()
        average.update(network)
    with torch.inference_mode():
        right = [(average.module.eval()(images).argmax(1) == labels).float() for images, labels in val]
    epochs(torch.cat(right).mean().item())
