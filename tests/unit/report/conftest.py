"""The made-up runs, made once."""

from collections.abc import Callable

import pytest

from selectune.report.page import ReportData
from unit.report import samples


@pytest.fixture(scope="session")
def full_run() -> ReportData:
    return samples.full_run()


@pytest.fixture(scope="session")
def wide_run(full_run: ReportData) -> ReportData:
    return samples.wide_run(full_run)


@pytest.fixture(scope="session")
def bare_run() -> ReportData:
    return samples.bare_run()


@pytest.fixture(scope="session")
def method_run(full_run: ReportData) -> ReportData:
    return samples.method_run(full_run)


@pytest.fixture
def run_named(
    full_run: ReportData, wide_run: ReportData, bare_run: ReportData, method_run: ReportData
) -> Callable[[str], ReportData]:
    runs = {"full": full_run, "wide": wide_run, "bare": bare_run, "method": method_run}
    return lambda name: runs[name]
