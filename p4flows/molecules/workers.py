"""Worker processes that end with the process that started them, however it ends."""

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from typing import Any


def start_pool(
    workers: int, initializer: Callable[..., None], arguments: tuple[Any, ...]
) -> concurrent.futures.ProcessPoolExecutor:
    """A pool of fresh processes that share nothing with this one.

    Args:
        workers: number of processes.
        initializer: called once in each of them.
        arguments: its arguments.

    Returns:
        The pool. Its processes end when it is shut down, and when this process dies of anything,
        SIGKILL among it: they would wait for work forever otherwise.
    """
    return concurrent.futures.ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(initializer, arguments),
    )


def _start(initializer: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    # A terminal sends Ctrl-C to all: the parent lets what is being computed be finished.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    initializer(*arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
