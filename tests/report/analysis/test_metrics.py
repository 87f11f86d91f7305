"""Metrics as per-image values: shards merged in order, failures censored, worst cases per image."""

import dataclasses

import numpy as np
import pytest

from sparring.records import Record, arrays
from sparring.report.analysis import _metrics as measures
from sparring.report.analysis._metrics import Measure, PerImage, collect, main_measures, summary, values
from sparring.report.analysis._records import Network, Study, load


@pytest.fixture(scope="module")
def study(study_folder):
    return load(study_folder)


@pytest.fixture(scope="module")
def collected(study):
    return collect(study)


def tensors_of(study, network, name, eps):
    """Return an attack's tensors of one network, straight from the files."""
    shards = [
        (record.inputs["start"], arrays(record, "distance", "success", "clean_correct"))
        for record in network.stage("attack")
        if (record.inputs["attack"]["name"], record.inputs["attack"]["eps"]) == (name, eps)
    ]
    ordered = [held for _, held in sorted(shards, key=lambda shard: shard[0])]
    return {key: np.concatenate([held[key] for held in ordered]) for key in ordered[0]}


def test_shards_are_merged_in_the_order_of_their_images(study, collected):
    network = study.of("gradual", 0.9)[1]
    held = tensors_of(study, network, "pgd", 0.1)
    one = collected[Measure("budget", "test", "pgd", "pgd", "linf", 0.1)][network.who]
    assert (one.images == np.arange(200)).all()
    assert (one.top == (held["clean_correct"] & ~held["success"])).all()


def test_failures_count_as_the_largest_distance_and_misclassified_images_count_zero(study, collected):
    network = study.of("gradual", 0.5)[0]
    held = tensors_of(study, network, "deepfool", None)
    found, correct = np.isfinite(held["distance"]), held["clean_correct"]
    everyone = collected[Measure("distance", "test", "deepfool-50", "deepfool", "l2")][network.who]
    only = collected[Measure("distance-correct", "test", "deepfool-50", "deepfool", "l2")][network.who]
    every = [tensors_of(study, n, "deepfool", None)["distance"] for n in study.networks]
    cap = max(far[np.isfinite(far)].max() for far in every)
    distance = np.where(correct, np.where(found, held["distance"], cap), 0.0)
    assert (~found & correct).any()
    assert summary(Measure("distance"), everyone)[0] == pytest.approx(distance.mean())
    assert summary(Measure("distance-correct"), only)[0] == pytest.approx(distance.sum() / correct.sum())
    assert everyone.failed.sum() == only.failed.sum() == (~found & correct).sum()


@pytest.mark.parametrize("failing", [0.0, 0.1, 0.6, 1.0])
def test_a_smallest_distance_never_exceeds_its_parts(study, failing):
    """Ten recorded means did: the hardest images were dropped where one attack failed and another did not."""
    rng = np.random.default_rng(3)
    found = {}
    for name in ("deepfool", "nearest"):
        held = {}
        for k in range(4):
            far = rng.gamma(3, size=80) * (1 + k)
            far[rng.random(80) < (failing if name == "nearest" else failing / 2)] = np.inf
            failed = (~np.isfinite(far)).astype(float)
            held["gradual", 0.5 + k / 10, 0] = PerImage(np.arange(80), far, np.ones(80), failed)
        found[Measure("distance", "test", name, name, "l2")] = held
    measures._add_worst(found)
    measures._cap(found)
    smallest = found[Measure("distance", "test", "smallest", "smallest", "l2")]
    for who, one in smallest.items():
        for name in ("deepfool", "nearest"):
            part = found[Measure("distance", "test", name, name, "l2")][who]
            assert (one.top <= part.top).all() and np.isfinite(part.top[part.bottom > 0]).all()
            assert (one.failed <= part.failed).all()


def test_the_worst_case_is_per_image(collected):
    worst = collected[Measure("worst", "test", norm="linf", eps=0.1)]
    parts = [collected[Measure("budget", "test", name, name, "linf", 0.1)] for name in ("fgsm", "pgd")]
    for who, one in worst.items():
        assert (one.top == parts[0][who].top * parts[1][who].top).all()


