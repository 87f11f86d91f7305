"""A user's own code that fails does so in one message: the cause, the last line in their file, exit code 2."""

from __future__ import annotations

import json
import os
import textwrap
from pathlib import Path

import pytest

from sparring.cli import _sentence

from ..processes import run_words

NET = "nn.Sequential(nn.Flatten(), nn.Linear(64, 10))"
CODE = """
    import torch
    from torch import nn
    from types import SimpleNamespace
    from sparring.sparsity import Pruner

    class Own(nn.Module):
        def __init__(self, end=lambda z: z):
            super().__init__()
            self.net, self.end = NET, end
        def forward(self, x):
            return self.end(self.net(x))

    class Masked(Own):
        def forward(self, x, mask):
            return self.net(x * mask)

    class Asks(Own):
        def forward(self, x):
            return self.net({}["images"])

    class Asserts(Own):
        def forward(self, x):
            assert x.shape[1] == 3, "wants colour"
            return self.net(x)

    class Ends(Own):
        def forward(self, x):
            raise SystemExit(0)

    class Hungry(Own):
        def forward(self, x):
            raise MemoryError

    class Halting(Own):
        def forward(self, x):
            raise KeyboardInterrupt

    class Mute(Exception):
        def __str__(self):
            raise ValueError

    class Fails(Own):
        def __init__(self, error):
            super().__init__()
            self.error = error
        def forward(self, x):
            raise self.error

    class Talks(Own):
        def forward(self, x):
            print("hello")
            return self.net(x)

    class Late(Own):
        def forward(self, x):
            if len(x) > 2:
                raise ValueError("too many images")
            return self.net(x)

    def masked(): return Masked()
    def asks(): return Asks()
    def asserts(): return Asserts()
    def ends(): return Ends()
    def hungry(): return Hungry()
    def halting(): return Halting()
    def late(): return Late()
    def mute(): return Fails(Mute())
    class Chained(Own):
        def forward(self, x):
            try:
                return {}["images"]
            except KeyError as error:
                raise RuntimeError("no images") from error
    def chained(): return Chained()
    def lines(): return Fails(RuntimeError("one\\n\\n  two"))
    def bare(): return Fails(BaseException("bare"))
    def full(): return Fails(OSError(28, "No space left"))
    def pipe(): return Fails(BrokenPipeError())
    def text_of_code(): exec("def (")
    def talks(): print("hello"); return Talks()
    def needs(shape, hidden): return Own()
    def raises(): raise OSError(2, "no such", "weights.bin")
    def one(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    def five(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    def a_class(): return Own
    def nothing(): return None
    def function(): return lambda x: x
    def text(): return Own(lambda z: "logits")
    def whole(): return Own(lambda z: z.argmax(1))
    def squeezed(): return Own(lambda z: z.squeeze())
    class Inferring(Own):
        @torch.inference_mode()
        def forward(self, x):
            return self.net(x)
    def inferring(): return Inferring()
    def lazy(): return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
    def soft(): return Own(lambda z: z.softmax(1))
    def named(): return Own(lambda z: {"logits": z})
    def pair(): return Own(lambda z: (z, None))
    def held(): return Own(lambda z: SimpleNamespace(logits=z))
    def detached(): return Own(lambda z: z.detach())
    def frozen(): return NET.requires_grad_(False)
    def half(): return NET.half()
    def meta():
        with torch.device("meta"):
            return NET
    def scripted(): return torch.jit.script(NET)
    def plain(): return NET
    def trained():
        net = NET
        nn.init.eye_(net[1].weight)
        nn.init.zeros_(net[1].bias)
        return net
    model = NET
    number = 3

    def attack(model, x, y, *, norm, eps=None, targets=None, generator=None):
        return {}["adversarial"]
    def pipe_attack(model, x, y, *, norm, eps=None, targets=None, generator=None):
        raise BrokenPipeError
    def full_attack(model, x, y, *, norm, eps=None, targets=None, generator=None):
        raise OSError(28, "No space left")
    def mute_attack(model, x, y, *, norm, eps=None, targets=None, generator=None):
        raise Mute
    def bare_attack(model, x, y, *, norm, eps=None, targets=None, generator=None):
        raise GeneratorExit
    def no_attack(model, x, y, *, norm, eps=None, targets=None, generator=None):
        return None
    class Wrong(Pruner):
        def __call__(self, step):
            return step.masks["all"]
    def pruner(sparsity): return Wrong()
    def not_a_pruner(sparsity): return 3
    def no_sparsity(): return 3
    def asks_more(sparsity, model): return Wrong()
    def bare_score(model): return {}
    def score(model, batch=None, **rest): return 1 / 0
    def images(): return [].pop()
    def no_images(): return "images"
    """

