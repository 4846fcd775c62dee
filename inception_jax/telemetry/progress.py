"""Shows the progress of a training run: a progress bar, or a line per report."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Self, TextIO

from inception_jax import console

_MIN_PAUSE_SECONDS = 0.1


class Progress(console.Progress):
    """Shows the progress of a training run.

    Args:
      total_steps: total steps of the run.
      initial_step: steps done before this process started.
      batch_size: examples per step over all devices.
      stream: output; a terminal shows a bar. None: stderr.
      enabled: whether to write anything; only one process should.
      pauses: returns the total seconds, such as those of compilation, to exclude from the time
        left.
      train_seconds: returns the total seconds of training, without evaluations and checkpoints,
        from which throughput is computed.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        initial_step: int,
        batch_size: int,
        stream: TextIO | None = None,
        enabled: bool = True,
        pauses: Callable[[], float] = lambda: 0.0,
        train_seconds: Callable[[], float] = time.monotonic,
    ) -> None:
        # Counts images, so that the rate is images per second for any batch size.
        super().__init__("training", total_steps * batch_size)
        # Looked up here instead of at import, because tests and notebooks replace it.
        self._stream = sys.stderr if stream is None else stream
        self._enabled = enabled
        self._steps = total_steps
        self._batch_size = batch_size
        self._step = self._first_step = initial_step
        self._pauses = pauses
        self._started, self._paused = time.monotonic(), pauses()
        self._paused_at_start = self._paused
        self._train_seconds = train_seconds
        # Step and training seconds at the last line.
        self._last_line = (initial_step, train_seconds())
        if enabled and self._stream.isatty():
            self._bar = self.draw(
                initial=initial_step * batch_size,
                file=self._stream,
                dynamic_ncols=True,
                mininterval=0.5,
            )

    def __enter__(self) -> Self:
        return self

    def step(self, step: int) -> None:
        """Updates the bar; must be called for each dispatched step. Reads nothing from the device.

        Args:
          step: steps done so far, including this one.
        """
        if self._bar is not None:
            before, self._paused = self._paused, self._pauses()
            # The phases of a pause also take microseconds in steps without one.
            if self._paused - before > _MIN_PAUSE_SECONDS:
                self._bar.unpause()
            self._bar.update((step - self._step) * self._batch_size)
        self._step = step

    def status(self, step: int, values: Mapping[str, float]) -> None:
        """Shows training metrics after the bar or, without one, as a line.

        Args:
          step: the last step that the metrics include.
          values: metrics such as loss and top1, shown with four digits.
        """
        texts = {name: f"{value:.4g}" for name, value in values.items()}
        if self._bar is not None:
            self._bar.set_postfix(texts)
        else:
            metrics = "".join(f", {name} {value}" for name, value in texts.items())
            self.note(f"{self._position(step)}{metrics}")

    def note(self, line: str) -> None:
        """Prints a line above the bar or, without one, with the time."""
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        elif self._enabled:
            print(time.strftime("%H:%M:%S"), line, file=self._stream, flush=True)

    def _position(self, step: int) -> str:
        """Returns step, percentage, throughput since the last line, and time left."""
        text = f"step {step}/{self._steps} ({100 * step / self._steps:.1f}%)"
        before, seconds_before = self._last_line
        self._last_line = step, seconds = step, self._train_seconds()
        if step > before and seconds > seconds_before:
            text += (
                f", {(step - before) * self._batch_size / (seconds - seconds_before):.0f} images/s"
            )
        paused = self._pauses() - self._paused_at_start
        done, elapsed = step - self._first_step, time.monotonic() - self._started - paused
        if done and elapsed > 0:
            # From the average since the start, which includes evaluations.
            text += f", {_duration(round((self._steps - step) * elapsed / done))} left"
        return text


def _duration(seconds: int) -> str:
    """Formats seconds as h:mm:ss.

    >>> _duration(4920)
    '1:22:00'
    """
    minutes, second = divmod(seconds, 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"
