"""One HTML page per run: what was chosen, whether it helped, and what it cost."""

from selectune.report.page import (
    Difference,
    Level,
    Phase,
    PoolTable,
    ReportData,
    ShownExample,
    TargetSpectrum,
    TokenMap,
    TrainingFacts,
    Verdict,
    parts_of,
    render,
    write_report,
)
from selectune.report.steps import facts_of

__all__ = [
    "Difference",
    "Level",
    "Phase",
    "PoolTable",
    "ReportData",
    "ShownExample",
    "TargetSpectrum",
    "TokenMap",
    "TrainingFacts",
    "Verdict",
    "facts_of",
    "parts_of",
    "render",
    "write_report",
]
