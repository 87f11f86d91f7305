"""The door to a user's model: whatever it takes and returns, attacks and predictions see images and logits."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparring import deploy, metrics, sparsity
from sparring.attacks import ATTACKS, check_silence, lend, run, square, worst_case
from sparring.data import Split, from_splits
from sparring.errors import UserError
from sparring.graph import lower
from sparring.outputs import Door, logits_of, opened
from sparring.study.stages._networks import check_fit
from sparring.threat import LINF, Threat
from sparring.train import adversarial, cross_entropy, predict, trades

THREAT = Threat(LINF, 0.1)
Pair = namedtuple("Pair", ["features", "logits"])


class Net(nn.Module):
    """A small network with what comes before and after it."""

    def __init__(self, after: Callable[[Tensor], object], before: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))
        self.after, self.before = after, before

    def forward(self, x: Tensor) -> object:
        return self.after(self.body(self.before(x)))


@pytest.fixture
def images() -> Tensor:
    return torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(1))


QUICK = {"square": partial(square, queries=300)}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


WRAPPED: list[Callable[[Tensor], object]] = [
    lambda z: {"logits": z},
    lambda z: OrderedDict(features=z[:, :1], logits=z),
    lambda z: (z, None),
    lambda z: [z],
    lambda z: SimpleNamespace(logits=z, loss=None),
    lambda z: Pair(z[:, :2], z),
]


@pytest.mark.parametrize("wrap", WRAPPED)
def test_logits_are_found_in_what_a_model_returns(wrap: Callable[[Tensor], object], images: Tensor) -> None:
    plain, model = Net(lambda z: z), Net(wrap)
    y = plain(images).argmax(1)
    for attack in ("pgd", "fast"):
        ours, bare = (run(m, images, y, ATTACKS[attack], THREAT, generator=seeded()) for m in (model, plain))
        assert torch.equal(ours.success, bare.success) and ours.flags == bare.flags
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    pixels = (images * 255).byte()
    assert torch.equal(predict(model, pixels), predict(plain, pixels))
    for loss in (cross_entropy, adversarial(eps=0.1), trades(eps=0.1)):
        values = [loss(m, images, y, seeded()) for m in (model, plain)]
        assert torch.equal(*values)
        values[0].backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None for p in model.parameters())


ODD: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "numpy": (lambda z: z.detach().numpy(), "returned a ndarray"),
    "keys": (lambda z: {"out": z}, "dict with the keys out"),
    "nested": (lambda z: {"logits": {"logits": z}}, "a dict that has a dict where logits should be; return logits"),
    "nothing": (lambda z: None, "returned a NoneType"),
    "sparse": (lambda z: z.to_sparse(), "tensor of torch.float32 and torch.sparse_coo"),
    "classes": (lambda z: z.argmax(1), "tensor of torch.int64"),
    "one logit": (lambda z: z[:, :1], "one number per image"),
    "one number": (lambda z: z[:, 0], "one number per image"),
    "squeezed": (lambda z: z.squeeze(), r"for one image the model returns shape \(3,\); squeeze only"),
    "maps": (lambda z: z[:, :, None, None], r"for 2 images the model returns shape \(2, 3, 1, 1\)"),
    "mean": (lambda z: z.mean(), r"returns shape \(\)"),
}


@pytest.mark.parametrize("name", ODD)
def test_other_outputs_are_refused_in_a_sentence(name: str, images: Tensor) -> None:
    after, message = ODD[name]
    y = torch.zeros(24, dtype=torch.int64)
    for size in (None, 1):
        with pytest.raises(UserError, match=message):
            run(Net(after), images, y, ATTACKS["pgd"], THREAT, batch_size=size)
    with pytest.raises(UserError, match=message):
        lend(Net(after), images, y, ATTACKS["pgd"], THREAT)
    with pytest.raises(UserError, match=message):
        predict(Net(after), (images * 255).byte())


def test_what_is_no_module_or_has_no_weights_yet_is_refused(images: Tensor) -> None:
    y = torch.zeros(24, dtype=torch.int64)
    fixed = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    fixed.eval = lambda: None  # type: ignore[method-assign,assignment,return-value]
    for model, message in (
        (fixed, "exported from"),
        (lambda x: x.flatten(1), "the model is a function; wrap it"),
        (nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), r"'1.weight' has no shape yet"),
    ):
        with pytest.raises(UserError, match=message):
            run(model, images, y, ATTACKS["pgd"], THREAT)  # type: ignore[arg-type]
    x = (images * 255).byte()
    with pytest.raises(UserError, match="exported from"):
        check_fit(fixed, from_splits("own", None, None, Split(x, y), classes=3))


@pytest.mark.parametrize(("value", "told"), [(torch.inf, "returns infinite logits"), (torch.nan, "returns NaN")])
def test_logits_that_are_no_numbers_are_named(value: float, told: str, images: Tensor) -> None:
    x, y = (images * 255).byte(), torch.arange(24) % 3
    model = Net(lambda z: torch.cat([z[:, :2], z[:, 2:] * 0 + value], 1)).eval()
    with pytest.raises(UserError, match=told):
        check_fit(model, from_splits("own", None, None, Split(x, y), classes=3))


def test_what_forward_raises_is_the_cause(images: Tensor) -> None:
    def alone(x: Tensor) -> Tensor:
        assert len(x) == 1, "one image at a time"
        return x

    with pytest.raises(UserError, match=r"fails on 2 images of shape .* AssertionError: one image at a time") as seen:
        run(Net(lambda z: z, alone), images, torch.zeros(24, dtype=torch.int64), ATTACKS["pgd"], THREAT)
    assert isinstance(seen.value.__cause__, AssertionError)
    last = seen.value.__cause__.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    assert last is not None and last.tb_frame.f_code.co_name == "alone"


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("attack", ["fgsm", "pgd", "fast", "deepfool", "nearest", "standard"])
def test_a_model_of_another_type_is_attacked_in_its_own(kind: torch.dtype, attack: str, images: Tensor) -> None:
    model, plain = Net(lambda z: 3 * z).to(kind).eval(), Net(lambda z: 3 * z).eval()
    y = model(images.to(kind)).argmax(1)
    threat = Threat(LINF, 0.03) if attack != "nearest" else Threat(LINF)
    found = run(model, images.to(kind), y, ATTACKS[attack], threat, generator=seeded(), surrogates={})
    assert found.flags == ()
    # On the very model, in its own type, what is called a success is one.
    answers = model(found.x_adv.to(kind)).argmax(1)
    assert torch.equal(found.success, (answers != y) & found.clean_correct)
    assert found.x_adv.dtype == (kind if kind == torch.float64 else torch.float32)
    single = run(plain, images, y, ATTACKS[attack], threat, generator=seeded(), surrogates={})
    apart = (found.clean_correct & ~found.success).float().mean() - (
        single.clean_correct & ~single.success
    ).float().mean()
    assert abs(float(apart)) <= 0.1


def test_images_reach_a_model_in_the_type_that_it_takes(images: Tensor) -> None:
    seen: set[torch.dtype] = set()

    def note(x: Tensor) -> Tensor:
        if isinstance(x, Tensor) and not isinstance(x, torch.fx.Proxy):
            seen.add(x.dtype)
        return x.half()

    model = Net(lambda z: z.float(), note)
    model.body.half()
    y = model(images).argmax(1)
    run(model, images, y, ATTACKS["pgd"], THREAT)
    assert torch.float32 in seen and torch.float16 not in seen, "it casts for itself"


def test_small_gradients_survive_half_precision(images: Tensor) -> None:
    model = Net(lambda z: z).half().eval()
    with torch.no_grad():
        model.body.get_parameter("3.weight").mul_(300)
    door, y = opened(model, images), model(images.half()).argmax(1)
    point = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((1e-9 * door(point)).sum(), point)
    (larger,) = torch.autograd.grad(door(point).sum(), point)
    assert bool(gradient.any()) and torch.allclose(1e9 * gradient, larger, rtol=1e-3)
    assert y.shape == (24,)


WRITING: list[Callable[[Tensor], Tensor]] = [
    lambda x: x.sub_(0.5).div_(0.5),
    lambda x: x.relu_(),  # images stay what they are, and autograd would not have it
    lambda x: x.flatten(1).mul_(2),
    lambda x: torch.from_numpy(x.detach().numpy().__imul__(2)) if not x.requires_grad else x * 2,
]


@pytest.mark.parametrize("write", WRITING)
@pytest.mark.parametrize("attack", ["fgsm", "pgd", "fast", "square", "deepfool"])
def test_the_users_images_stay_as_they_are(write: Callable[[Tensor], Tensor], attack: str, images: Tensor) -> None:
    writing, pure = Net(lambda z: z, write), Net(lambda z: z, lambda x: write(x.clone()))
    before, y = images.clone(), pure(images).argmax(1)
    found, expected = (
        run(m, images, y, QUICK.get(attack, ATTACKS[attack]), THREAT, generator=seeded()) for m in (writing, pure)
    )
    assert torch.equal(images, before)
    assert torch.equal(found.success, expected.success) and torch.allclose(found.x_adv, expected.x_adv, atol=1e-3)
    pixels = (images * 255).byte()
    assert torch.equal(predict(writing, pixels), predict(pure, pixels))


def test_a_masked_class_is_no_failure_of_the_others(images: Tensor) -> None:
    def mask(z: Tensor) -> Tensor:
        return z.index_fill(1, torch.tensor([1]), -torch.inf)

    masked, without = Net(mask), Net(lambda z: z[:, [0, 2]])
    y = masked(images).argmax(1)
    fewer = torch.where(y == 2, 1, 0)
    for name in ("fgsm", "pgd", "apgd-dlr", "fast"):
        found = run(masked, images, y, ATTACKS[name], Threat(LINF, 0.05), generator=seeded())
        other = run(without, images, fewer, ATTACKS[name], Threat(LINF, 0.05), generator=seeded())
        assert found.flags == ()
        assert abs(int(found.success.sum()) - int(other.success.sum())) <= 1
    for name in ("nearest", "deepfool", "ddn", "fab", "cw"):
        found = run(masked, images, y, ATTACKS[name], Threat(2.0))
        assert found.flags == () and bool(found.success.all())


def test_a_plain_model_needs_no_door(images: Tensor) -> None:
    model = Net(lambda z: z)
    assert opened(model, images) is model
    door = opened(Net(lambda z: (z,)), images)
    assert isinstance(door, Door) and opened(door, images) is door
    state = torch.get_rng_state()
    opened(Net(lambda z: z + torch.rand_like(z)), images)
    assert torch.equal(state, torch.get_rng_state())


def test_a_tensor_is_its_own_logits() -> None:
    assert logits_of(z := torch.rand(2, 3)) is z


IMAGE = (1, 8, 8)
KINDS: dict[str, Callable[[], nn.Module]] = {
    "mapping": lambda: Net(lambda z: {"logits": z}),
    "tuple": lambda: Net(lambda z: (z, None)),
    "object": lambda: Net(lambda z: SimpleNamespace(logits=z)),
    "writes": lambda: Net(lambda z: z, lambda x: x.mul_(1)),
    "double": lambda: Net(lambda z: z).double(),
}


def _attacked(name: str, count: int, norm: float, eps: float | None, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return ATTACKS[name](model, x[:count], y[:count], norm=norm, eps=eps, generator=seeded())


ENTRIES: dict[str, Callable[[nn.Module, Tensor, Tensor], Any]] = {
    "lower": lambda model, x, y: lower(model, IMAGE),
    "macs": lambda model, x, y: metrics.macs(model, IMAGE),
    "wanda": lambda model, x, y: sparsity.wanda(model, (x, y)),
    "gradients": lambda model, x, y: sparsity.gradients(model, (x, y)),
    "calibrate_": lambda model, x, y: sparsity.calibrate_(model, x),
    "activity": lambda model, x, y: sparsity.activity(model, x),
    "pack": lambda model, x, y: deploy.pack(model, shape=IMAGE),
    "check_silence": lambda model, x, y: check_silence(
        model, x, y, ATTACKS["fgsm"], THREAT, run(model, x, y, ATTACKS["fgsm"], THREAT)
    ),
    "worst_case": lambda model, x, y: worst_case(model, x, y, attacks=[ATTACKS["fgsm"]], eps=0.1),
    **{name: partial(_attacked, name, 4, LINF, 0.1) for name in ("fgsm", "rfgsm", "pgd", "apgd", "nearest")},
    **{name: partial(_attacked, name, 2, 2.0, None) for name in ("deepfool", "ddn", "fab")},
}


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("entry", list(ENTRIES))
def test_every_entry_opens_the_model(entry: str, kind: str, images: Tensor) -> None:
    y, before = Net(lambda z: z)(images).argmax(1), images.clone()
    found, expected = (ENTRIES[entry](model, images, y) for model in (KINDS[kind](), Net(lambda z: z)))
    assert torch.equal(images, before)
    if isinstance(expected, Tensor) and kind != "double":
        assert torch.equal(found, expected)
    elif isinstance(expected, dict) and kind != "double":
        assert all(torch.equal(found[name], value) for name, value in expected.items())
