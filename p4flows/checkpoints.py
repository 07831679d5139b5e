"""Checkpoint files that are whole or not there: written aside, read back, the last two kept."""

import contextlib
import hashlib
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class DamagedCheckpointError(ValueError):
    """A file that is no checkpoint, or not what was written."""


def previous_of(path: Path) -> Path:
    """Where the checkpoint before the last one is kept.

    Args:
        path: that of the last one.

    Returns:
        A path in the same folder.

    Example:
        >>> previous_of(Path("run/checkpoint.pt")).name
        'checkpoint.pt.previous'
    """
    return path.with_name(path.name + ".previous")


def try_folder(path: Path) -> None:
    """Find out before the first step whether a checkpoint can be written.

    Args:
        path: of the checkpoint; its folder is made.

    Raises:
        OSError: when the folder cannot be made or does not take a file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent) as file:
        file.write(b"p4flows")
        file.flush()
        os.fsync(file.fileno())


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint, and keep the one that was there as the previous.

    A kill, a full disk or a fault at any moment leaves at least one whole file behind.

    Args:
        path: of the file; its folder exists.
        state: what `torch.load(weights_only=True)` reads.

    Raises:
        OSError: when it cannot be written; the last two checkpoints are unharmed.
        DamagedCheckpointError: when what is read back is not what was written; likewise.
    """
    aside = path.with_name(path.name + ".part")
    try:
        with aside.open("wb") as file:
            torch.save({**state, "digest": digest(state)}, file)
            file.flush()
            os.fsync(file.fileno())
        _read(aside)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise
    if path.exists():
        os.replace(path, previous_of(path))
    os.replace(aside, path)
    _sync_folder(path.parent)


def read_checkpoint(path: Path) -> tuple[dict[str, Any], Path]:
    """Read a checkpoint, or the previous one with a warning where the file is damaged or gone.

    Args:
        path: of the file.

    Returns:
        The state, on the CPU, and the file that it came from.

    Raises:
        FileNotFoundError: when there is neither.
        DamagedCheckpointError: when there is no whole one.
    """
    previous = previous_of(path)
    try:
        return _read(path), path
    except (FileNotFoundError, DamagedCheckpointError) as error:
        if not previous.exists():
            raise
        state = _read(previous)
        # A kill between two renames leaves the previous one alone: nothing is wrong then.
        if path.exists():
            warnings.warn(f"{error}: continuing from {previous}", stacklevel=2)
        return state, previous


def digest(state: Any) -> str:
    """SHA-256 of all that a nested state holds, whatever file it went through.

    Args:
        state: dicts, lists and tuples of tensors, numbers, strings and None.

    Returns:
        Hexadecimal digits.

    Example:
        >>> digest({"a": torch.ones(2)}) == digest({"a": torch.ones(2)})
        True
        >>> digest({"a": torch.ones(2)}) == digest({"a": torch.zeros(2)})
        False
    """
    found = hashlib.sha256()
    for piece in _pieces(state):
        found.update(piece)
    return found.hexdigest()


def _pieces(state: Any) -> Iterator[Any]:
    if isinstance(state, dict):
        yield b"{"
        for key, value in state.items():
            yield repr(key).encode()
            yield from _pieces(value)
        yield b"}"
    elif isinstance(state, list | tuple):
        yield b"["
        for value in state:
            yield from _pieces(value)
        yield b"]"
    elif isinstance(state, Tensor):
        yield f"{state.dtype}{tuple(state.shape)}".encode()
        yield state.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    else:
        yield repr(state).encode()


def _read(path: Path) -> dict[str, Any]:
    try:
        # On the CPU, where random states live; load_state_dict moves the rest to its device.
        state = torch.load(path, weights_only=True, map_location="cpu")
    except (FileNotFoundError, PermissionError):
        raise
    # Whatever it is that torch.load stumbles over in a torn file.
    except Exception as error:
        raise DamagedCheckpointError(
            f"{path} is damaged ({type(error).__name__} while reading it)"
        ) from error
    if not isinstance(state, dict) or "digest" not in state:
        raise DamagedCheckpointError(f"{path} is no checkpoint of fit: it has no checksum")
    written = state.pop("digest")
    if digest(state) != written:
        raise DamagedCheckpointError(f"{path} is damaged (its checksum is another one)")
    return state


def _sync_folder(folder: Path) -> None:
    """Make the renames last, where a folder can be opened (not on Windows)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
