"""Checksums of all files of a folder, kept in the folder: damage is found, not guessed.

The manifest is JSON: for each file below the folder its size and SHA-256, which `sha256sum` gives
too. Reading a checkpoint of 50 MB for it takes some 0.05 s (BUILD_NOTES.md, "Damaged storage").
"""

import hashlib
import json
import os
import pathlib
from typing import Any

NAME = "manifest.json"
FORMAT = 1


def write(folder: pathlib.Path) -> None:
    """Writes the manifest of a folder that nobody changes any more, and sees it safely on disk.

    Raises:
      OSError: if a file cannot be read, or the manifest not be written.
    """
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path == folder / NAME:
            continue
        files[path.relative_to(folder).as_posix()] = _facts(path)
    with (folder / NAME).open("w", encoding="utf-8") as file:
        json.dump({"format": FORMAT, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def damage(folder: pathlib.Path) -> list[str] | None:
    """Returns what is wrong with the files of a folder, by the manifest in it.

    Files that the manifest does not list are of no interest.

    Returns:
      For each damaged file, its path with what was found and what is right; empty: all is whole;
      None: there is no manifest, so nothing is known.
    """
    try:
        listed = json.loads((folder / NAME).read_bytes())["files"]
        return [
            f"{name} {problem}"
            for name, facts in listed.items()
            if (problem := _problem(folder / name, facts))
        ]
    except FileNotFoundError:
        return None
    except OSError as error:
        return [f"{NAME} cannot be read ({error.strerror})"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{NAME} is no manifest"]


def _problem(path: pathlib.Path, facts: dict[str, Any]) -> str:
    """Returns how a file differs from what is known of it; '' if it does not."""
    size, digest = facts["size"], facts["sha256"]
    try:
        found = path.stat().st_size
        if found != size:
            return f"has {found:,} bytes instead of {size:,}"
        return "" if _facts(path)["sha256"] == digest else "has changed (its SHA-256 is another)"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _facts(path: pathlib.Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return {"size": file.tell(), "sha256": digest.hexdigest()}
