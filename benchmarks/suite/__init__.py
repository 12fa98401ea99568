"""rankfold beside what users would pick instead, on the same networks, data and recovery."""
