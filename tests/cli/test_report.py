"""The report of a profile, opened in a real browser."""

from __future__ import annotations

import re
import struct
import subprocess
import sys

import pytest

from droidspeak.errors import UsageError
from droidspeak.integrations.cli.report import write_report
from droidspeak.layerselect import Requirement, choose

from .browser import browser, show
from .made_profile import made_profile

SECTIONS = ["frontier", "sensitivity", "groups", "methods", "worst", "provenance"]
SCRIPT = "<script>document.title='owned'</script>"

PROFILES = {
    "usual": lambda: made_profile(warnings=("8 prompts are few",)),
    "full search, 80 layers": lambda: made_profile(80, search="full", granularity=2),
    "smallest": lambda: made_profile(2, maps=False, baselines=False),
    "no plan that shares": lambda: made_profile(12, maps=False, harm=30, last=3.0),
    "hostile names": lambda: made_profile(
        names=(SCRIPT, "x" * 300), warnings=(SCRIPT,), prompt=SCRIPT + "{}$^{{x"
    ),
}


@pytest.fixture(scope="module")
def driver():
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module", params=PROFILES)
def report(request, tmp_path_factory):
    """A profile and the page made of it."""
    profile = PROFILES[request.param]()
    page = tmp_path_factory.mktemp("report") / "report.html"
    write_report(profile, page)
    return profile, page


def text_of(driver, css):
    return driver.execute_script("return document.querySelector(arguments[0]).innerText", css)


def rows_of(driver, css):
    script = "return [...document.querySelectorAll(arguments[0] + ' tbody tr')].map("
    return driver.execute_script(script + "row => [...row.cells].map(cell => cell.textContent.trim()))", css)


def test_the_page_asks_for_nothing_and_complains_of_nothing(driver, report):
    _, page = report
    show(driver, page.as_uri())
    complaints = driver.get_log("browser")
    assert complaints == []
    script = "return performance.getEntriesByType('resource').map(entry => entry.name)"
    assert [name for name in driver.execute_script(script) if not name.startswith("data:")] == []
    targets = re.findall(r'(?:src|href|action|srcset)="([^"]*)"|url\(([^)]*)\)', page.read_text())
    assert targets
    assert all((one or other).startswith(("data:", "#")) for one, other in targets)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_sticks_out(driver, report, width, scheme):
    _, page = report
    show(driver, page.as_uri(), width=width, scheme=scheme)
    assert driver.execute_script("return document.documentElement.scrollWidth") == width
    # Nor do the figures: one drawing of each is shown, within the page, and its texts within the drawing.
    drawn = driver.execute_script(
        """return [...document.querySelectorAll("figure svg")].map(svg => {
            const box = svg.getBoundingClientRect()
            const texts = [...svg.querySelectorAll("text")].map(text => text.getBoundingClientRect())
            const out = texts.filter(text => text.left < box.left - 2 || text.right > box.right + 2)
            return [svg.getAttribute("class"), box.left, box.right, box.height, texts.length, out.length]
        }).filter(svg => svg[3] > 0)"""
    )
    assert {kind for kind, *_ in drawn} == {"narrow" if width == 390 else "wide"}
    assert len(drawn) in (2, 3)
    for _, left, right, height, texts, out in drawn:
        assert left >= 0
        assert right <= width
        assert height > 200
        assert texts > 5
        assert out == 0


def test_labels_of_figures_do_not_overlap(driver, report):
    _, page = report
    for width in (390, 1280):
        show(driver, page.as_uri(), width=width)
        overlaps = driver.execute_script(
            """return [...document.querySelectorAll("figure svg")].flatMap(svg => {
                const boxes = [...svg.querySelectorAll("text")].map(text => [text.textContent,
                    text.getBoundingClientRect()]).filter(([_, box]) => box.height > 0)
                const clash = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
                    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3
                return boxes.flatMap(([one, a], n) => boxes.slice(n + 1).filter(([_, b]) => clash(a, b))
                    .map(([other]) => one + " / " + other))
            })"""
        )
        assert overlaps == []


def test_sections_and_their_figures_are_there(driver, report):
    profile, page = report
    show(driver, page.as_uri())
    headings = driver.execute_script("return [...document.querySelectorAll('h2')].map(it => it.offsetHeight)")
    assert len(headings) == len(SECTIONS)
    assert min(headings) > 0
    assert f"{profile.full_prefill.measures.quality:.3f}" in text_of(driver, "#key-figures")
    frontier = rows_of(driver, "#frontier")
    assert [row[0] for row in frontier] == [str(point.plan) for point in profile.policy.frontier]
    for row, point in zip(frontier, profile.policy.frontier, strict=True):
        assert [row[2], row[4]] == [str(point.plan.recomputed), f"{point.quality:.3f}"]
        assert point.measures.worst_prompt in row[8]
    assert [row[0] for row in rows_of(driver, "#sensitivity")] == [
        str(finding.method.layer) for finding in profile.sensitivity
    ]
    names = {row[0] for row in rows_of(driver, "#methods")}
    assert {str(finding.method) for finding in profile.candidates} | {"full"} <= names
    assert [row[1] for row in rows_of(driver, "#worst")] == [
        point.measures.worst_prompt for point in profile.policy.frontier
    ]
    for fact in (profile.policy.sender, profile.calibration.digest, profile.held_out.digest, "torch 2.13.0"):
        assert fact in text_of(driver, "#provenance")


