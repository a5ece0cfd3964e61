"""Write split 1337's images as PNG files, as others' loaders want them: DIR/train/CLASS/N.png and DIR/val/CLASS/N.png.

`python3 docs/peers/pictures.py DATA_DIR DIR`, where DATA_DIR holds stl10_binary/.
"""

import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data import load, split_indices


def main(data_dir: Path, out: Path) -> None:
    dataset = load(data_dir, "train")
    for part, indices in zip(("train", "val"), split_indices(dataset.labels), strict=True):
        for index in indices.tolist():
            path = out / part / dataset.classes[dataset.labels[index]] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(dataset.images[index].permute(1, 2, 0).numpy()).save(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
