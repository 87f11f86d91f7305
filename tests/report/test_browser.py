"""The page in a real browser: it opens offline without a complaint, every figure renders, controls and keys work."""

import importlib.util
import time
from pathlib import Path

import pytest

from sparring import report
from sparring.study import Plan, run

from .conftest import MANY

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def opened(driver, make_study):
    """Open a page with two methods and hostile class names, with the network off."""
    page = report.write(make_study(images=80, methods=("gradual", "random"), classes=["</script>"] * 10))
    driver.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    driver.get(page.as_uri())
    return driver


def shown(driver, selector):
    script = "return [...document.querySelectorAll(arguments[0])].filter(e => e.getClientRects().length > 0).length"
    return driver.execute_script(script, selector)


def click(driver, selector):
    driver.execute_script("document.querySelector(arguments[0]).click()", selector)


def resize(driver, width):
    """Set the window's width and wait until the page has it, which takes a while on a busy machine."""
    driver.set_window_size(width, 1000)
    for _ in range(200):
        if abs(driver.execute_script("return innerWidth") - width) < 50:
            return
        time.sleep(0.05)
    raise AssertionError(f"the window did not become {width} pixels wide")


def test_it_opens_offline_without_a_message_on_the_console(opened):
    assert opened.get_log("browser") == []
    assert "sparsity and adversarial robustness" in opened.title


def test_every_figure_renders_with_marks_and_size(opened):
    script = """return [...document.querySelectorAll('figure.levels svg')].filter(s => s.getClientRects().length).map(
        s => [s.getBoundingClientRect().width, s.querySelectorAll('.mark-symbol path').length])"""
    drawn = opened.execute_script(script)
    assert len(drawn) >= 6
    assert all(width > 200 and marks >= 2 * 7 for width, marks in drawn)


def test_every_picture_is_an_image(opened):
    script = "return [...document.images].filter(i => !(i.complete && i.naturalWidth > 0)).length"
    assert opened.execute_script(script) == 0


def test_the_controls_switch_what_is_shown(opened):
    levels = shown(opened, "figure.levels")
    click(opened, "#view-gains")
    assert shown(opened, "figure.levels") == 0
    assert shown(opened, "figure.gains") == levels
    click(opened, "#view-levels")
    click(opened, "#norm-l2")
    assert 0 < shown(opened, "figure.levels") < levels
    click(opened, "#norm-any")
    lines = shown(opened, "g[class*=' s1_'] path")
    click(opened, "#method-1")
    assert lines > 0
    assert shown(opened, "g[class*=' s1_'] path") == 0
    click(opened, "#method-1")
    assert shown(opened, "g[class*=' s1_'] path") == lines


def test_the_arrow_keys_read_the_numbers_out(opened):
    script = "document.querySelector('figure.levels svg').focus()"
    opened.execute_script(script)
    keys = "document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key: arguments[0]}))"
    tip = "const t = document.querySelector('.tip'); return t.hidden ? null : t.textContent"
    opened.execute_script(keys, "ArrowRight")
    first = opened.execute_script(tip)
    opened.execute_script(keys, "ArrowRight")
    second = opened.execute_script(tip)
    assert first.startswith("dense control: ")
    assert second.startswith("gradual, 50%: ")
    opened.execute_script(keys, "Escape")
    assert opened.execute_script(tip) is None