OWN = ["--data", "digits", "--images", "20", "--checks", "0", "--attacks", "fgsm"]
MISTAKES = {
    # words after which module, what is said, the line that is shown ("": none in the user's file)
    "masked": ("missing 1 required positional argument: 'mask'", ""),
    "asks": ("KeyError: 'images'", 'return self.net({}["images"])'),
    "asserts": ("AssertionError: wants colour", "assert x.shape[1] == 3"),
    "ends": ("your own code exited the program", "raise SystemExit(0)"),
    "hungry": ("emory", ""),
    "late": ("ValueError: too many images", 'raise ValueError("too many images")'),
    "mute": ("Mute: (its message cannot be read)", "raise self.error"),
    "chained": ("RuntimeError: no images", 'raise RuntimeError("no images") from error'),
    "lines": ("RuntimeError: one two", "raise self.error"),
    "bare": ("BaseException: bare", "raise self.error"),
    "full": ("No space left", "raise self.error"),
    "pipe": ("BrokenPipeError", "raise self.error"),
    "text_of_code": ("SyntaxError: invalid syntax", 'def text_of_code(): exec("def (")'),
    "needs": ("'hidden'", ""),
    "raises": ("no such", "def raises(): raise OSError"),
    "one": ("two logits", ""),
    "five": ("10 classes", ""),
    "a_class": ("the class Own", ""),
    "nothing": ("NoneType", ""),
    "function": ("function", ""),
    "text": ("a str", ""),
    "whole": ("int64", ""),
    "squeezed": ("squeeze", ""),
    "lazy": ("lazy", ""),
    "inferring": ("torch.inference_mode()", ""),
    "soft": ("softmax", ""),
    "model": ("is a module", ""),
    "number": ("not a function", ""),
    "nowhere": ("has no 'nowhere'", ""),
}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Write the user's file under a name of its own, and work beside it."""
    name = f"own_{abs(hash(request.node.nodeid))}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(CODE).replace("NET", NET))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("SPARRING_TRACEBACK", raising=False)
    return name


def one_message(told, own: str, line: str = "") -> str:  # type: ignore[no-untyped-def]
    """Return the message, if it is the only one and names the line."""
    (message,) = [text for text in told.err.splitlines() if not text.startswith("warning: ")]
    assert told.code == 2 and message.startswith("error: ")
    if line:
        assert f"{own}.py:" in message and line in message
    return message


@pytest.mark.parametrize("name", MISTAKES)
def test_models(sparring, own: str, name: str) -> None:  # type: ignore[no-untyped-def]
    said, line = MISTAKES[name]
    assert said in one_message(sparring("attack", f"{own}:{name}", *OWN), own, line)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("name", ["named", "pair", "held", "scripted"])
def test_models_that_answer_in_their_own_way(sparring, own: str, name: str) -> None:  # type: ignore[no-untyped-def]
    told = sparring("attack", f"{own}:{name}", *OWN)
    assert told.code == 0 and "fgsm" in told.out and "untrained" in told.err


@pytest.mark.parametrize("command", ["train", "prune"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("detached", "no gradient: remove detach()"),
        ("frozen", "no parameter that can be trained"),
        ("half", "float16, which rounds small steps away; give --dtype float32"),
        ("meta", "have no values; build it on the CPU"),
    ],
)
def test_models_that_cannot_be_trained(sparring, own: str, command: str, name: str, said: str) -> None:  # type: ignore[no-untyped-def]
    words = (f"{own}:{name}" if word == "MODEL" else word for word in COMMANDS[command])
    assert said in one_message(sparring(*words, "--quiet"), own)


