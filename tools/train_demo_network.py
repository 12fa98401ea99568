"""Train the network that `rankfold demo` compresses and write the package data it ships with.

    python tools/train_demo_network.py [FASHION_MNIST_DIRECTORY]

The directory holds the four idx-gz files of Fashion-MNIST (Debian: dataset-fashion-mnist). Of the
60 000 training images the last 5 000 are kept out of training: the demonstration calibrates and
recovers on them, as a user would on new, unlabelled inputs. Of the 10 000 test images the first
5 000 are shipped as the held-out test set. Takes about 20 minutes on two cores.
"""

import gzip
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

import rankfold.demo
from rankfold.demo.network import SmallVGG

EPOCHS = 14
BATCH = 128
SHIPPED = 5_000
PACKAGE_DATA = Path(rankfold.demo.__file__).parent


def read_idx(path: Path) -> np.ndarray:
    """Read one idx-gz file of unsigned bytes (the MNIST format)."""
    raw = gzip.decompress(path.read_bytes())
    dimensions = raw[3]
    shape = np.frombuffer(raw, ">u4", dimensions, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Flip half of the images left to right and shift each by up to two pixels."""
    flipped = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
    padded = nn.functional.pad(images, (2, 2, 2, 2))
    rows = torch.randint(5, (len(images), 1, 1), generator=generator) + torch.arange(28)[:, None]
    columns = torch.randint(5, (len(images), 1, 1), generator=generator) + torch.arange(28)
    return padded[torch.arange(len(images))[:, None, None], 0, rows, columns][:, None]


def accuracy(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    network.eval()
    with torch.no_grad():
        predicted = torch.cat([network(batch).argmax(1) for batch in images.split(500)])
    return (predicted == labels).double().mean().item()


def train(images: torch.Tensor, labels: torch.Tensor) -> SmallVGG:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = SmallVGG().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    steps = EPOCHS * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    for epoch in range(EPOCHS):
        network.train()
        start = time.perf_counter()
        order = torch.randperm(len(images), generator=generator)
        for indices in order.split(BATCH)[: len(images) // BATCH]:
            batch = augment(images[indices], generator).to(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(network(batch), labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(
            f"epoch {epoch + 1}: {time.perf_counter() - start:.0f} s, loss {loss:.3f}", flush=True
        )
    return network


def main() -> None:
    source = Path(sys.argv[1] if len(sys.argv) > 1 else "/usr/share/datasets/fashion-mnist")
    arrays = {
        name: read_idx(source / f"{name}-ubyte.gz")
        for name in (
            "train-images-idx3",
            "train-labels-idx1",
            "t10k-images-idx3",
            "t10k-labels-idx1",
        )
    }
    images = torch.tensor(arrays["train-images-idx3"])[:-SHIPPED, None].float() / 255
    labels = torch.tensor(arrays["train-labels-idx1"])[:-SHIPPED].long()
    network = train(images, labels)

    # Half precision halves the file; the accuracy printed is that of the weights as shipped.
    shipped = {
        name: tensor.half() if tensor.dim() > 1 else tensor
        for name, tensor in network.state_dict().items()
    }
    save_file(
        {name: tensor.contiguous() for name, tensor in shipped.items()},
        PACKAGE_DATA / "small_vgg.safetensors",
    )
    np.savez_compressed(
        PACKAGE_DATA / "fashion_mnist.npz",
        calibration_images=arrays["train-images-idx3"][-SHIPPED:],
        test_images=arrays["t10k-images-idx3"][:SHIPPED],
        test_labels=arrays["t10k-labels-idx1"][:SHIPPED],
    )
    network.load_state_dict(shipped)
    test = torch.tensor(arrays["t10k-images-idx3"])[:, None].float() / 255
    test_labels = torch.tensor(arrays["t10k-labels-idx1"]).long()
    print(f"10 000 test images: {accuracy(network, test, test_labels):.4f}")
    print(f"shipped test images: {accuracy(network, test[:SHIPPED], test_labels[:SHIPPED]):.4f}")


if __name__ == "__main__":
    main()
