"""How far a run is, for somebody who watches it: a bar on a terminal, plain lines elsewhere.

In a log file or a batch system's console a bar is a mess of control characters, so there each
report of the training metrics becomes one line with a time stamp.
"""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Self, TextIO

from tqdm import tqdm


def say(line: str) -> None:
    """Prints a line on stderr, above a bar if there is one; from any thread."""
    tqdm.write(line, file=sys.stderr)


class Progress:
    """Shows the progress of a training run.

    Args:
      total_steps: steps of the whole run.
      initial_step: steps that were done before this process started.
      batch_size: examples a step, over all devices.
      stream: where to write; a bar if it is a terminal.
      enabled: whether to write anything; only one process should.
      pauses: returns seconds, rising, that speed and time left are not to count, such as those of
        compiling.
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
    ) -> None:
        # Looked up at each call, not when the module is imported: a test or a notebook replaces it.
        self._stream = sys.stderr if stream is None else stream
        self._enabled = enabled
        self._total = total_steps
        self._batch_size = batch_size
        self._step = self._first_step = initial_step
        self._pauses = pauses
        self._started, self._paused = time.monotonic(), pauses()
        self._paused_at_start = self._paused
        # tqdm counts images, so that its rate is images a second whatever the batch size.
        self._bar: tqdm | None = None
        if enabled and self._stream.isatty():
            self._bar = tqdm(
                total=total_steps * batch_size,
                initial=initial_step * batch_size,
                unit=" images",
                unit_scale=True,
                file=self._stream,
                dynamic_ncols=True,
                mininterval=0.5,
            )

    def step(self, step: int) -> None:
        """Tells that a step was dispatched; to be called at each. Reads nothing from the device.

        Args:
          step: steps done so far, this one included.
        """
        if self._bar is not None:
            if (paused := self._pauses()) > self._paused:
                self._paused = paused
                self._bar.unpause()
            self._bar.update((step - self._step) * self._batch_size)
        self._step = step

    def status(self, values: Mapping[str, float]) -> None:
        """Shows training metrics: behind the bar, or as a line of their own.

        Args:
          values: such as loss and top1; they are shown with four digits.
        """
        shown = {name: f"{value:.4g}" for name, value in values.items()}
        if self._bar is not None:
            self._bar.set_postfix(shown)
        else:
            metrics = "".join(f", {name} {value}" for name, value in shown.items())
            self.note(f"{self._position()}{metrics}")

    def note(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(time.strftime("%H:%M:%S"), text, file=self._stream, flush=True)

    def close(self) -> None:
        """Ends the bar, whose last state stays visible."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _position(self) -> str:
        """Returns step, share, speed and time left, over the time since the start but pauses."""
        text = f"step {self._step}/{self._total} ({100 * self._step / self._total:.1f}%)"
        paused = self._pauses() - self._paused_at_start
        done, elapsed = self._step - self._first_step, time.monotonic() - self._started - paused
        if done and elapsed > 0:
            left = round((self._total - self._step) * elapsed / done)
            text += f", {done * self._batch_size / elapsed:.0f} images/s, {_duration(left)} left"
        return text


def _duration(seconds: int) -> str:
    """Returns a duration as h:mm:ss."""
    minutes, second = divmod(seconds, 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"
