"""Why a training has ended."""

from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import EarlyStopping, Timer


def why_ended(trainer: Trainer) -> str:
    """What ended a training that was not interrupted: a limit of the trainer, or a callback."""
    if trainer.should_stop:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # run time
        reasons = [text for each in callbacks if (text := _stopped_by(each))]
        return "; ".join(reasons) or "a callback requested it (trainer.should_stop)"
    if 0 <= trainer.max_steps <= trainer.global_step:
        return f"trainer.max_steps={trainer.max_steps} is reached"
    return f"trainer.max_epochs={trainer.max_epochs} is reached"


def _stopped_by(callback: Callback) -> str | None:
    if isinstance(callback, Timer):
        left = callback.time_remaining()
        return None if left is None or left > 0 else "trainer.max_time is over"
    if not isinstance(callback, EarlyStopping):
        return None
    if message := getattr(callback, "stopping_reason_message", None):  # since Lightning 2.6
        return f"early stopping: {message.partition(' Signaling')[0].rstrip('.')}"
    best = f"{callback.monitor}, best {float(callback.best_score):.4g}"
    return f"early stopping: {best}" if callback.stopped_epoch else None
