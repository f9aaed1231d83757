"""The report as Markdown: for a terminal, a pull request, and who has no browser at hand."""

from __future__ import annotations

from edgebert_pipeline.markdown import render_document, render_parts
from edgebert_pipeline.report import Report
from edgebert_pipeline.report_sections import report_lead, report_sections
from edgebert_pipeline.scores import Evaluation
from edgebert_pipeline.sections.variants import variants_table

__all__ = ["render_markdown", "render_table"]


def render_table(evaluation: Evaluation) -> str:
    """Returns the variants as a Markdown table that reads well on a terminal, too."""
    return render_parts([variants_table(evaluation)])


def render_markdown(report: Report) -> str:
    """Returns the report as Markdown: all but charts and the texts of flipped rows."""
    return render_document(report.name, report_lead(report), report_sections(report))