def test_an_attack_on_few_networks_does_not_shrink_the_worst_case(study):
    def without_pgd(network: Network) -> Network:
        kept = [r for r in network.records if r.stage != "attack" or r.inputs["attack"]["name"] != "pgd"]
        return dataclasses.replace(network, records=tuple(kept))

    networks = tuple(n if n.seed == 0 else without_pgd(n) for n in study.networks)
    found = collect(dataclasses.replace(study, networks=networks))
    assert Measure("worst", "test", norm="linf", eps=0.1) not in found
    assert len(found[Measure("budget", "test", "pgd", "pgd", "linf", 0.1)]) == 8


def test_values_average_to_each_seeds_metric(collected):
    held = collected[Measure("distance-correct", "test", "deepfool-50", "deepfool", "l2")]
    seeds = [held["gradual", 0.9, seed] for seed in range(3)]
    means = values(seeds, seeds[0].images).mean(axis=1)
    assert means == pytest.approx([summary(Measure("distance-correct"), one)[0] for one in seeds])


def test_the_main_metrics_are_few_and_of_one_budget(collected):
    main = main_measures(list(collected))
    assert [m.role for m in main] == ["accuracy", "budget", "budget", "worst", "distance", "distance-correct"]
    assert {m.eps for m in main if m.eps is not None} == {0.1}


def _budget(name: str, *eps: float, norm: str = "linf") -> list[Measure]:
    return [Measure("budget", "test", name, name, norm, value) for value in eps]


@pytest.mark.parametrize(
    ("attacks", "worst", "main"),
    [
        (_budget("fgsm", 1, 2, 4) + _budget("pgd", 1, 2) + _budget("fast", 1), (1, 2), 1),
        (_budget("fgsm", 1, 2, 4) + _budget("pgd", 1, 2, 4) + _budget("standard", 4), (1, 2, 4), 4),
        (_budget("fgsm", 1, 2, 4) + _budget("pgd", 1, 2, 4), (1, 2, 4), 2),
        (_budget("fgsm", 1, 2, 4), (), 2),
        (_budget("fgsm", 1, 2, 4) + _budget("mine", 1), (), 2),
        (_budget("fgsm", 2) + _budget("pgd", 2) + _budget("pgd", 3, norm="l2"), (2,), 2),
    ],
)
def test_the_main_budget_is_one_where_the_strongest_attack_was_run(attacks, worst, main):
    """Two studies were headlined at an eps that `fast` never saw: PGD, or FGSM alone, was called the worst case."""
    every = [*attacks, *(Measure("worst", norm="linf", eps=eps) for eps in worst)]
    assert {m.eps for m in main_measures(every)} == {main}


def test_fgsm_is_shown_where_it_was_run_if_not_at_the_main_budget():
    attacks = _budget("fgsm", 2, 4, 8) + _budget("pgd", 1) + _budget("fast", 1)
    shown = main_measures([*attacks, Measure("worst", norm="linf", eps=1)])
    assert [(m.name, m.eps) for m in shown if m.role == "budget"] == [("fgsm", 4), ("pgd", 1)]


@pytest.mark.parametrize(("everywhere", "worst"), [(True, {0.1}), (False, set())])
def test_single_steps_alone_make_no_worst_case(study, everywhere, worst):
    """PGD runs at 0.1, on all networks or on one seed's."""

    def with_rfgsm(network: Network) -> Network:
        records = []
        for record in network.records:
            name = record.inputs["attack"]["name"] if record.stage == "attack" else ""
            if name != "pgd" or everywhere or network.seed == 0:
                records.append(record)
            if name == "fgsm":
                inputs = {**record.inputs, "attack": {**record.inputs["attack"], "name": "rfgsm"}}
                records.append(dataclasses.replace(record, inputs=inputs))
        return dataclasses.replace(network, records=tuple(records))

    found = collect(dataclasses.replace(study, networks=tuple(map(with_rfgsm, study.networks))))
    for eps in (0.05, 0.1):
        assert {"fgsm", "rfgsm"} <= {m.name for m in found if m.role == "budget" and m.eps == eps}
    assert {m.eps for m in found if m.role == "worst"} == worst


