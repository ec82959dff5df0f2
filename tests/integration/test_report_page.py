"""`cpcompile report`, and the page that it and `build` write, in a real browser."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cpcompile.cli import main
from tests.integration.browser import Page, chromium, find_chromium

SECTIONS = (
    *("verdict", "engines", "context-1", "context-2", "context-3", "selection", "overlap", "swap"),
    *("controls", "build", "environment", "gaps"),
)
WIDTHS = (390, 1280)
LABEL_COLOUR = "getComputedStyle([...document.querySelectorAll('svg text')].find(t => t.textContent == 'capture')).fill"
OUTSIDE = """
[...document.querySelectorAll("figure svg text")].filter(text => {
  const a = text.getBoundingClientRect(), b = text.closest("svg").getBoundingClientRect();
  return a.left < b.left - 1 || a.right > b.right + 1 || a.bottom > b.bottom + 1 || a.top < b.top - 1;
}).map(text => text.textContent)
"""
"""Text that leaves its chart."""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def bundle(measured: Path) -> Path:
    return measured / "model.cpc"


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    program = find_chromium()
    if program is None:
        pytest.skip("needs a Chromium: apt-get install chromium")
    with chromium(program) as page:
        yield page


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("screenshots")


@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (390, "dark"),
        (1280, "light"),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in ((390, "light"), (1280, "dark"))),
    ],
)
def test_the_page_opens_in_a_browser(width: int, scheme: str, bundle: Path, browser: Page, screenshots: Path) -> None:
    browser.open(bundle / "report.html", width=width, scheme=scheme)
    assert browser.complaints() == [] and browser.requests() == []
    for section in SECTIONS:
        height = browser.evaluate(f"document.getElementById('{section}').getBoundingClientRect().height")
        assert height > 40, section
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    # Page and charts follow the scheme.
    paper, ink = browser.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    assert paper == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 24, 28)")
    assert browser.evaluate(LABEL_COLOUR) == ink
    assert browser.evaluate("document.querySelectorAll('figure svg[role=img] > title').length") >= 7
    assert browser.evaluate(OUTSIDE) == []
    shot = screenshots / f"report-{width}-{scheme}.png"
    browser.screenshot(shot)
    assert shot.stat().st_size > 20_000


def test_the_page_fits_the_narrowest_phone(bundle: Path, browser: Page) -> None:
    # Narrower than needed for most figures: whether long ones fit must not depend on what was measured.
    browser.open(bundle / "report.html", width=320, scheme="light")
    assert browser.evaluate("document.documentElement.scrollWidth") <= 320


def test_the_page_can_be_printed(bundle: Path, browser: Page) -> None:
    browser.open(bundle / "report.html", width=1280, scheme="light")
    assert browser.print().startswith(b"%PDF")


def test_the_browser_test_sees_what_it_looks_for(browser: Page, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<img src='http://localhost:9/x.png'><script>undefined.x</script><p style='width:2000px'>wide</p>")
    browser.open(page, width=390, scheme="light")
    assert any("TypeError" in complaint for complaint in browser.complaints())
    assert browser.requests() == ["http://localhost:9/x.png"]
    assert browser.evaluate("document.documentElement.scrollWidth") > 390


def test_a_report_is_shown_again(bundle: Path, tmp_path: Path) -> None:
    shown = run("report", bundle, "-o", tmp_path / "again.html")
    assert shown.exit_code == 0 and "verdict: " in shown.stdout and "wrote " in shown.stderr
    assert (tmp_path / "again.html").read_bytes() == (bundle / "report.html").read_bytes()
    assert json.loads(run("report", bundle / "report.json", "--json").stdout) == json.loads(
        (bundle / "report.json").read_text()
    )


def test_two_reports_are_compared(bundle: Path, browser: Page, tmp_path: Path) -> None:
    content = json.loads((bundle / "report.json").read_text())
    content["contexts"][0]["parameters"]["kept"] += 1
    content["contexts"][1]["variants"][0]["name"] = "cpu-int8"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    shown = run("report", bundle, other, "-o", tmp_path / "difference.html")
    assert shown.exit_code == 0
    for part in ("parameters kept", "beyond", "+ english cpu-int8", "- english cpu-fp32", "1 number exceeds the"):
        assert part in shown.stdout, part
    difference = json.loads(run("report", bundle, other, "--json").stdout)
    assert difference["appeared"] == ["english cpu-int8"]
    for width in WIDTHS:
        browser.open(tmp_path / "difference.html", width=width, scheme="light")
        assert browser.complaints() == [] and browser.requests() == []
        assert browser.evaluate("document.documentElement.scrollWidth") <= width


def test_what_cannot_be_shown_is_a_usage_error(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copy(bundle / "report.json", tmp_path / "report.json")
    (tmp_path / "truncated.json").write_text((bundle / "report.json").read_text()[:5000])
    for arguments, message in (
        ((tmp_path / "truncated.json",), "is not complete JSON"),
        ((bundle, tmp_path / "truncated.json"), "is not complete JSON"),
        ((bundle / "manifest.json",), "is not a report of cpcompile"),
        ((tmp_path / "nothing.json",), "there is no such file"),
        ((bundle, "-o", copy), "exists and is not named .html"),
        ((bundle, "-o", tmp_path), "is a folder"),
    ):
        done = run("report", *arguments)
        assert done.exit_code == 2 and message in done.stderr and "Traceback" not in done.output, done.output
