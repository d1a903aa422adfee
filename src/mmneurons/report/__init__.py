"""Reports: findings, edits and inspections as self-contained HTML files, as text and as plots."""

from mmneurons.report.page import write_report as write_report
