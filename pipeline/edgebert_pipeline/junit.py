"""The checks of a gate as JUnit XML, which CI systems show beside the tests."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree

from edgebert_pipeline.gate import describe_breach
from edgebert_pipeline.report import GateCheck

__all__ = ["render_junit"]

# XML 1.0, section 2.2: what no document may hold, however it is written.
_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render_junit(name: str, checks: Sequence[GateCheck]) -> bytes:
    """Returns a suite with a test case for each check: its class is the variant.

    Args:
        name: Of the suite.
        checks: Those that failed become failures, with both numbers.
    """
    failures = str(sum(not check.passed for check in checks))
    counts = {"tests": str(len(checks)), "failures": failures, "errors": "0"}
    suites = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(suites, "testsuite", {"name": _allowed(name), **counts})
    for check in checks:
        case = ElementTree.SubElement(
            suite,
            "testcase",
            {
                "classname": _allowed(f"{name}.{check.variant}"),
                "name": f"{check.limit} {check.allowed:g}",
            },
        )
        if check.passed:
            out = ElementTree.SubElement(case, "system-out")
            out.text = f"measured {check.measured:.4g}"
        else:
            message = _allowed(describe_breach(check))
            failure = ElementTree.SubElement(case, "failure", {"message": message, "type": "gate"})
            failure.text = message
    ElementTree.indent(suites)
    document: bytes = ElementTree.tostring(suites, encoding="utf-8", xml_declaration=True)
    return document + b"\n"


def _allowed(text: str) -> str:
    return _FORBIDDEN.sub("\ufffd", text)
