"""torchvision: its newest reference recipe (references/classification), scaled to the set, with its `resnet18`.

TrivialAugment, erasing, Mixup and CutMix, label smoothing, SGD with a warm-up and a cosine, no decay of norms, an
average of the weights.
"""

import torch
from measure import Epochs, flags
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, default_collate
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18
from torchvision.transforms import v2

args = flags()
torch.manual_seed(args.seed)
normalise = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
end = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), normalise]
strong = [v2.RandomResizedCrop(args.size), v2.RandomHorizontalFlip(), v2.TrivialAugmentWide()]
views = [*strong, *end, v2.RandomErasing(0.1)]
mix = v2.RandomChoice([v2.MixUp(alpha=0.2, num_classes=10), v2.CutMix(alpha=1.0, num_classes=10)])
train = DataLoader(
    ImageFolder(f"{args.pictures}/train", v2.Compose(views)),
    64,
    shuffle=True,
    num_workers=2,
    drop_last=True,
    persistent_workers=True,
    collate_fn=lambda batch: mix(*default_collate(batch)),
)
val = DataLoader(ImageFolder(f"{args.pictures}/val", v2.Compose([v2.Resize(args.size), *end])), 64)
network = resnet18(num_classes=10)
norms = [p for m in network.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
others = [p for p in network.parameters() if not any(p is norm for norm in norms)]
groups = [{"params": others, "weight_decay": 2e-5}, {"params": norms, "weight_decay": 0.0}]
optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
warm = max(1, args.epochs // 20)
schedule = torch.optim.lr_scheduler.SequentialLR(
    optimizer,
    [
        torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=warm),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, args.epochs - warm)),
    ],
    [warm],
)
average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.998), use_buffers=True)
loss_function = nn.CrossEntropyLoss(label_smoothing=0.1)
epochs = Epochs("torchvision resnet18", args, sum(p.numel() for p in network.parameters()))
for _ in range(args.epochs):
    network.train()
    for images, labels in train:
        optimizer.zero_grad()
        loss_function(network(images), labels).backward()
        optimizer.step()
        average.update_parameters(network)
    schedule.step()
    with torch.inference_mode():
        right = [(average.eval()(images).argmax(1) == labels).float() for images, labels in val]
    epochs(torch.cat(right).mean().item())
