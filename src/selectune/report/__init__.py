"""One HTML page per run: what was chosen, whether it helped, and what it cost."""

from selectune.report.page import (
    Difference,
    Level,
    Phase,
    PoolTable,
    ReportData,
    ShownExample,
    TargetSpectrum,
    Verdict,
    parts_of,
    render,
    write_report,
)

__all__ = [
    "Difference",
    "Level",
    "Phase",
    "PoolTable",
    "ReportData",
    "ShownExample",
    "TargetSpectrum",
    "Verdict",
    "parts_of",
    "render",
    "write_report",
]
