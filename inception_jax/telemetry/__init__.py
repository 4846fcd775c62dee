"""What a run says of itself: its metrics' writers, a clock, a watchdog, a progress display."""
