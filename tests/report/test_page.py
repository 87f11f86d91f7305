"""The page and its files, from a made-up study."""

import csv
import dataclasses
import html
import io
import json
import re
from html.parser import HTMLParser
from typing import get_args

import pytest
import vl_convert
from PIL import Image

from sparring import report
from sparring.errors import UserError
from sparring.records import read_plan
from sparring.report import _figures as figures
from sparring.report import _summary as words
from sparring.report.analysis._findings import Result, find
from sparring.report.analysis._metrics import Measure
from sparring.report.analysis._records import load
from sparring.statistics import Verdict

from .rewriting import rewrite_plan


@pytest.fixture(scope="module")
def page(study_folder):
    return report.write(study_folder).read_text()


class Balance(HTMLParser):
    """Collect what is wrong with the nesting of elements, and every address and identifier."""

    def __init__(self):
        super().__init__()
        self.open, self.wrong, self.ids, self.addresses, self.text = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in {"meta", "img", "input"}:
            self.open.append(tag)
        self.ids += [v for k, v in attrs if k == "id"]
        self.addresses += [v for k, v in attrs if k in ("src", "href")]

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        self.text.append(data)


def parsed(page):
    found = Balance()
    found.feed(page)
    return found


def test_the_page_is_well_formed_and_refers_to_nothing_outside(page):
    found = parsed(page)
    assert not found.wrong
    assert not found.open
    assert all(a.startswith(("data:image/png;base64,", "#")) for a in found.addresses)
    assert len(set(found.ids)) == len(found.ids)
    assert len(page) < 3_000_000


def test_the_mark_of_a_smaller_study_stands_in_every_figure(make_study):
    out = make_study(seeds=2, sparsities=(0.5, 0.9), extras=True, mark="SMALL: two seeds")
    page = report.write(out).read_text()
    drawn = sorted((out / "figures").glob("*.svg"))
    assert len(drawn) > 10
    assert [path.name for path in drawn if "SMALL: two seeds" not in path.read_text()] == []
    assert "<strong>SMALL: two seeds</strong>" in page


def test_every_figure_is_a_file_too(study_folder, page):
    drawn = {path.stem for path in (study_folder / "figures").glob("*.svg")}
    assert {path.stem for path in (study_folder / "figures").glob("*.png")} == drawn
    assert {"accuracy", "accuracy-gain", "fgsm-linf-0.1", "worst-linf-0.1", "distance-deepfool-50-l2"} <= drawn
    first = page.count('<figure class="first"')  # what the page opens with is shown again among the curves
    assert first == 2
    assert page.count('<svg role="group"') == len(drawn - {"overview"}) + first


def test_figures_of_an_earlier_report_do_not_stay_behind(make_study):
    out = make_study(seeds=2, images=60, sparsities=(0.5, 0.9))
    report.write(out)
    fresh = {path.name for path in (out / "figures").iterdir()}
    for name in ("worst-linf-0.05.svg", "worst-linf-0.05.png", "notes.txt"):
        (out / "figures" / name).write_text("from before")
    report.write(out)
    assert {path.name for path in (out / "figures").iterdir()} == fresh | {"notes.txt"}


def test_two_seeds_are_told_to_see_nothing(make_study):
    out = make_study(seeds=2, images=60, sparsities=(0.5, 0.9))
    page = report.write(out).read_text()
    assert "none detectable" in report.verdict(out)
    assert not [text for text in re.findall(r"detectable: (\d+) points", page) if int(text) > 100]
    assert not [text for text in re.findall(r">(\d+) points</td>", page) if int(text) > 100]


def test_the_panels_of_the_overview_differ(study_folder, page):
    drawn = (study_folder / "figures" / "overview.svg").read_text()
    curves = set(re.findall(r'aria-label="gradual, 90%: ([^"]*)"', drawn))
    assert len(curves) == 4


def test_the_page_says_what_a_reader_must_be_able_to_name(page):
    text = " ".join(parsed(page).text)
    for part in (
        "sweet spot",
        "The gain survives FGSM and PGD",
        "over-sparsified",
        "indicative",
        "sparring study made-up",
        "Holm",
    ):
        assert part in text


