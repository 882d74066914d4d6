"""Lightning's words, each with what to write here instead. docs/from-lightning.md shows them side by side."""

LOG = 'return {"loss": loss, "name": value} from the step; a callback calls trainer.log({"name": value})'
ONE_OPTIMIZER = (
    "return the optimizer alone; a schedule is its learning_rate: AdamW(learning_rate=schedule), "
    "which gets the update's number"
)
NO_PARAMETERS = "an optimizer of MLX takes no parameters, and learning_rate, not lr: AdamW(learning_rate=1e-3)"
READS_A_NUMBER = "a step is compiled, so return the array as a metric, or run plain Python by Trainer(compile=False)"
MEMORY = "leave it out, arrays are where the device is; mx.set_default_device(mx.cpu) chooses another"
UPDATE = "write on_before_optimizer_step(self, grads), or in a module after_update(self), after the optimizer"
MEANS = "write on_validation_end, which gets the means of what the steps returned"
BATCHES = "leave it out, batches are made ready in the loader, and nobody moves them"
NOT_NEEDED = "leave it out, nothing here needs it"
MANUAL = "return the loss from training_step and the optimizer from configure_optimizers: the Trainer updates"
OUTSIDE = "outside of steps: they are compiled, and a number in them stays what it was"
SCHEDULE = "write AdamW(learning_rate=schedule): a schedule is a function of the step, within the optimizer"
RATE = "write trainer.optimizer.learning_rate, the rate now"
LAUNCH = "leave it out, mlx.launch -n 4 -- python script.py starts four processes"
CHECKPOINTS = "write callbacks=[ModelCheckpoint(...)]; enable_checkpointing=False to have none"