def test_half_a_models_rounding_is_no_fault_of_its_onnx_file(sparring, own: str) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")
    told = sparring("export", f"{own}:half", "o.onnx", "--data", "digits", "--images", 10)
    assert told.code == 0 and "logits agree" in told.out


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripted_models_are_trained(sparring, own: str) -> None:  # type: ignore[no-untyped-def]
    assert sparring("train", f"{own}:scripted", "--out", "o.safetensors", *QUICK).code == 0


COMMANDS = {
    "train": ("train", "MODEL", "--data", "digits", "--out", "o.safetensors"),
    "prune": ("prune", "MODEL", "--data", "digits", "--out", "o.safetensors", "--sparsity", 0.5),
    "certify": ("certify", "MODEL", "--data", "digits"),
    "compare": ("compare", "MODEL", "MODEL", "--data", "digits"),
    "export": ("export", "MODEL", "o.onnx", "--data", "digits"),
    "bench": ("bench", "MODEL", "--data", "digits"),
    "study": ("study", "quick", "--set", "data=digits", "--model", "MODEL", "--out", "out", "--workers", 0),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["asks", "raises", "one"])
def test_in_every_command(sparring, own: str, command: str, name: str) -> None:  # type: ignore[no-untyped-def]
    words = [f"{own}:{name}" if word == "MODEL" else word for word in COMMANDS[command]]
    said, line = MISTAKES[name]
    assert said in one_message(sparring(*words), own, line)
    assert not Path("o.safetensors").exists() and not Path("o.onnx").exists()


QUICK = ("--data", "digits", "--set", "epochs=1", "--quiet")
PARTS = {
    "attack": (("--attacks", "OWN:attack"), 'return {}["adversarial"]'),
    "broken pipe": (("--attacks", "OWN:pipe_attack"), "raise BrokenPipeError"),
    "full disk": (("--attacks", "OWN:full_attack"), 'raise OSError(28, "No space left")'),
    "no text": (("--attacks", "OWN:mute_attack"), "raise Mute"),
    "no Exception": (("--attacks", "OWN:bare_attack"), "raise GeneratorExit"),
    "no attack": (("--attacks", "OWN:no_attack"), ""),
    "unknown attack": (("--attacks", "OWN:attak"), ""),
    "data": (("--data", "OWN:images"), "return [].pop()"),
    "no data": (("--data", "OWN:no_images"), ""),
}


@pytest.mark.parametrize("part", PARTS)
def test_attacks_and_data(sparring, own: str, part: str) -> None:  # type: ignore[no-untyped-def]
    words, line = PARTS[part]
    one_message(sparring("attack", f"{own}:named", *OWN, *(w.replace("OWN", own) for w in words)), own, line)


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("method=OWN:pruner", 'return step.masks["all"]'),
        ("method=OWN:not_a_pruner", ""),
        ("method=OWN:no_sparsity", ""),
        ("method=OWN:asks_more", ""),
        ("score=OWN:bare_score", ""),
        ("score=OWN:score", "return 1 / 0"),
    ],
)
def test_pruners(sparring, own: str, setting: str, line: str) -> None:  # type: ignore[no-untyped-def]
    words = ("prune", f"{own}:plain", "--out", "o.safetensors", "--sparsity", 0.5, *QUICK)
    one_message(sparring(*words, "--set", setting.replace("OWN", own)), own, line)


@pytest.mark.parametrize(
    "words",
    [
        ("attack", "OWN:talks", *OWN),
        ("certify", "OWN:talks", "--data", "digits", "--images", 3),
        ("compare", "OWN:talks", "OWN:talks", "--data", "digits", "--images", 3),
        ("study", "plan.toml", "--model", "OWN:talks", "--out", "out", "--workers", 1),
    ],
    ids=lambda words: words[0],
)
def test_json_is_all_there_is_on_standard_output(sparring, own: str, words: tuple[object, ...]) -> None:  # type: ignore[no-untyped-def]
    Path("plan.toml").write_text("data = 'digits'\nseeds = 1\nsparsities = [0.5]\nrecipe = { epochs = 1 }\n")
    told = sparring(*(str(word).replace("OWN", own) for word in words), "--json")
    assert told.code == 0 and json.loads(told.out) and "hello" in told.err


