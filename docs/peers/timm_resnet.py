"""timm: `resnet10t`, its smallest ResNet, trained from its pieces with flags of several of its documented recipes.

RandAugment, Mixup and CutMix, label smoothing, LAMB with a cosine by step, an average of the weights that warms up,
bf16. Trained at 176/224 of the size that it is scored at, as the network's own settings say. Its published weights came
of SGD with adaptive clipping, which is not tried here.
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
shared = {"batch_size": 64, "num_workers": 2, "device": cpu, "use_prefetcher": False}
train_size = round(args.size * 176 / 224)
train = create_loader(
    create_dataset("", args.pictures, split="train", is_training=True),
    input_size=(3, train_size, train_size),
    is_training=True,
    auto_augment="rand-m7-mstd0.5-inc1",
    **shared,
)
val = create_loader(
    create_dataset("", args.pictures, split="val"),
    input_size=(3, args.size, args.size),
    crop_pct=1.0,
    interpolation="bicubic",
    **shared,
)
network = timm.create_model("resnet10t", num_classes=10).to(memory_format=torch.channels_last)
optimizer = create_optimizer_v2(network, "lamb", lr=5e-3, weight_decay=0.02)
steps, all_steps = 0, args.epochs * len(train)
schedule = CosineLRScheduler(optimizer, all_steps, warmup_t=all_steps // 20, warmup_lr_init=1e-5, t_in_epochs=False)
mixup = Mixup(mixup_alpha=0.1, cutmix_alpha=1.0, prob=0.5, label_smoothing=0.1, num_classes=10)
average = ModelEmaV3(network, decay=0.998, use_warmup=True)
loss_function = SoftTargetCrossEntropy()
epochs = Epochs("timm resnet10t", args, sum(p.numel() for p in network.parameters()))
for _ in range(args.epochs):
    network.train()
    for images, labels in train:
        schedule.step_update(steps)
        images, labels = mixup(images, labels)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(images.contiguous(memory_format=torch.channels_last))
        loss_function(logits.float(), labels).backward()
        optimizer.step()
        steps += 1
        average.update(network, step=steps)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        right = [(average.module.eval()(images).argmax(1) == labels).float() for images, labels in val]
    epochs(torch.cat(right).mean().item())
