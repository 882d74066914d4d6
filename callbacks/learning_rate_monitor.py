"""LearningRateMonitor: the learning rate as a curve."""

from mlxmm.callback import Callback


class LearningRateMonitor(Callback):
    """Logs "lr" with the training metrics."""

    def on_train_batch_end(self, trainer, module, metrics, batches):
        if trainer.global_step % trainer.config.log_every_n_steps == 0:
            trainer.log({"lr": trainer.optimizer.learning_rate})
