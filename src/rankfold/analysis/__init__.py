"""What is known of a network before it is planned: its layers, their costs, their candidates."""

from rankfold.analysis.analysis import Analysis, Trial
from rankfold.analysis.analyze import analyze
from rankfold.analysis.candidates import AnalysedLayer, Candidate
from rankfold.analysis.correction import Check
from rankfold.analysis.curvature import Outputs
from rankfold.analysis.metrics import METRICS
from rankfold.analysis.overrides import Overrides
from rankfold.analysis.timing import with_timings

__all__ = [
    "METRICS",
    "AnalysedLayer",
    "Analysis",
    "Candidate",
    "Check",
    "Outputs",
    "Overrides",
    "Trial",
    "analyze",
    "with_timings",
]
