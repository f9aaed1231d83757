"""The report as one HTML page."""

from __future__ import annotations

from edgebert_pipeline.page import render_page
from edgebert_pipeline.report import Report
from edgebert_pipeline.report_sections import report_lead, report_sections

__all__ = ["render_html"]


def render_html(report: Report) -> str:
    """Returns the report as a page that holds all it needs."""
    commit = f", recipe at commit `{report.commit}`" if report.commit else ""
    return render_page(
        title=report.name,
        kind="Export report",
        lead=report_lead(report),
        sections=report_sections(report),
        footer=f"edgebert {report.provenance.edgebert}, measured {report.measured_at}{commit}. "
        f"All figures are in report.json (version {report.report_version}).",
    )
