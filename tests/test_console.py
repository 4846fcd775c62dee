import io
import sys
import time

import pytest

from inception_jax import console


def test_progress_without_terminal_logs_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    lines: list[str] = []
    with console.Progress("reading", 1000, log=lines.append) as progress:
        for _ in range(100):
            now[0] += 0.3
            progress.update(10)
    assert lines[0] == "reading: 1,000 images"
    # 30 seconds, a line at most every 5.
    assert lines[1:] == [f"reading: {done} of 1,000 images" for done in (170, 340, 510, 680, 850)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_terminal_draws_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    lines: list[str] = []
    with console.Progress("reading", 50, log=lines.append) as progress:
        progress.update(50)
    assert not lines
    assert "reading: 100%" in terminal.getvalue()


def test_log_lines_are_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with console.Progress("reading", 50, log=lambda line: print(line, file=terminal)) as progress:
        progress.log("x.jpg is damaged")
        progress.update(50)
    written = terminal.getvalue().replace("\r", "\n").splitlines()
    assert "x.jpg is damaged" in written


def test_invisible_progress_only_logs_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    lines: list[str] = []
    with console.Progress("reading", 50, log=lines.append, visible=False) as progress:
        now[0] += 60
        progress.update(25)
        progress.log("x.jpg is damaged")
    assert lines == ["x.jpg is damaged"]
    assert capsys.readouterr() == ("", "")