MODULE = {  # attributes and methods of a LightningModule
    "log": LOG,
    "log_dict": LOG,
    "hparams_initial": "write self.hparams",
    "save_hyperparameters": "write self.lr = lr; or self.config = config, an attrs class, which loggers write",
    "state_dict": "write dict(mlx.utils.tree_flatten(part.parameters()))",
    "load_state_dict": "write part.load_weights(list(arrays.items()))",
    "device": MEMORY,
    "to": f"{MEMORY}; module.set_dtype(mx.bfloat16) changes dtypes",
    "cuda": MEMORY,
    "cpu": MEMORY,
    "half": "write Trainer(precision='bf16-true')",
    "dtype": "leave it out, dtypes are those of the parameters",
    "current_epoch": f"write self.trainer.current_epoch, {OUTSIDE}",
    "global_step": f"write self.trainer.global_step, {OUTSIDE}",
    "logger": "write self.trainer.logger",
    "optimizers": f"write self.trainer.optimizer; {MANUAL}",
    "lr_schedulers": SCHEDULE,
    "manual_backward": MANUAL,
    "automatic_optimization": MANUAL,
    "toggle_optimizer": "write self.part.freeze() and self.part.unfreeze(), or the callback FreezeSchedule",
    "print": "write print(...) under `if self.trainer.is_global_zero`, outside of steps",
    "all_gather": "write mlxmm.distributed.collectives.all_gather(array)",
    "register_buffer": "write self.name = mx.array(...), then self.freeze(keys=['name'], recurse=False)",
    "named_parameters": "write mlx.utils.tree_flatten(self.parameters())",
    "named_children": "write self.children().items()",
    "requires_grad_": "write self.freeze() or self.unfreeze()",
    "zero_grad": "leave it out, MLX has no gradient buffers",
    "example_input_array": NOT_NEEDED,
    "to_onnx": "write save_pretrained(folder), of the modules that have it",
    "to_torchscript": "write save_pretrained(folder), of the modules that have it",
}
DATAMODULE = {  # attributes and methods of a LightningDataModule
    "save_hyperparameters": MODULE["save_hyperparameters"],
    "hparams_initial": "write data.hparams",
    "load_from_checkpoint": "make it by its class: a checkpoint has what state_dict returned, for load_state_dict",
}
TRAINER = {  # attributes and methods of Lightning's Trainer
    "model": "write trainer.module",
    "lightning_module": "write trainer.module",
    "optimizers": "write trainer.optimizer, the only one",
    "lr_scheduler_configs": RATE,
    "lr_schedulers": RATE,
    "fit_loop": "write trainer.progress, which has the counters; trainer.should_stop = True ends the run",
    "num_training_batches": "write trainer.estimated_stepping_batches, the updates of the run",
    "num_val_batches": "write len(trainer.datamodule.val_dataloader())",
    "train_dataloader": "write trainer.datamodule.train_dataloader()",
    "val_dataloaders": "write trainer.datamodule.val_dataloader()",
    "world_size": "write mlxmm.distributed.collectives.world_size()",
    "global_rank": "write mlxmm.distributed.collectives.rank()",
    "local_rank": "write mlxmm.distributed.collectives.rank()",
    "sanity_checking": "leave it out, no hook of validation is called in the sanity check",
    "progress_bar_metrics": "write trainer.callback_metrics",
    "interrupted": "write trainer.state == 'interrupted'",
    "print": "write print(...) under `if trainer.is_global_zero`",
    "tune": "write callbacks=[LearningRateFinder()] or [BatchSizeFinder()]",
    "tuner": "write callbacks=[LearningRateFinder()] or [BatchSizeFinder()]",
    "early_stopping_callback": "keep the EarlyStopping that you gave, or look into trainer.callbacks",
    "checkpoint_callbacks": "write trainer.checkpoint_callback, or look into trainer.callbacks",
    "log_metrics": "write trainer.log({'name': value})",
}
ARGUMENTS = {  # of Lightning's Trainer, in its present and its earlier versions
    "gpus": "leave it out, MLX uses the GPU that it finds",
    "tpu_cores": "leave it out, MLX uses the GPU that it finds",
    "num_processes": LAUNCH,
    "auto_lr_find": "write callbacks=[LearningRateFinder()]",
    "auto_scale_batch_size": "write callbacks=[BatchSizeFinder()]",
    "auto_select_gpus": "leave it out, MLX uses the GPU that it finds",
    "resume_from_checkpoint": "write trainer.fit(module, data, ckpt_path='last')",
    "checkpoint_callback": CHECKPOINTS,
    "weights_save_path": "write callbacks=[ModelCheckpoint(dirpath=...)]",
    "progress_bar_refresh_rate": "write callbacks=[TQDMProgressBar(refresh_seconds=0.2)], or enable_progress_bar=False",
    "weights_summary": "write enable_model_summary=False to have none",
    "stochastic_weight_avg": "write callbacks=[EMAWeightAveraging()]",
    "terminate_on_nan": "write detect_anomaly=True, or callbacks=[LossSpikeGuard()]",
    "track_grad_norm": "leave it out, the norm is always logged as train/grad_norm",
    "reload_dataloaders_every_n_epochs": "leave it out, train_dataloader() of a DataModule is called in every epoch",
    "reload_dataloaders_every_epoch": "leave it out, train_dataloader() of a DataModule is called in every epoch",
    "benchmark": NOT_NEEDED,
    "inference_mode": "leave it out, evaluation takes no gradients",
    "sync_batchnorm": "leave it out, each process has its own running means",
    "use_distributed_sampler": "leave it out, mlxmm's loaders give every process its share",
    "replace_sampler_ddp": "leave it out, mlxmm's loaders give every process its share",
    "plugins": "write precision=... or strategy=..., without plugins",
    "amp_backend": "write precision='bf16-mixed'",
    "amp_level": "write precision='bf16-mixed'",
    "barebones": "write logger=False, enable_checkpointing=False, enable_progress_bar=False",
    "model_registry": "leave it out, recipes have --push-to user/name",
    "truncated_bptt_steps": "cut the sequences in the loader",
    "log_gpu_memory": "write callbacks=[DeviceStatsMonitor()]",
    "prepare_data_per_node": "leave it out, prepare_data runs on one process",
}
TENSORS = {  # methods of torch's tensors that arrays do not have
    "to": "leave it out, arrays are where the device is; x.astype(mx.float32) changes the dtype",
    "cuda": "leave it out, arrays are where the device is",
    "cpu": "leave it out, arrays are where the device is",
    "detach": "write mx.stop_gradient(x)",
    "backward": "return the loss from training_step: the Trainer computes gradients",
    "permute": "write x.transpose(...)",
    "unsqueeze": "write mx.expand_dims(x, axis), or x[:, None]",
    "float": "write x.astype(mx.float32)",
    "long": "write x.astype(mx.int32)",
    "clamp": "write mx.clip(x, low, high)",
    "numpy": "write np.array(x), outside of steps",
}
LAYERS = {name: MODULE[name] for name in ("state_dict", "load_state_dict", "to", "cuda", "cpu", "half", "device")} | {
    name: MODULE[name] for name in ("register_buffer", "named_parameters", "named_children", "requires_grad_")
}
CALLS = {  # of fit, validate, test and predict
    "weights_only": "leave it out, a checkpoint holds arrays and JSON, and is never unpickled",
    "return_predictions": "leave it out, predict returns what predict_step returned for each batch",
    "train_dataloader": "write train_dataloaders=...",
    "val_dataloader": "write val_dataloaders=...",
    "test_dataloaders": "write dataloaders=...",
    "module": "write model=..., or the first argument",
}
LOADING = {  # arguments of load_from_checkpoint, but for map_location and weights_only, which change nothing here
    "strict": "leave it out, all weights must fit; mlxmm.storage.checkpoint.load(folder)['weights'] are the arrays, "
    "for net.load_weights(list(arrays.items()), strict=False)",
    "hparams_file": "leave it out, and give the arguments of __init__ by name",
}
CALLBACK = {  # methods of a LightningModule that Lightning lends to callbacks
    "log": 'write trainer.log("name", value)',
    "log_dict": 'write trainer.log({"name": value})',
}
LOGGER = {  # attributes of Lightning's loggers
    "experiment": 'write trainer.log({"name": value}) for scalars, to all loggers; each has log_images, log_text and '
    "log_histogram; the writer of TensorBoard's is that of TensorBoardLogger, one of trainer.loggers",
    "add_scalar": 'write trainer.log({"name": value})',
    "add_image": "write log_images(name, images, step)",
    "add_images": "write log_images(name, images, step)",
    "add_text": "write log_text(name, text, step)",
    "add_histogram": "write log_histogram(name, values, step)",
    "log_dir": "write trainer.log_dir",
    "save_dir": "write trainer.log_dir",
    "log_image": "write log_images(name, images, step)",
    "watch": "write callbacks=[GradientHistograms(), WeightHistograms()]",
}
SETTINGS = "the settings that loggers write are the fields of self.config: write self.config = config, an attrs class"
NO_OP_VALUES: dict[str, tuple] = {  # arguments of Lightning's callbacks and loggers whose value means what is done here
    "verbose": (True, False),
    "save_last": (True, "link"),
    "save_weights_only": (False,),
    "save_on_train_epoch_end": (False,),
    "auto_insert_metric_name": (True, False),
    "strict": (True,),
    "check_on_train_epoch_end": (False,),
    "log_rank_zero_only": (True, False),
    "logging_interval": ("step",),
    "log_momentum": (False,),
}
NO_OP_LOADING = {"strict": True, "hparams_file": None}
CONSTRUCTORS = {  # arguments of Lightning's callbacks and loggers
    "verbose": "leave it out",
    "filename": "leave it out, checkpoints are named step=N, and the links best and last point to them",
    "save_last": "leave it out, the link last always points to the newest checkpoint",
    "save_weights_only": "leave it out, a checkpoint holds all that a resume needs",
    "save_on_train_epoch_end": "write every_n_epochs=1",
    "auto_insert_metric_name": "leave it out, checkpoints are named step=N",
    "period": "write every_n_epochs=...",
    "strict": "write strict=True, or leave it out: a metric that nobody logs is an error",
    "check_on_train_epoch_end": "leave it out, metrics are looked at after each validation",
    "log_rank_zero_only": "leave it out",
    "logging_interval": "leave it out, the rate is logged every log_every_n_steps updates",
    "log_momentum": "leave it out",
    "refresh_rate": "write refresh_seconds=0.2",
    "max_depth": "leave it out, the parts of the module are shown",
    "save_dir": "write folder=...",
    "version": "leave it out: folder=... is the whole path",
    "name": "leave it out: folder=... is the whole path",
    "swa_lrs": "write EMAWeightAveraging(decay=0.999)",
}
POSITIONS = {  # the first arguments of Lightning's callbacks and loggers, in their order
    "EarlyStopping": ("monitor", "min_delta", "patience", "verbose", "mode"),
    "ModelCheckpoint": ("dirpath", "filename", "monitor", "verbose", "save_last", "save_top_k"),
    "LearningRateMonitor": ("logging_interval", "log_momentum"),
    "ModelSummary": ("max_depth",),
    "TQDMProgressBar": ("refresh_rate",),
    "TensorBoardLogger": ("save_dir", "name", "version"),
}
HOOKS = {  # methods of Lightning's that nobody calls here
    "training_epoch_end": "write on_train_epoch_end, when trainer.callback_metrics has the means",
    "validation_epoch_end": MEANS,
    "test_epoch_end": "write on_test_end, which gets the means of what the steps returned",
    "predict_epoch_end": "write on_predict_epoch_end; trainer.predict returns the outputs",
    "training_step_end": "do it at the end of training_step",
    "validation_step_end": "do it at the end of validation_step",
    "test_step_end": "do it at the end of test_step",
    "on_epoch_start": "write on_train_epoch_start",
    "on_epoch_end": "write on_train_epoch_end",
    "on_batch_start": "write on_train_batch_start",
    "on_batch_end": "write on_train_batch_end",
    "on_pretrain_routine_start": "write on_fit_start",
    "on_pretrain_routine_end": "write on_fit_start",
    "on_init_start": "write setup(self, trainer, module, stage)",
    "on_init_end": "write setup(self, trainer, module, stage)",
    "on_keyboard_interrupt": "write on_exception",
    "on_before_zero_grad": "leave it out, MLX has no gradient buffers",
    "on_before_backward": UPDATE,
    "on_after_backward": UPDATE,
    "optimizer_step": UPDATE,
    "optimizer_zero_grad": "leave it out, MLX has no gradient buffers",
    "backward": UPDATE,
    "configure_gradient_clipping": "write Trainer(gradient_clip_val=..., gradient_clip_algorithm='norm' or 'value')",
    "lr_scheduler_step": SCHEDULE,
    "configure_model": "write setup(self, stage)",
    "configure_sharded_model": "write setup(self, stage), and Trainer(strategy='fsdp')",
    "on_before_batch_transfer": BATCHES,
    "transfer_batch_to_device": BATCHES,
    "on_after_batch_transfer": BATCHES,
    "on_validation_model_eval": "write on_validation_start; the module is in evaluation mode",
    "on_validation_model_train": "write on_validation_end",
}
HOOKS_OF_MODULES = HOOKS | {  # and these, of a module
    name: "write it in a DataModule, for fit(module, datamodule); or fit(module, loader, val_loader)"
    for name in ("train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader", "prepare_data")
}
CALLBACKS = {  # Lightning's, that have another name here
    "RichProgressBar": "write TQDMProgressBar",
    "StochasticWeightAveraging": "write EMAWeightAveraging",
    "WeightAveraging": "write EMAWeightAveraging",
    "BackboneFinetuning": "write FreezeSchedule({0: 'head', 5: ('head', 'backbone')})",
    "BaseFinetuning": "write FreezeSchedule({0: 'head', 5: ('head', 'backbone')})",
    "GradientAccumulation": "write GradientAccumulationScheduler",
    "RichModelSummary": "write ModelSummary",
    "ModelPruning": "leave it out, MLX has no pruning",
    "Callback": "write mlxmm.Callback",
    "BasePredictionWriter": "write a mlxmm.Callback with on_predict_batch_end, which gets the outputs of a batch",
    "SpikeDetection": "write LossSpikeGuard",
    "ProgressBar": "write TQDMProgressBar",
    "Checkpoint": "write ModelCheckpoint",
    "AsyncCheckpoint": "write ModelCheckpoint, which writes in the background",
}
PACKAGE = {  # names that people look for in `mlxmm`, or in `lightning`
    "LightningModule": "write mlxmm.Module",
    "LightningDataModule": "write mlxmm.DataModule",
    "CSVLogger": "write mlxmm.JSONLLogger",
    "Tuner": "write the callbacks LearningRateFinder and BatchSizeFinder",
    "Fabric": "write mlxmm.Trainer, or a loop of your own with mlx.nn.value_and_grad",
    "rank_zero_only": "write `if trainer.is_global_zero:`",
    "rank_zero_info": "write print(...) under `if trainer.is_global_zero:`",
    "rank_zero_warn": "write warnings.warn(...) under `if trainer.is_global_zero:`",
    "LightningCLI": "write a recipe, whose flags are the settings of an attrs class: docs/write-a-recipe.md",
    "CaptionData": "write from mlxmm.data.caption_data import CaptionData",
} | {
    name: f"write from mlxmm.callbacks import {name}"
    for name in ("EarlyStopping", "ModelCheckpoint", "LearningRateMonitor", "ModelSummary", "TQDMProgressBar", "Timer")
}
PRECISIONS = {  # what Lightning calls ours
    "32-true": "32",
    "bf16": "bf16-mixed",
    "16": "bf16-mixed",
    "16-mixed": "bf16-mixed",
    "16-true": "bf16-true",
}