def test_text_is_never_markup(driver, tmp_path):
    profile = PROFILES["hostile names"]()
    write_report(profile, tmp_path / "report.html")
    show(driver, (tmp_path / "report.html").as_uri())
    assert SCRIPT in text_of(driver, "h1")
    assert SCRIPT in text_of(driver, "#warnings")
    assert driver.execute_script("return document.scripts.length") == 0
    assert driver.title.endswith("DroidSpeak profile")
    assert SCRIPT not in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_colours_follow_the_scheme(driver, report, scheme, dark):
    _, page = report
    show(driver, page.as_uri(), scheme=scheme)
    page_light, text_light, axis_light = driver.execute_script(
        """const light = colour => colour.match(/[0-9.]+/g).slice(0, 3).reduce((sum, part) => sum + +part, 0)
        const style = element => getComputedStyle(element)
        return [light(style(document.body).backgroundColor), light(style(document.body).color),
            light(style(document.querySelector("figure svg.wide text")).fill)]"""
    )
    assert (page_light < 200) is dark
    assert (text_light > 500) is dark
    assert (axis_light > 500) is dark


def test_on_paper_it_is_dark_on_white_and_nothing_is_cut(driver, report):
    _, page = report
    show(driver, page.as_uri(), scheme="dark", media="print", width=800)
    background, overflow = driver.execute_script(
        "return [getComputedStyle(document.body).backgroundColor,"
        " getComputedStyle(document.querySelector('.scroll')).overflowX]"
    )
    assert (background, overflow) == ("rgb(255, 255, 255)", "visible")


def test_the_verdict_is_made_of_the_figures(driver, tmp_path):
    said = {}
    for name in ("usual", "no plan that shares"):
        write_report(PROFILES[name](), tmp_path / "report.html")
        show(driver, (tmp_path / "report.html").as_uri())
        said[name] = text_of(driver, "#verdict")
    profile = PROFILES["usual"]()
    plan = choose(profile.policy, Requirement())
    (quality,) = [point.quality for point in profile.policy.frontier if point.plan == plan]
    assert said["usual"].startswith(f"Recompute {plan.recomputed} of 12 layers ({plan.groups[0]})")
    assert f"{quality:.3f} of full prefill's quality; full reuse: 0.000." in said["usual"]
    assert said["no plan that shares"].startswith("No plan that reuses layers keeps 95 %")


def test_pngs_lie_beside_the_page_or_where_they_are_wanted(tmp_path):
    profile = PROFILES["usual"]()
    write_report(profile, tmp_path / "pair.html")
    names = ("sensitivity", "groups", "methods")
    assert {path.name for path in tmp_path.iterdir()} == {
        "pair.html",
        *(f"pair-{name}.png" for name in names),
    }
    write_report(profile, tmp_path / "pair.html", figures=tmp_path / "deep" / "figures")
    for name in names:
        beside = (tmp_path / f"pair-{name}.png").read_bytes()
        assert beside == (tmp_path / "deep" / "figures" / f"{name}.png").read_bytes()
        assert beside.startswith(b"\x89PNG\r\n\x1a\n")
        assert struct.unpack(">II", beside[16:24]) == (1600, 640)
        assert 10_000 < len(beside) < 500_000


def test_the_same_profile_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        write_report(PROFILES["usual"](), tmp_path / f"{name}.html")
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()
    assert (tmp_path / "one-groups.png").read_bytes() == (tmp_path / "two-groups.png").read_bytes()


def test_the_largest_page_stays_small(tmp_path):
    """80 layers at granularity 1: 3,240 groups and thrice as many mapped plans, as a picture."""
    write_report(made_profile(80, baselines=False), tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 2_000_000


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"report .*file.*: "):
        write_report(PROFILES["smallest"](), tmp_path / "file" / "report.html")
    (tmp_path / "report.html").mkdir()
    with pytest.raises(UsageError, match="report "):
        write_report(PROFILES["smallest"](), tmp_path / "report.html")
    assert not list(tmp_path.glob(".*"))


def test_without_matplotlib_the_extra_is_named(tmp_path):
    code = """
import sys
sys.modules["matplotlib"] = None
from pathlib import Path
from droidspeak.errors import MissingExtra
from droidspeak.integrations.cli.report import write_report
try:
    write_report(None, Path(sys.argv[1]) / "report.html")
except MissingExtra as error:
    print(error)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "the report needs an optional part: pip install 'droidspeak[profile]'"
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_starts_without_matplotlib():
    code = "import droidspeak.integrations.cli.main, droidspeak.integrations.cli.report, sys;"
    code += "print('matplotlib' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
