"""A made-up study folder, written as studies write theirs."""

import hashlib
import json

import numpy as np
import pytest
from safetensors.numpy import save

from sparring.records import CELLS, Cell, PlanFile, Record, Store, pruning_kind, write_plan

FEW = (("fgsm", 0.1), ("pgd", 0.1))
MANY = (("fgsm", 0.05), ("fgsm", 0.2), *FEW)
STRENGTH = {"pgd": 0.4, "fast": 0.6, "standard": 0.65}  # beyond a single step's
VERIFIED = {0.0: (0.3, 0.3), 0.5: (0.6, 0.1), 0.9: (0.9, 0.05)}  # shares verified and falsified
SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)


class Maker:
    """Write the records of networks whose robustness rises and then falls with sparsity."""

    def __init__(self, out, images, budgets, rng, *, valid=False, fall=4.0, flag="", share=1.0, change=None):
        self.store, self.images, self.budgets, self.rng = Store(out), images, budgets, rng
        self.valid, self.fall, self.flag = valid, fall, flag
        self.change = change  # what to make of a record's tensors, given its stage and inputs
        self.share = share  # of all weight matrices, that pruning may touch
        self.ease = rng.normal(size=images)  # an easy image is easy for every network
        self.labels = rng.integers(0, 10, size=images)
        self.clean = rng.random((6, 1, 28, 28)).astype(np.float32)
        self.store.prepare()

    def record(self, stage, inputs, metrics=None, *, series=None, flags=(), error=None, tensors=None, times=None):
        if tensors is not None and self.change is not None:
            tensors = self.change(stage, inputs, tensors)
        key = hashlib.sha256(json.dumps([stage, inputs], sort_keys=True).encode()).hexdigest()[:32]
        times = {"seconds": 1.5} | (times or {})
        made = {"metrics": metrics or {}, "series": series or {}, "flags": list(flags), "error": error, "times": times}
        record = Record(key, stage, inputs, **made, environment={"torch": "2.13.0"}, origin={"plan": "made-up"})
        self.store.write(record, save(tensors) if tensors is not None else b"")
        return key

    def network(self, seed, method, sparsity):
        """Write one network's records and return their keys."""
        gain = 1.2 * sparsity - 8 * max(0.0, sparsity - 0.95) ** 0.6 + 0.05 * self.rng.normal()
        gain *= 0.2 if method == "luck" else 1.0
        who = {"seed": seed, "method": method, "sparsity": sparsity}
        correct = self.ease + 0.3 * self.rng.normal(size=self.images) > -2.0 + self.fall * max(0.0, sparsity - 0.95)
        kept = self.rng.random((300, 784)) >= sparsity
        keys = [
            self.record("train", who | {"epochs": 2}, {"loss": 0.1}, series={"loss": [0.5, 0.1]}),
            self.record(
                "measure",
                who,
                {
                    "accuracy": float(correct.mean()),
                    "sparsity": sparsity,
                    "sparsity_total": sparsity * 0.99,
                    "macs": 266200 * (1 - sparsity),
                    "macs_dense": 266200,
                    "bytes_dense": 1066440,
                    "bytes_sparse": 1066440 * max(0.01, 1.2 * (1 - sparsity)),
                    "activation_sparsity": 0.6,
                }
                | ({"sparsity_matrices": self.share * sparsity} if self.share < 1 else {}),
                series={"density": {"fc1.weight": 1 - sparsity, "fc2.weight": (1 - sparsity) ** 0.5}},
                tensors={
                    "correct": correct,
                    "images": np.arange(self.images, dtype=np.int32),
                    "first_mask": kept,
                    "first_weight": (kept * self.rng.normal(size=kept.shape)).astype(np.float32),
                }
                | ({"correct_valid": correct[::-1].copy()} if self.valid else {}),
            ),
        ]
        for name, eps in self.budgets:
            for split in ("test", "valid") if self.valid else ("test",):
                margin = self.ease + gain + 1.5 - 15 * eps - STRENGTH.get(name, 0.0)
                robust = correct & (margin + 0.3 * self.rng.normal(size=self.images) > 0)
                keys += self.attack(who, {"name": name, "norm": "linf", "eps": eps}, correct, ~robust, split=split)
        far = np.where(correct, np.exp(0.3 * self.ease + 0.2 * gain), 0.0).astype(np.float32)
        far[0] = np.inf  # one image on which the attack fails
        deepfool = {"name": "deepfool", "norm": "l2", "eps": None, "steps": 50}
        return keys + self.attack(who, deepfool, correct, np.isfinite(far), far)

    def extras(self, seed, method, sparsity):
        """Write records that only larger studies have: a certificate, a deployment, a transfer; return their keys."""
        who = {"seed": seed, "method": method, "sparsity": sparsity}
        radius = {"radius": (0.1 * self.rng.random(20)).astype(np.float32), "images": np.arange(20, dtype=np.int32)}
        certified = who | {"network": method, "norm": "l2", "method": "crown", "images": 20, "eps": []}
        flags = [{"name": "zero-gradient", "detail": "40% of gradients vanish"}]
        times = {"latency": 1e-5 * (1.1 - sparsity), "latency_torch": 3e-5}
        constant = (1 - sparsity) * (1 + self.rng.random(20))
        margin = constant * (0.2 + 0.1 * sparsity + 0.01 * self.rng.random(20))
        right, images = np.ones(20, dtype=bool), np.arange(20, dtype=np.int32)
        proved = {"margin": margin, "lipschitz": constant, "ratio": margin / constant, "clean_correct": right}
        proved["images"] = images
        far = 0.1 * (1 + self.rng.random(5))
        searched = {"lower": far, "upper": far, "attack": 1.1 * far, "solved": right[:5], "clean_correct": right[:5]}
        searched["images"] = images[:5]
        kept, fooled = (round(self.images * share) for share in VERIFIED.get(sparsity, (0.0, 0.0)))
        kept, fooled = (kept + seed - 1, fooled + 1 - seed) if sparsity else (kept, fooled)  # equal seeds count as one
        order = np.arange(self.images)
        verdicts = {
            "verified_by": np.where(order < kept, 3, 0).astype(np.int8),
            "falsified": order >= self.images - fooled,
        }
        verdicts |= {"stable": 0.5 + 0.4 * sparsity + 0.01 * self.rng.random(self.images)}
        verdicts["images"] = np.arange(self.images, dtype=np.int32)
        moved = who | {"split": "test", "start": 0, "stop": 20, "attack": {"name": "pgd", "norm": "linf", "eps": 0.1}}
        most = {"clean_correct": right, "success": np.arange(20) < 18, "images": images}
        return [
            self.record("certify", certified, tensors=radius),
            self.record(
                "lipschitz",
                who | {"network": method, "norm": "linf", "method": "active", "radius": 0.1},
                tensors=proved,
            ),
            self.record("exact", who | {"norm": "l2", "images": 5}, tensors=searched),
            self.record("verify", who | {"norm": "l2", "eps": 0.2, "images": self.images}, tensors=verdicts),
            self.record("prune", who, series={"step": [0, 5, 9], "pruned": [9, 5, 1], "spliced": [0, 2, 1]}),
            self.record("deploy", who, {"bytes_packed": 51234, "agreement": 1.0}, times=times),
            self.record(
                "transfer", moved | {"direction": "to sparse"}, {"transferred": 0.9}, flags=flags, tensors=most
            ),
            self.record("transfer", moved | {"direction": "to dense"}, {"transferred": 0.9}, tensors=most),
        ]

    def attack(self, who, attack, correct, success, distance=None, *, split="test"):
        """Write one attack's records, in two shards."""
        far = np.where(success, 0.1, np.inf).astype(np.float32) if distance is None else distance
        keys, half = [], self.images // 2
        for start, stop in ((0, half), (half, self.images)):
            part = slice(start, stop)
            tensors = {
                "clean_correct": correct[part],
                "success": success[part],
                "distance": far[part],
                "label": self.labels[part],
                "images": np.arange(start, stop, dtype=np.int32),
            }
            if start == 0:
                noise = 0.1 * np.sign(self.rng.normal(size=self.clean.shape)).astype(np.float32)
                tensors |= {"clean": self.clean, "perturbed": np.clip(self.clean + noise, 0, 1)}
            inputs = who | {"attack": attack, "split": split, "start": start, "stop": stop}
            metrics = {"forwards": 100, "backwards": 50, "robust_accuracy": None}
            raised = [{"name": self.flag, "detail": "planted"}] if self.flag and attack["name"] == "pgd" else []
            keys.append(self.record("attack", inputs, metrics, tensors=tensors, flags=raised))
        return keys


