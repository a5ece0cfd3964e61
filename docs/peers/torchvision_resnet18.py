"""torchvision: the simple reference recipe (references/classification) that its documentation names for `resnet18`.

Random crops and flips, SGD whose rate (0.1 for batches of 256) falls to a tenth after each third of the epochs, bf16.
"""

import torch
from measure import Epochs, flags
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18
from torchvision.transforms import v2

args = flags()
torch.manual_seed(args.seed)
end = [
    v2.PILToTensor(),
    v2.ToDtype(torch.float32, scale=True),
    v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
]
views = v2.Compose([v2.RandomResizedCrop(args.size), v2.RandomHorizontalFlip(), *end])
whole = v2.Compose([v2.Resize(round(args.size * 256 / 224)), v2.CenterCrop(args.size), *end])
shared = {"batch_size": 64, "num_workers": 2, "persistent_workers": True}
train = DataLoader(ImageFolder(f"{args.pictures}/train", views), shuffle=True, drop_last=True, **shared)
val = DataLoader(ImageFolder(f"{args.pictures}/val", whole), **shared)
network = resnet18(num_classes=10).to(memory_format=torch.channels_last)
optimizer = torch.optim.SGD(network.parameters(), lr=0.1 * 64 / 256, momentum=0.9, weight_decay=1e-4)
schedule = torch.optim.lr_scheduler.StepLR(optimizer, max(1, args.epochs // 3), 0.1)
loss_function = nn.CrossEntropyLoss()
epochs = Epochs("torchvision resnet18", args, sum(p.numel() for p in network.parameters()))
for _ in range(args.epochs):
    network.train()
    for images, labels in train:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(images.contiguous(memory_format=torch.channels_last))
        loss_function(logits.float(), labels).backward()
        optimizer.step()
    schedule.step()
    network.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        right = [(network(images).argmax(1) == labels).float() for images, labels in val]
    epochs(torch.cat(right).mean().item())
