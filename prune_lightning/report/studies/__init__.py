"""Figures and tables of the published studies that the experiments `study_*` repeat."""
