"""Restores the SIGTERM handler, which Lightning replaces when a fit or a test starts."""

import signal
import threading

from pytorch_lightning import Callback, LightningModule, Trainer


class SigtermHandler:
    """The current handler of SIGTERM, to be restored later.

    Lightning's own handler communicates with other processes, which breaks a collective that is in
    progress, and ends a run without saving it (Lightning pull 20825).
    """

    def __init__(self) -> None:
        self._handler = signal.getsignal(signal.SIGTERM)

    def restore(self) -> None:
        """Restore it; no effect outside the main thread, where Lightning sets no handler."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._handler)


class KeepSigtermHandler(Callback):
    """Keeps the handler from before the fit or test, on a single process. (On several processes
    `PayloadDDPStrategy` does the same.)
    """

    def __init__(self) -> None:
        self._before: SigtermHandler | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note the handler before Lightning registers its own."""
        self._before = SigtermHandler()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the handler."""
        self._restore()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the handler."""
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            self._before.restore()
