"""Findings as pages to look at: one self-contained HTML file for each run."""

from mmneurons.report.page import write_report as write_report
