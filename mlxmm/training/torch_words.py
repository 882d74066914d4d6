"""torch's names that MLX does not have, with what to write instead: notes on the errors that MLX raises."""

MEAN = "with reduction='mean'; by default it returns a loss for each example"
SCHEDULES = "a schedule is the optimizer's learning_rate, a function of the update: "
SCHEDULES += "optim.AdamW(optim.cosine_decay(1e-3, self.trainer.estimated_stepping_batches))"
PLATEAU = "ReduceLROnPlateau is a callback: trainer.optimizer.learning_rate = rate, in on_validation_end"
NORM = "write nn.BatchNorm(size), for pictures too: channels are last"
MEAN_OF_PICTURE = "write x.mean(axis=(1, 2)), of pictures (N, H, W, C)"
LAYERS = {
    "Flatten": "write mx.flatten(x, 1) where the layers are called",
    "Unflatten": "write mx.unflatten(x, axis, shape) where the layers are called",
    "CrossEntropyLoss": f"write nn.losses.cross_entropy(logits, labels, ...) {MEAN}",
    "NLLLoss": f"write nn.losses.nll_loss(log_probabilities, labels, ...) {MEAN}",
    "MSELoss": "write nn.losses.mse_loss(predictions, targets)",
    "L1Loss": "write nn.losses.l1_loss(predictions, targets)",
    "SmoothL1Loss": "write nn.losses.smooth_l1_loss(predictions, targets)",
    "HuberLoss": f"write nn.losses.huber_loss(predictions, targets, ...) {MEAN}",
    "KLDivLoss": f"write nn.losses.kl_div_loss(log_predictions, log_targets, ...) {MEAN}",
    "BCELoss": "write nn.losses.binary_cross_entropy(probabilities, targets, with_logits=False)",
    "BCEWithLogitsLoss": "write nn.losses.binary_cross_entropy(logits, targets)",
    "functional": "functions are nn.relu(x), mx.softmax(x, axis=-1), nn.losses.cross_entropy(logits, labels)",
    "Parameter": "write the array itself, self.scale = mx.ones(size): arrays are parameters",
    "ModuleList": "write a list of layers",
    "ModuleDict": "write a dict of layers",
    "BatchNorm1d": NORM,
    "BatchNorm2d": NORM,
    "AdaptiveAvgPool2d": MEAN_OF_PICTURE,
    "AdaptiveMaxPool2d": "write x.max(axis=(1, 2)), of pictures (N, H, W, C)",
    "DataParallel": "leave it out, mlx.launch -n 4 -- python script.py starts four processes",
}
FUNCTIONS = {
    "cat": "write mx.concatenate",
    "tensor": "write mx.array",
    "as_tensor": "write mx.array",
    "from_numpy": "write mx.array",
    "Tensor": "write mx.array",
    "rand": "write mx.random.uniform(shape=shape)",
    "randn": "write mx.random.normal(shape)",
    "randint": "write mx.random.randint(low, high, shape)",
    "randperm": "write mx.random.permutation(count)",
    "clamp": "write mx.clip",
    "unsqueeze": "write mx.expand_dims",
    "bmm": "write mx.matmul",
    "long": "write mx.int32",
    "no_grad": "leave it out, only what the Trainer differentiates has gradients",
    "inference_mode": "leave it out, only what the Trainer differentiates has gradients",
    "manual_seed": "write mlxmm.seed_everything(seed)",
}
PACKAGES = {
    "mlx.nn": LAYERS,
    "mlx.core": FUNCTIONS,
    "mlx.optimizers": {"lr_scheduler": f"{SCHEDULES}; {PLATEAU}"},
}
