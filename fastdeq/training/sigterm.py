"""SIGTERM's handler, which Lightning replaces when a fit or a test starts."""

import signal
import threading

from pytorch_lightning import Callback, LightningModule, Trainer


class SigtermHandler:
    """The handler of SIGTERM at this moment, to be put back later.

    Lightning's own communicates with other processes from within the handler, which breaks a
    collective that is under way, and ends a run without saving it (Lightning pull 20825).
    """

    def __init__(self) -> None:
        self._handler = signal.getsignal(signal.SIGTERM)

    def restore(self) -> None:
        """Put it back; without an effect outside the main thread, where Lightning does nothing."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._handler)


class KeepSigtermHandler(Callback):
    """For a single process: the handler from before the fit or test stays. (Of several processes
    `PayloadDDPStrategy` keeps it.)
    """

    def __init__(self) -> None:
        self._before: SigtermHandler | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before Lightning registers its own."""
        self._before = SigtermHandler()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After that."""
        self._restore()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After that."""
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            self._before.restore()
