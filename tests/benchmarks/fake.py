"""A contender for tests that counts its turns, in a worker process like the real ones."""

import importlib
import os
from typing import Any

from benchmarks.contenders import serve


def make(settings: dict[str, Any]) -> serve.Contender:
    if package := settings.get("needs"):
        importlib.import_module(package)
    if settings.get("broken"):
        raise ValueError("broken on purpose")
    print("libraries print this")
    turns = 0

    def count(start: int) -> dict[str, Any]:
        nonlocal turns
        turns += 1
        with open(settings["log"], "a", encoding="utf-8") as log:
            log.write(f"{settings['name']} ")
        return {"turn": start + turns, "pid": os.getpid()}

    def fail() -> dict[str, Any]:
        raise RuntimeError("failed in its turn")

    return serve.Contender({"parameters": 7}, {"count": count, settings.get("mode", "fail"): fail})
