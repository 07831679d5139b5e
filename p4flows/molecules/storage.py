"""Files of which there is all or nothing."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """Have a file written aside and moved to its place, so that there is all of it or none."""
    aside = file.with_name(f"{file.stem}.part{file.suffix}")
    try:
        write(aside)
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)


def save_checkpoint(file: Path, content: dict[str, Any]) -> None:
    """Write tensors and numbers."""
    # torch answers a full disk with a RuntimeError of its own, a buffer with an OSError.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(file, lambda aside: aside.write_bytes(buffer.getbuffer()))


def load_checkpoint(file: Path | None) -> dict[str, Any] | None:
    """What `save_checkpoint` has written, None where there is no file; ValueError for others."""
    if file is None or not file.exists():
        return None
    try:
        found: dict[str, Any] = torch.load(file, weights_only=True)
    # Of zip, pickle or torch, whatever they stumble over.
    except Exception as error:
        raise ValueError(f"{file} cannot be read ({error}): delete it to start anew") from error
    return found
