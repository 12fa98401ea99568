"""Files of a network for other programs, run and compared with it before they are handed over."""

from rankfold.export.export import Axes, Exported, Format, export
from rankfold.export.formats import FORMATS
from rankfold.export.source import write_source

__all__ = ["FORMATS", "Axes", "Exported", "Format", "export", "write_source"]
