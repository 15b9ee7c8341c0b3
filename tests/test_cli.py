"""The command line: options reach the verbs, one JSON object goes out, and every fault has its exit code."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import moespresso
from moespresso.cli import main
from moespresso.core.cost import Cost
from moespresso.core.errors import CheckFailed, UserError
from moespresso.core.later import LATER
from moespresso.core.plan import Plan
from moespresso.core.registry import parse_step
from moespresso.core.stats import Stats
from moespresso.core.unit import Unit
from moespresso.data import Source
from moespresso.report import Report

VERBS = ("inspect", "press", "measure", "plan", "build", "verify", "evaluate", "methods", "demo")
INSPECTION = {
    "family": "mixtral",
    "num_layers": 1,
    "layers": [{"index": 0, "mixer": "attention", "experts": 8, "shared_experts": 0, "top_k": 2}],
    "params": {"total": 1000, "active": 400},
    "bytes": {"total": 2000, "experts": 1500, "shared": 0, "attention": 300, "embedding": 100, "other": 100},
    "kv_bytes_per_token": 128,
    "flops_2048": 10**9,
    "notes": [],
}
VERDICT = {"ok": True, "checks": [{"name": "digests", "ok": True, "detail": "3 files"}]}
SCORES = {"tokens": 512, "perplexity": {"value": 12.0, "ci95": [11.0, 13.0]}}
METHODS = [{"kind": "expert_drop", "summary": "Drop.", "doc": "Drop.", "settings": []}]
PLAN = Plan("digest")
STATS = Stats(
    "key", "digest", 64, {Unit(0, "experts", 1): {"tokens": 3.0}}, ("L0.E0 saw no token",), {}, ("routing",)
)
REPORT = Report(
    {"model": "m"}, PLAN, Cost(2, 2, 2, 2, 2, 2), Cost(1, 1, 1, 1, 1, 1), seconds={"build": 1.0}, out="out"
)
DEMO = {"press": REPORT, "verify": VERDICT, "evaluate": SCORES}


class FakeApi:
    """Answers every verb and remembers how it was asked; `fault` is raised instead where it is set."""

    def __init__(self):
        self.calls = []
        self.fault = None
        self.answers = {"inspect": INSPECTION, "press": REPORT, "measure": STATS, "plan": PLAN, "build": REPORT,
                        "verify": VERDICT, "evaluate": SCORES, "methods": METHODS, "demo": DEMO}  # fmt: skip

    def __getattr__(self, verb):
        def answer(*given, **named):
            self.calls.append(SimpleNamespace(verb=verb, given=given, **named))
            print("a library's chatter")
            if self.fault is not None:
                raise self.fault
            return self.answers[verb]

        return answer


@pytest.fixture
def api(monkeypatch):
    fake = FakeApi()
    monkeypatch.setitem(sys.modules, "moespresso.api", fake)
    monkeypatch.setattr(moespresso, "api", fake, raising=False)
    return fake


ASKED = {
    "inspect": ["inspect", "m"],
    "press": ["press", "m", "--out", "o", "--step", "expert_drop:keep=2"],
    "measure": ["measure", "m", "--out", "s.json", "--step", "expert_drop"],
    "plan": ["plan", "m", "--stats", "s.json", "--out", "p.json", "--step", "expert_drop"],
    "build": ["build", "m", "--plan", "p.json", "--out", "o"],
    "verify": ["verify", "o", "--against", "m"],
    "evaluate": ["evaluate", "m", "--text", "t.txt"],
    "methods": ["methods"],
    "demo": ["demo"],
}


def test_every_verb_is_asked_for_here():
    assert tuple(ASKED) == VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_json_is_one_object_on_stdout_and_nothing_else(api, capsys, verb):
    assert main([*ASKED[verb], "--json"]) == 0
    out, err = capsys.readouterr()
    assert isinstance(json.loads(out), dict)
    assert out.count("\n") == 1
    assert "a library's chatter" in err


@pytest.mark.parametrize("verb", VERBS)
def test_people_get_a_page_without_terminal_codes(api, capsys, verb):
    assert main(ASKED[verb]) == 0
    out, _ = capsys.readouterr()
    assert out.strip()
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 100
    assert "chatter" not in out


def test_press_hands_all_its_options_on(api):
    code = main(
        "press m --out o --step expert_drop:keep=2 --step expert_drop:ratio=0.5 --size 25% --target vllm --seed 3 "
        "--text a.txt:weight=2 --text b --dataset c4 --samples 5 --length 64 --mode pack --device cuda:1 "
        "--dtype bfloat16 --max-memory 8GiB --no-resume --allow-nonfinite".split()
    )
    assert code == 0
    (call,) = api.calls
    asked, how = call.recipe, call.runtime
    text = asked.calibration
    assert call.given == ("m",)
    assert call.out == Path("o")
    assert asked.steps == (parse_step("expert_drop:keep=2"), parse_step("expert_drop:ratio=0.5"))
    assert text.texts == (Source("a.txt", 2.0), Source("b"), Source("c4", hub=True))
    assert (text.samples, text.length, text.mode, asked.seed) == (5, 64, "pack", 3)
    assert (asked.budget.size, asked.target) == ("25%", "vllm")
    assert (how.device, how.dtype, how.max_memory) == ("cuda:1", "bfloat16", 8 << 30)
    assert (how.resume, how.allow_nonfinite) == (False, True)


def test_what_is_not_said_is_left_to_the_defaults(api):
    main(ASKED["press"])
    asked, how = api.calls[0].recipe, api.calls[0].runtime
    text = asked.calibration
    assert (text.samples, text.length, text.mode, asked.seed) == (128, 2048, "auto", 0)
    assert asked.budget.size is None
    assert (how.device, how.dtype, how.max_memory, how.resume, how.allow_nonfinite) == (
        "auto", "auto", None, True, False)  # fmt: skip


def test_other_verbs_hand_their_files_on(api):
    for verb in ("measure", "plan", "build", "verify", "evaluate", "demo"):
        assert main(ASKED[verb]) == 0
    measure, plan, build, verify, evaluate, demo = api.calls
    assert measure.out == Path("s.json")
    assert (plan.stats, plan.out) == (Path("s.json"), Path("p.json"))
    assert (build.given, build.plan, build.out) == (("m",), Path("p.json"), Path("o"))
    assert (verify.given, verify.against) == ((Path("o"),), "m")
    assert (evaluate.texts, evaluate.length, evaluate.limit) == ((Source("t.txt"),), None, None)
    assert demo.out is None


def test_the_model_may_stand_in_the_recipe_and_options_override_it(api, tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: owner/name\nsteps: [expert_drop]\ncalibration: {samples: 9}\n")
    assert main(["press", "--recipe", str(recipe), "--out", "o", "--samples", "3"]) == 0
    assert api.calls[0].given == ("owner/name",)
    assert api.calls[0].recipe.calibration.samples == 3
    assert "samples: 3 is followed instead of the recipe's 9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("press m --outt o", "no option --outt (did you mean '--out'?)"),
        ("pres m", "did you mean 'press'?"),
        ("press m", "Missing option '--out'"),
        ("inspect", "Missing argument 'MODEL'"),
        ("inspect m n", "unexpected extra argument"),
        ("press m --out o --samples many --step expert_drop", "'--samples'"),
        ("press m --out o", "nothing was asked for"),
        ("plan m --out o", "nothing was asked for"),
        ("press --out o --step expert_drop", "no MODEL was given"),
        ("press m --out o --step expert_drp", "did you mean 'expert_drop'?"),
        ("press m --out o --step expert_drop:kep=2", "did you mean 'keep'?"),
        ("press m --out o --step expert_drop --dtype bf16", "--dtype 'bf16' is unknown"),
        ("press m --out o --step expert_drop --max-memory lots", "size 'lots' is not understood"),
        ("press m --out o --step expert_drop --export gguf", "--export is not available in this version"),
        ("evaluate m --tasks piqa", "--tasks is not available in this version"),
        ("press m --out o --recipe none.yaml", "recipe none.yaml cannot be read"),
        *((f"{verb} m --to gguf", f"`moespresso {verb}` is not available") for verb in LATER["verb"]),
    ],
)
@pytest.mark.parametrize("suffix", ["", " --json"])
def test_the_users_mistake_is_one_sentence_and_exit_code_2(api, capsys, line, words, suffix):
    assert main((line + suffix).split()) == 2
    out, err = capsys.readouterr()
    assert not out
    assert words.lower() in err.lower()
    assert err.count("\n") == 1
    assert not api.calls


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        (UserError("m is not a folder: give one"), 2, "moespresso: m is not a folder: give one"),
        (CheckFailed("digests differ"), 3, "moespresso: digests differ"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            2,
            "No space left on device: free some space, then run",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/o"),
            2,
            "Permission denied (/o): choose another place",
        ),
    ],
)
def test_a_fault_with_a_cure_is_one_sentence(api, capsys, fault, code, words):
    api.fault = fault
    assert main([*ASKED["press"], "--json"]) == code
    out, err = capsys.readouterr()
    assert not out
    assert words in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "fault", [AssertionError("impossible"), KeyError("x"), FileNotFoundError(2, "gone", "f")]
)
def test_our_fault_leaves_a_traceback_and_exit_code_1(api, capsys, fault):
    api.fault = fault
    assert main(ASKED["press"]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert "Traceback" in err


def test_a_failed_check_is_shown_and_exit_code_3(api, capsys):
    check = {"name": "finite", "ok": False, "detail": "L0.E1.down holds a NaN"}
    api.answers["verify"] = {"ok": False, "checks": [*VERDICT["checks"], check]}
    assert main([*ASKED["verify"], "--json"]) == 3
    out, err = capsys.readouterr()
    assert json.loads(out)["ok"] is False
    assert "o does not pass: finite" in err
    assert main(ASKED["verify"]) == 3
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verb", "words"), [("press", "goes on from there"), ("evaluate", "nothing was written")]
)
def test_an_interrupt_is_one_sentence_and_exit_code_130(api, capsys, verb, words):
    api.fault = KeyboardInterrupt()
    assert main(ASKED[verb]) == 130
    out, err = capsys.readouterr()
    assert not out
    assert f"moespresso: {verb} was interrupted: " in err
    assert words in err


def test_numbers_that_are_not_finite_are_null_in_json(api, capsys):
    api.answers["evaluate"] = {
        "tokens": 2,
        "perplexity": {"value": float("inf"), "ci95": [1.0, float("nan")]},
    }
    assert main([*ASKED["evaluate"], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] == {"value": None, "ci95": [1.0, None]}


def test_progress_goes_to_standard_error(api, capsys):
    def press(model, *, out, recipe, runtime):
        runtime.progress.stage("build", 2)
        runtime.progress.advance()
        runtime.progress.advance()
        return REPORT

    api.press = press
    assert main([*ASKED["press"], "--json"]) == 0
    out, err = capsys.readouterr()
    json.loads(out)
    assert "build: 0/2\n" in err
    assert "build: 2/2 in " in err


def test_the_log_is_heard_only_while_a_command_runs(api, capsys):
    import logging

    logger = logging.getLogger("moespresso")
    before = list(logger.handlers), logger.level
    main(ASKED["press"])
    assert (list(logger.handlers), logger.level) == before


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"moespresso {moespresso.__version__}\n"
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in VERBS)
    assert not any(f" {verb} " in shown for verb in LATER["verb"])


def test_help_and_usage_errors_do_not_wait_for_torch():
    script = (
        "import sys; from moespresso.cli import main; main(['press', '--help']); main(['press', '--outt']); "
        "main(['heal']); sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'moespresso.run.recipe')))"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=60)


def test_python_m_is_the_same_door():
    done = subprocess.run(
        [sys.executable, "-m", "moespresso", "heal"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr == "moespresso: `moespresso heal` is not available in this version\n"
