import io
import re

import pytest

from inception_jax.telemetry.progress import Progress


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_each_status_is_a_line() -> None:
    stream = io.StringIO()
    with Progress(400, initial_step=100, batch_size=32, stream=stream) as progress:
        for step in range(101, 201):
            progress.step(step)
        progress.status(200, {"loss": 1.23456, "top1": 45.6789})
        progress.note("epoch 2: validation top-1 40%")
    status, note = stream.getvalue().splitlines()
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d step 200/400 \(50\.0%\), \d+ images/s, \d+:\d\d:\d\d left, "
        r"loss 1\.235, top1 45\.68",
        status,
    )
    assert re.fullmatch(r"\d\d:\d\d:\d\d epoch 2: validation top-1 40%", note)


def test_throughput_is_recent_and_time_left_from_the_average(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, trained = 50.0, 7.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    stream = io.StringIO()
    progress = Progress(
        1000, initial_step=900, batch_size=10, stream=stream, train_seconds=lambda: trained
    )
    progress.status(900, {})
    now, trained = now + 20, trained + 10
    progress.step(901)
    progress.step(903)  # Dispatched since, and not part of the metrics.
    progress.status(902, {})
    now, trained = now + 1, trained + 1
    progress.status(904, {})
    first, second, third = stream.getvalue().splitlines()
    assert first.endswith(" step 900/1000 (90.0%)")
    assert second.endswith(" step 902/1000 (90.2%), 2 images/s, 0:16:20 left")
    assert third.endswith(" step 904/1000 (90.4%), 20 images/s, 0:08:24 left")


def test_compilation_is_excluded_from_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now, compiled = 50.0, 7.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    stream = io.StringIO()
    progress = Progress(
        1000, initial_step=900, batch_size=10, stream=stream, pauses=lambda: compiled
    )
    now += 80
    compiled += 60
    progress.step(902)
    progress.status(902, {})
    assert stream.getvalue().endswith(", 0:16:20 left\n")


def test_bar_unpauses_after_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = 0.0
    unpaused: list[int] = []
    with Progress(
        9, initial_step=0, batch_size=1, stream=_Terminal(), pauses=lambda: compiled
    ) as progress:
        assert progress._bar is not None
        monkeypatch.setattr(progress._bar, "unpause", lambda: unpaused.append(1))
        progress.step(1)
        compiled = 3.0
        progress.step(2)
        for step in range(3, 9):
            compiled += 1e-5  # Entering the phase takes time, too.
            progress.step(step)
    assert unpaused == [1]


def test_terminal_shows_a_bar_with_notes_above() -> None:
    stream = _Terminal()
    with Progress(4, initial_step=1, batch_size=500, stream=stream) as progress:
        progress.step(2)
        progress.note("a note")
        progress.step(4)
        progress.status(4, {"loss": 2.0})
    text = stream.getvalue()
    assert "2.00k/2.00k" in text
    assert "images/s" in text
    assert "loss=2" in text
    assert re.search(r"(^|\r)a note\n", text)


@pytest.mark.parametrize("stream", [io.StringIO(), _Terminal()])
def test_disabled_progress_shows_nothing(stream: io.StringIO) -> None:
    with Progress(4, initial_step=0, batch_size=8, stream=stream, enabled=False) as progress:
        progress.step(1)
        progress.status(1, {"loss": 1.0})
        progress.note("a note")
    assert stream.getvalue() == ""


def test_standard_error_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    Progress(4, initial_step=0, batch_size=8).note("a note")
    captured = capsys.readouterr()
    assert captured.err.endswith(" a note\n") and captured.out == ""
