"""The page in a real browser: silent, alone, and as wide as the screen."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from selectune.report.page import ReportData, write_report
from unit.report.browser import Browser, find_chromium

pytestmark = pytest.mark.skipif(
    find_chromium() is None,
    reason="no chromium on the PATH (Debian: apt-get install --no-install-recommends chromium)",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    binary = find_chromium()
    assert binary is not None
    with Browser(binary, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("name", ["full", "wide", "bare", "method"])
def test_the_page_asks_for_nothing_complains_of_nothing_and_fits_the_screen(
    name: str,
    width: int,
    run_named: Callable[[str], ReportData],
    browser: Browser,
    tmp_path: Path,
) -> None:
    url = write_report(tmp_path, run_named(name)).as_uri()
    visit = browser.visit(url, width=width, dark=name == "wide")
    assert [r for r in visit.requests if not r.startswith("data:")] == [url]
    assert visit.complaints == []
    assert visit.scroll_width <= width
    assert run_named(name).title in visit.text


def test_a_page_that_loads_runs_and_logs_would_be_noticed(browser: Browser, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text('<img src="other.png"><script>console.error("heard")</script>')
    visit = browser.visit(bad.as_uri(), width=1200)
    assert (tmp_path / "other.png").as_uri() in visit.requests
    assert any("heard" in complaint for complaint in visit.complaints)


def test_an_injected_script_or_style_is_blocked_by_the_policy(
    full_run: ReportData, browser: Browser, tmp_path: Path
) -> None:
    path = write_report(tmp_path, full_run)
    evil = '<script>document.title="x"</script><style>h1{display:none}</style><img src="other.png">'
    path.write_text(path.read_text("utf-8").replace("<main>", evil + "<main>"), "utf-8")
    visit = browser.visit(path.as_uri(), width=1200)
    assert sum("Content Security Policy" in c for c in visit.complaints) == 3
    assert full_run.title in visit.text


def test_a_screenshot_is_saved(full_run: ReportData, browser: Browser, tmp_path: Path) -> None:
    visit = browser.visit(write_report(tmp_path, full_run).as_uri(), width=1200, shoot=True)
    place = Path(os.environ.get("SELECTUNE_SCREENSHOT") or tmp_path / "report.png")
    place.write_bytes(visit.screenshot)
    assert visit.screenshot.startswith(b"\x89PNG")
    height = int.from_bytes(visit.screenshot[20:24], "big")
    assert height > 3000  # the whole page, not one screen of it
