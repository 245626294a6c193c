# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""SIGTERM and SIGINT: a scheduler's or a user's wish that a run ends, which it does after its step."""

import os
import signal
import threading
from typing import Any


class StopRequest:
    """Within this context SIGTERM and SIGINT are noted in `signal` for the loop to act on. A second acts as ever."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.signal: int | None = None

    def __enter__(self) -> "StopRequest":
        self.previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        self.signal = number
        self.__exit__()


def leave_signals_to_the_trainer(worker: int) -> None:
    """For a data worker: a signal to all processes of a run must not take the data from under the last step.

    Only the trainer's own SIGTERM, with which it ends its workers, is obeyed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_the_trainers_signal, daemon=True).start()


def _wait_for_the_trainers_signal() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