def test_metrics_are_named_within_a_sentence(study_folder, monkeypatch):
    monkeypatch.setattr(Result, "over_sparsified", 0.95)
    told = words.headline(find(load(study_folder)), [])
    assert re.search("Allowed losses: .*r_2 2%", told.ship)
    text = "worst case (ε 0.1) from 95% on, r_2 from 95% on"
    assert any(text in sentence and "not a verdict" in sentence for sentence in told.more)
    assert Measure("distance", attack="smallest", name="smallest", norm="l2").phrase == "smallest ℓ2"
    assert Measure("distance", attack="ddn-100", name="ddn", norm="l2").phrase == "DDN-100 ℓ2"


def test_failures_and_medians_are_shown(page):
    text = " ".join(parsed(page).text)
    assert "the attack failed on 0.5% of images, which count with the largest distance found" in text
    assert "Median" in text


def test_results_csv_has_a_row_a_network_and_metric(study_folder, page):
    with (study_folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    accuracy = [row for row in rows if row["metric"] == "accuracy"]
    assert len(accuracy) == 3 * 8
    assert all(float(row["low"]) <= float(row["value"]) <= float(row["high"]) for row in accuracy)


def test_the_ledger_is_written_as_rows(study_folder, page):
    rows = json.loads((study_folder / "ledger.json").read_text())
    assert {"claim", "verdict", "estimate", "low", "high", "p", "seeds", "images", "study"} <= set(rows[0])
    assert {row["verdict"] for row in rows} <= set(get_args(Verdict))


def test_a_picture_has_twice_the_size_of_its_drawing(study_folder, page, drawing, monkeypatch):
    drawn = (study_folder / "figures" / "accuracy.svg").read_text()
    monkeypatch.setattr(vl_convert, "svg_to_png", drawing.png)
    size = Image.open(io.BytesIO(figures.png(drawn))).size
    assert size == tuple(2 * int(re.search(rf'<svg[^>]* {side}="(\d+)"', drawn)[1]) for side in ("width", "height"))


def test_writing_twice_gives_the_same_bytes(study_folder, page, drawing):
    drawing.svg.cache_clear()
    assert report.write(study_folder).read_text() == page


def test_publishing_says_the_verdict_of_the_page_it_writes(study_folder):
    path, verdict = report.publish(study_folder)
    assert path == study_folder / "report.html"
    assert verdict == report.verdict(study_folder)
    assert verdict.split(",")[0] in html.unescape(path.read_text())


def test_hostile_names_stay_text(make_study):
    hostile = "</script><img src=x onerror=alert(1)>'\"&"
    out = make_study(seeds=1, images=60, sparsities=(0.5, 0.9), methods=(hostile,), classes=[hostile] * 10)
    page = report.write(out).read_text()
    found = parsed(page)
    assert not found.wrong
    assert "<img src=x" not in page
    assert page.count("<script>") == page.count("</script>") == 1
    assert hostile in report.verdict(out) or "methods" not in report.verdict(out)


def test_larger_studies_show_theory_speed_transfer_and_activations(make_study):
    pruning = ({"label": "gradual", "method": "dns"},)
    methods = ("gradual", "top-k")
    out = make_study(seeds=2, images=60, sparsities=(0.5, 0.9), methods=methods, extras=True, pruning=pruning)
    text = " ".join(parsed(report.write(out).read_text()).text)
    drawn = {path.stem for path in (out / "figures").glob("*.svg")}
    assert {"brackets-l2", "exact-l2", "lipschitz-linf-active_in_radius_0.1", "surgery-0", "verdicts-l2-0.2"} <= drawn
    assert {"latency", "transfer-0", "certified-crown-l2", "activations-accuracy", "overview"} <= drawn
    for part in (
        "How tight the bounds are",
        "Solved exactly",
        "Verified at a fixed budget",
        "easier to verify",
        "Packed bytes",
        "51,234",
        "Agreement",
    ):
        assert part in text
    assert "Robustness against activation sparsity" in text
    assert "40% of gradients vanish" in text


def test_one_seed_is_said_to_cover_images_only(make_study):
    out = make_study(seeds=1, images=80, sparsities=(0.5, 0.9))
    assert "1 seed (intervals cover images only)" in report.write(out).read_text()
    verdict = report.verdict(out)
    assert "for one seed" in verdict and "is not shown to change" not in verdict
    assert "no gain, loss or sweet spot is claimed" in verdict


def test_unfinished_studies_show_what_there_is(make_study):
    out = make_study(seeds=2, images=60, sparsities=(0.5, 0.9))
    for cell in read_plan(out).cells:
        if cell.sparsity == 0.9 and cell.seed == 1:
            for key in cell.tasks:
                (out / "records" / f"{key}.json").unlink()
    page = report.write(out).read_text()
    assert "tasks have not finished" in page
    assert "90% omitted because seeds are missing" in page


def test_a_plan_without_any_record_still_makes_a_page(make_study):
    out = make_study(seeds=1, images=60, sparsities=(0.5,))
    for path in (out / "records").iterdir():
        path.unlink()
    assert "no sparse network can be compared" in report.write(out).read_text()


def test_no_study_in_the_folder_is_a_users_error(tmp_path):
    with pytest.raises(UserError, match=r"no plan\.json"):
        report.write(tmp_path)


def test_a_damaged_object_is_a_users_error(make_study):
    out = make_study(seeds=1, images=60, sparsities=(0.5,))
    for path in (out / "objects").iterdir():
        path.write_bytes(b"not tensors")
    with pytest.raises(UserError, match="damaged or from another study"):
        report.write(out)


def test_a_record_that_points_outside_its_folder_is_refused(make_study):
    out = make_study(seeds=1, images=60, sparsities=(0.5,))
    first, *others = read_plan(out).cells
    rewrite_plan(out, cells=(dataclasses.replace(first, tasks=("../plan",)), *others))
    with pytest.raises(UserError):
        report.write(out)


def test_numbers_have_real_minus_signs_and_no_negative_zero(page):
    text = " ".join(parsed(page).text)
    assert not re.search(r"\[-\d", text)
    assert "−0.0 " not in text


def test_the_methods_paragraph_says_how_networks_were_trained_and_on_how_many_images_each_attack_ran(make_study):
    out = make_study(seeds=2, images=60, sparsities=(0.5,))
    assert (
        "Number of test images that were attacked per network: 60 by FGSM (ε 0.1)" in (told := methods_of(out))
        and "epochs" not in told
    )
    recipe = {"epochs": 12, "optimizer": "sgd", "lr": 0.1, "weight_decay": 1e-4, "batch_size": 128}
    training = {"loss": "pgd-at", "norm": "linf", "eps": 0.2, "steps": 7, "ramp": 0.5}
    rewrite_plan(out, recipe=recipe, finetune=recipe | {"epochs": 8}, training=training)
    told = methods_of(out)
    assert "Training took 12 epochs (SGD, learning rate 0.1" in told and "fine-tuning took 8 epochs" in told
    assert "PGD adversarial training (ℓ∞, ε = 0.2, 7 steps); ε grew to its value over a fraction of 0.5" in told
    rewrite_plan(out, model={"name": "lenet-300-100", "weights": "mine.safetensors"})
    told = methods_of(out)
    assert "The dense network was given; fine-tuning took 8 epochs" in told and "7 steps). Number" in told
    rewrite_plan(out, training={"loss": "standard"})
    assert ", with " not in methods_of(out).split("fine-tuning took")[1].split(". ")[0]


def methods_of(out):
    return words.methods(find(load(out)))


def test_no_two_of_many_methods_look_alike(make_study):
    methods = tuple(f"method {k}" for k in range(9))
    page = report.write(make_study(methods=methods, seeds=2, images=20, sparsities=(0.5, 0.9))).read_text()
    drawn = re.findall(r'<svg class="swatch"[^>]*>(<line[^>]*>)', page)
    assert len(drawn) == len(set(drawn)) == 9
