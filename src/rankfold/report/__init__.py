"""A report of what was done to a network, as one HTML file that needs nothing else."""

from rankfold.report.report import write_report

__all__ = ["write_report"]
