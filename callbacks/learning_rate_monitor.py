"""LearningRateMonitor: logs the learning rate."""

from mlxmm.training.callback import Callback


class LearningRateMonitor(Callback):
    """Logs "lr" with the training metrics; of a `MultiOptimizer` "lr/0", "lr/1" and so on, in its order."""

    logs = ("lr",)

    def on_train_batch_end(self, trainer, module, metrics, batches):
        if trainer.global_step % trainer.config.log_every_n_steps == 0:
            trainer.log(_rates(trainer.optimizer))


def _rates(optimizer) -> dict:
    parts = getattr(optimizer, "optimizers", None)
    if parts is None:
        return {"lr": optimizer.learning_rate}
    return {f"lr/{i}": part.learning_rate for i, part in enumerate(parts)}
