"""Kill a rounding anywhere and run it again: the same bytes come out, and no finished layer is rounded twice."""

from pathlib import Path

import pytest

from conftest import Zoo
from driver import Driver
from test_resume import KILLED, Press, contents, same, sentence

STEP = "gptq:group_size=0,bits=3"
WHERE = [
    "begin rename slim-00000.safetensors", "end rename slim-00000.safetensors", "end remember 0",
    "begin rename slim-00002.safetensors", "end remember 2", "begin shard model-00001-of-00003.safetensors",
    "end rename config.json", "begin rename moespresso.json",
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(driver: Driver, zoo: Zoo, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Press:
    """A run that nobody disturbed."""
    press = Press(driver, zoo("mixtral"), text, tmp_path_factory.mktemp("whole") / "out")
    done = press(STEP)
    assert done.code == 0, done.stderr
    return press


@pytest.mark.parametrize("line", WHERE)
@pytest.mark.few(1)
def test_killed_and_taken_up(line: str, driver: Driver, whole: Press, zoo: Zoo, text: Path, tmp_path: Path):
    press = Press(driver, zoo("mixtral"), text, tmp_path / "out")
    first = press(STEP, kill=line)
    assert first.code == KILLED
    finished = first.numbers("end rename slim-0000")
    second = press(STEP)
    assert second.code == 0, second.stderr
    assert same(contents(press.out), contents(whole.out))
    again = second.numbers("end rename slim-0000")
    # The layer that was written but not yet remembered is the only one that may be done again.
    assert len(set(again) & set(finished)) <= 1
    assert not list(press.out.rglob("slim-*"))


def test_other_settings_do_not_take_up_its_layers(driver: Driver, zoo: Zoo, text: Path, tmp_path: Path):
    press = Press(driver, zoo("mixtral"), text, tmp_path / "out")
    assert press(STEP, kill="end remember 1").code == KILLED
    assert "--no-resume" in sentence(press("gptq:group_size=0,bits=4"))
