"""What is known of a network before it is planned: its layers, their costs, their candidates."""

from rankfold.analysis.analyze import METRICS, Analysis, analyze
from rankfold.analysis.candidates import AnalysedLayer, Candidate

__all__ = ["METRICS", "AnalysedLayer", "Analysis", "Candidate", "analyze"]