@pytest.fixture(scope="session")
def make_study(tmp_path_factory):
    """Return a function that writes a made-up study and returns its folder."""

    def make(
        *,
        seeds=3,
        images=200,
        sparsities=SPARSITIES,
        methods=("gradual",),
        classes=None,
        budgets=FEW,
        extras=False,
        pruning=(),
        name="made-up",
        mark="",
        **planted,
    ):
        out = tmp_path_factory.mktemp("study")
        maker = Maker(out, images, budgets, np.random.default_rng(0), **planted)
        tables = {table["label"]: table for table in pruning}
        cells = []
        for seed in range(seeds):
            wanted = [("reference", 0.0), ("control", 0.0)] + [(m, s) for m in methods for s in sparsities]
            for method, sparsity in wanted:
                tasks = maker.network(seed, method, sparsity)
                tasks += maker.extras(seed, method, sparsity) if extras else []
                table = tables.get(method, {})
                kind = pruning_kind(table.get("score"), table.get("method"), table.get("structure"))
                kind = method if method in CELLS else "activations" if method.startswith("top-k") else kind
                axis = "activations" if kind == "activations" else "weights"
                cells.append(Cell(seed, method, sparsity, axis, kind, "final", tuple(tasks)))
        plan = {"name": name, "mark": mark, "data": "mnist-5k", "model": {"name": "lenet-300-100"}, "seeds": seeds}
        names = classes or [str(k) for k in range(10)]
        facts = {"name": "mnist-5k", "classes": names, "class_count": len(names), "train": 100, "valid": images}
        facts |= {"test": images, "shape": [1, 28, 28]}
        environment = {"python": "3.11", "torch": "2.13.0", "platform": "Linux"}
        command = "sparring study made-up"
        write_plan(out, PlanFile(plan | {"pruning": list(pruning)}, tuple(cells), facts, environment, command))
        return out

    return make


@pytest.fixture(scope="session")
def study_folder(make_study):
    """A small complete study; tests must not change it."""
    return make_study(budgets=MANY)