def test_narrow_screens_do_not_scroll_sideways(opened):
    resize(opened, 500)
    wide = opened.execute_script("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
    resize(opened, 1280)
    assert wide <= 0


def test_seven_metrics_of_rivals_stay_on_the_page(opened):
    script = """const table = document.querySelector('#methods table');
        for (const row of table.rows)
            while (row.cells.length < 10) row.insertBefore(row.cells[2].cloneNode(true), row.cells[3]);
        for (const cell of table.querySelectorAll('td.number strong, td.number:not(:has(strong)):not(:last-child)'))
            cell.innerHTML = '<strong>' + arguments[0] + '</strong>';
        const frame = table.closest('.scroll'); return frame.scrollWidth - frame.clientWidth"""
    space = "\N{NO-BREAK SPACE}"
    assert opened.execute_script(script, f"+12.5 [+10.9,{space}+14.1], p{space}<{space}0.001") <= 0


def test_a_verdict_with_a_peak_of_many_sparsities_stays_on_the_page(opened):
    script = """const table = document.querySelector('table.key');
        for (const row of table.tBodies[0].rows) row.cells[row.cells.length - 1].textContent = arguments[0];
        const frame = table.closest('.scroll'); return frame.scrollWidth - frame.clientWidth"""
    assert (
        opened.execute_script(
            script, "reproduced (+11 [+7, +15] points, p 0.041), peak at 50%, 70%, 80%, 90%, 95%, 97% or 99.5%"
        )
        <= 0
    )


def test_the_contents_lead_to_every_section(opened):
    script = """return [...document.querySelectorAll('nav a')].map(
        a => [a.textContent.trim(), document.querySelector(a.getAttribute('href')) !== null])"""
    links = dict(opened.execute_script(script))
    assert "What to ship" in links and all(links.values())


def test_keys_reach_every_control_and_scroll_every_wide_table(opened):
    script = """return [...document.querySelectorAll('.scroll')].filter(
        e => e.scrollWidth > e.clientWidth && e.tabIndex < 0).length"""
    opened.set_window_size(500, 900)
    unreachable = opened.execute_script(script)
    wide = opened.execute_script(
        "return [...document.querySelectorAll('table')].filter(t => t.getClientRects().length && !t.closest('.scroll')"
        " && t.getBoundingClientRect().right > document.documentElement.clientWidth).length"
    )
    opened.set_window_size(1280, 1000)
    assert (unreachable, wide) == (0, 0)


@pytest.fixture(scope="module")
def pages(make_study, few_digits, tmp_path_factory):
    """Write a page with every section, one of activations, and one of linear classifiers."""
    few = {"images": 40, "sparsities": (0.5, 0.9)}
    whole = make_study(budgets=MANY, methods=("gradual", "random"), extras=True, flag="masked-gradients", **few)
    activations = make_study(methods=("gradual", "top-k"), **few)
    linear = tmp_path_factory.mktemp("linear")
    paths = {"l2": [0.01, 1.0], "l1": [0.5, 5.0], "magnitude": [0.5, 0.9], "classes": [0, 1, 2], "images": 40}
    table = {"name": "small", "data": "digits", "model": "linear", "linear": [paths | {"eps": [0.1, 0.2]}]}
    run(Plan.from_table(table), linear, dataset=few_digits, workers=0)
    return {"whole": report.write(whole), "activations": report.write(activations), "linear": report.write(linear)}


# Whatever reaches beyond the window or its own box, outside of frames that scroll, with all parts unfolded.
CUT = """
const wide = document.documentElement.clientWidth, found = [];
for (const e of document.querySelectorAll('main *')) {
    if (!e.getClientRects().length || (e.closest('svg') && !['svg', 'text'].includes(e.tagName))) continue;
    const box = e.getBoundingClientRect(), style = getComputedStyle(e);
    const frame = e.parentElement.closest('.scroll, .long');
    const outside = !frame && (box.right > wide + 1 || box.left < -1);
    const over = e.scrollWidth > e.clientWidth + 1 && style.display !== 'inline';
    const spills = over && (style.overflowX === 'hidden' || (style.overflowX === 'visible' && !frame));
    const unreachable = over && style.overflowX === 'auto' && e.tabIndex < 0;
    if (outside || (!e.closest('svg') && (spills || unreachable))) found.push(e.outerHTML.slice(0, 200));
}
return found"""


@pytest.mark.parametrize("width", [500, 1280])
@pytest.mark.parametrize("page", ["whole", "activations", "linear"])
def test_nothing_is_cut_in_narrow_and_wide_windows(driver, pages, page, width):
    unfolded(driver, pages[page], width)
    assert driver.execute_script(CUT) == []
    script = "document.querySelector('h1').style.width = '200vw';" + CUT
    assert "<h1" in driver.execute_script(script)[0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [500, 1280])
@pytest.mark.parametrize("page", ["whole", "linear"])
def test_axe_finds_no_violation(driver, pages, page, width, scheme):
    found = importlib.util.find_spec("axe_core_python")
    if found is None:
        pytest.skip("axe-core comes with axe-core-python, of sparring[all]")
    unfolded(driver, pages[page], width)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    driver.execute_script(Path(found.origin).with_name("axe.min.js").read_text(encoding="utf-8"))
    driver.set_script_timeout(120)
    options = {"resultTypes": ["violations"]} | ({} if scheme == "light" else {"runOnly": ["color-contrast"]})
    violations = driver.execute_async_script("axe.run(document, arguments[0]).then(arguments[1])", options)[
        "violations"
    ]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert [(one["id"], [node["html"][:200] for node in one["nodes"][:3]]) for one in violations] == []


def unfolded(driver, page, width):
    """Open a page in a window of a width, with every part unfolded."""
    driver.get(page.as_uri())
    resize(driver, width)
    driver.execute_script("for (const e of document.querySelectorAll('details')) e.open = true")
