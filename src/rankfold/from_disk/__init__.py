"""Models too large for memory: compressed from disk to disk, a layer at a time."""

from rankfold.from_disk.from_disk import compress_from_disk

__all__ = ["compress_from_disk"]