@pytest.mark.parametrize("workers", [0, 1])
def test_in_a_study_the_cell_fails_and_says_where(sparring, own: str, workers: int) -> None:  # type: ignore[no-untyped-def]
    Path("plan.toml").write_text(
        f"data = 'digits'\nseeds = 1\nsparsities = [0.5]\nmodel = {{ name = 'mlp', widths = [8] }}\n"
        f"recipe = {{ epochs = 1 }}\npruning = [{{ method = '{own}:pruner' }}]\n"
    )
    told = sparring("study", "plan.toml", "--out", "out", "--workers", workers)
    assert told.code == 3 and "KeyError: 'all'" in told.err
    assert f"{own}.py:" in told.err and 'return step.masks["all"]' in told.err
    assert "fix the cause and rerun the same command with --retry" in told.err


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def net(:\n    pass\n", "SyntaxError"),
        ("import no_such_module_at_all\n", "No module named 'no_such_module_at_all'"),
        ("raise ValueError('on import')\n", "ValueError: on import"),
        ("x = 1\n\tif:\n", "Error"),
        ("import sys; sys.exit('no')\n", "your own code exited the program"),
    ],
)
def test_modules_that_cannot_be_imported(sparring, own: str, code: str, said: str) -> None:  # type: ignore[no-untyped-def]
    Path(f"{own}_bad.py").write_text(code)
    message = one_message(sparring("attack", f"{own}_bad:net", *OWN), own)
    assert said in message and f"{own}_bad.py:" in message


def test_weights_that_are_a_folder_are_called_one(sparring, own: str) -> None:  # type: ignore[no-untyped-def]
    Path("folder").mkdir()
    told = one_message(sparring("attack", f"{own}:plain", *OWN, "--weights", "folder"), own)
    assert "folder is a folder, not a file" in told


def test_an_interrupt_says_so(sparring, own: str) -> None:  # type: ignore[no-untyped-def]
    told = sparring("attack", f"{own}:halting", *OWN)
    assert told.code == 130 and "interrupted" in told.err


@pytest.mark.parametrize("place", ["before", "after"])
def test_traceback_shows_the_rest(own: str, tmp_path: Path, place: str) -> None:
    words = ["attack", f"{own}:asks", *OWN]
    words = ["--traceback", *words] if place == "before" else [*words, "--traceback"]
    done = run_words(["sparring", *words], tmp_path, os.environ)
    assert done.returncode == 2 and "Traceback" in done.stderr and done.stderr.strip().splitlines()[-1][:6] == "error:"


def test_training_of_no_epochs_writes_only_what_was_trained_before(sparring, own: str) -> None:  # type: ignore[no-untyped-def]
    words = ("train", "--data", "digits", "--out", "o.safetensors", "--set", "epochs=0")
    for name in ("mlp", f"{own}:plain"):
        told = one_message(sparring(*words, name), own)
        assert "epochs=0 trains nothing" in told and not Path("o.safetensors").exists()
    assert sparring(*words, f"{own}:trained").code == 0 and Path("o.safetensors").exists()
    assert sparring("prune", *words[1:], f"{own}:trained", "--sparsity", 0.5).code == 0


def test_untrained_models_are_named_and_weights_are_compared(sparring, own: str) -> None:  # type: ignore[no-untyped-def]
    for out in ("a.safetensors", "b.safetensors"):
        assert sparring("train", f"{own}:plain", "--out", out, *QUICK).code == 0
    words = ("compare", f"{own}:plain", f"{own}:plain", "--data", "digits", "--images", 10)
    assert "untrained" in sparring(*words).err
    told = sparring(*words, "--weights", "a.safetensors", "--weights", "b.safetensors")
    assert told.code == 0 and not told.err


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (ValueError("allocate sparsity per layer"), False),
    ],
)
def test_only_want_of_memory_is_called_so(error: Exception, memory: bool) -> None:
    assert _sentence(error).startswith("out of memory") == memory
