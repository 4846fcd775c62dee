"""Observability of a run: metric writers, a clock, a watchdog and a progress display."""