@pytest.mark.parametrize(
    ("eps", "text"),
    [
        (1 / 255, "1/255"),
        (0.5 / 255, "0.5/255"),
        (8 / 255, "8/255"),
        (0.2, "0.2"),
        (0.1, "0.1"),
        (0.00196, "0.00196"),
        (1.5e-6, "1.5e-06"),
    ],
)
def test_an_eps_is_written_as_the_field_does(eps, text):
    assert Measure("worst", norm="linf", eps=eps).title == f"Worst-case accuracy, ℓ∞ ε = {text}"
    assert Measure("worst", norm="linf", eps=eps).short == f"worst case (ε {text})"


def test_names_of_files_are_harmless():
    odd = Measure("budget", "test", "../../</script> é", "x", "linf", 0.1)
    assert set(odd.slug) <= set("abcdefghijklmnopqrstuvwxyz0123456789-._")
    assert "/" not in odd.slug


def test_checkpoints_are_held_against_the_same_checkpoint_of_the_control_whatever_their_labels_say(study):
    twins = [dataclasses.replace(n, method=f"best of {n.method}", checkpoint="best") for n in study.networks]
    both = dataclasses.replace(study, networks=(*study.networks, *twins))
    assert both.control("gradual") == "control"
    assert both.control("best of gradual") == "best of control"
    assert both.control("best of gradual", "reference") == "best of reference"
    assert both.methods == ("gradual", "best of gradual")
    misnamed = {"control": "gradual (best epoch)", "gradual": "control", "reference": "small dense"}
    study = dataclasses.replace(
        study, networks=tuple(dataclasses.replace(n, method=misnamed[n.method]) for n in study.networks)
    )
    assert study.methods == ("control",) and study.control("control") == "gradual (best epoch)"


def test_naive_attacks_borrow_the_control_and_stay_out_of_the_worst_case(study):
    def renamed(record: Record) -> Record:
        if record.stage != "attack" or record.inputs["attack"]["name"] != "pgd":
            return record
        inputs = {**record.inputs, "attack": {**record.inputs["attack"], "naive": True}}
        return dataclasses.replace(record, inputs=inputs)

    def with_naive(network: Network) -> Network:
        twins = tuple(twin for r in network.records if (twin := renamed(r)) is not r)
        return network if network.method != "gradual" else dataclasses.replace(network, records=network.records + twins)

    found = collect(dataclasses.replace(study, networks=tuple(map(with_naive, study.networks))))
    naive = found[Measure("budget", "test", "pgd", "pgd", "linf", 0.1, naive=True)]
    assert ("control", 0.0, 0) in naive
    assert len(found[Measure("worst", "test", norm="linf", eps=0.1)]) == len(study.networks)


def test_in_l_0_values_count_and_beside_them_pixels(study, monkeypatch):
    """A colour image has three values a pixel."""
    (record,) = study.networks[0].stage("attack")[:1]
    attack = {"name": "sigma-zero", "norm": "l0", "eps": None}
    sparse = dataclasses.replace(record, inputs=record.inputs | {"attack": attack})
    held = {
        "clean_correct": np.array([True, True, False]),
        "success": np.array([True, False, False]),
        "distance": np.array([4.0, np.inf, 0.0]),
        "pixels": np.array([2.0, np.inf, 0.0]),
        "images": np.arange(3),
    }
    monkeypatch.setattr(measures, "arrays", lambda *_: held)
    lone = dataclasses.replace(study, networks=(dataclasses.replace(study.networks[0], records=(sparse,)),))
    found = {measure.title: one for measure, held in collect(lone).items() for one in held.values()}
    values_moved = found["sigma-zero ℓ0 distance (r_0), all images"]
    pixels_moved = found["sigma-zero ℓ0 (pixels) distance, all images"]
    assert values_moved.top.tolist() == [4, 4, 0] and pixels_moved.top.tolist() == [2, 2, 0]


def test_failed_records_are_not_used(study):
    def fail(record: Record) -> Record:
        return dataclasses.replace(record, error="it broke")

    broken: Study = dataclasses.replace(
        study, networks=tuple(dataclasses.replace(n, records=tuple(map(fail, n.records))) for n in study.networks)
    )
    assert collect(broken) == {}


def test_without_l2_the_page_opens_with_distances_of_another_norm() -> None:
    found = [Measure("distance", attack="nearest", name="nearest", norm=norm) for norm in ("l0", "l2", "linf")]
    assert [m.norm for m in main_measures(found)] == ["l2"]
    assert [m.norm for m in main_measures([found[0], found[2]])] == ["l0"]
