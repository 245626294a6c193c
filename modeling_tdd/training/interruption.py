# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""SIGTERM and SIGINT: a run that a scheduler or a user stops ends after its current step."""

import os
import signal
import threading
from typing import Any


class StopRequest:
    """A context that stores SIGTERM or SIGINT in `signal`, for the loop to act on. A second signal has its default
    effect."""

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
    """Makes a data worker ignore signals that go to all processes of a run: its data are needed for the last step.

    The worker obeys only the SIGTERM of the trainer, which ends its workers so.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_the_trainers_signal, daemon=True).start()


def _wait_for_the_trainers_signal() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
