"""Compiled steps: bounded in number and memory, no wreck after an error, and never stale."""

import gc
import os
import subprocess
import sys
import warnings
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from conftest import DistinctBatches, TinyRegression
from mlx.utils import tree_flatten

from mlxmm import Callback
from mlxmm.compute.compiled import Compiler

ROOT = Path(__file__).parents[2]


def weights(module):
    return {name: np.array(array) for name, array in tree_flatten(module.parameters())}


def assert_same(left, right, atol=0.0):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_allclose(left[name], right[name], rtol=0, atol=atol, err_msg=name)


class Counted(TinyRegression):
    """Counts how often its step runs as Python, which is once a trace; its rate is no schedule."""

    def training_step(self, batch):
        self.traces.append(batch["x"].shape)
        return super().training_step(batch)

    def configure_optimizers(self):
        return optim.SGD(0.05)


def counted():
    module = Counted()
    object.__setattr__(module, "traces", [])
    return module


class Lengths(DistinctBatches):
    """Batches of 1, 2, 3, … rows."""

    def __init__(self, most):
        self.batches = [DistinctBatches(1, size).batches[0] for size in range(1, most + 1)]


def test_sixty_lengths_stay_within_the_bound_with_one_warning_and_the_same_result(make_trainer):
    kept = []

    class Count(Callback):
        def on_train_batch_end(self, trainer, module, metrics, batches):
            kept.append(trainer.num_compiled_variants)

    bounded, plain = counted(), counted()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_trainer(max_epochs=2, max_compiled_variants=5, callbacks=[Count()])
        trainer.fit(bounded, train_dataloaders=Lengths(60))
    told = [str(warning.message) for warning in caught if "batch shapes" in str(warning.message)]
    assert len(told) == 1 and "more than 5 batch shapes" in told[0]
    assert max(kept) == 5 and len(set(bounded.traces)) == 60
    make_trainer(max_epochs=2, compile=False).fit(plain, train_dataloaders=Lengths(60))
    assert_same(weights(bounded), weights(plain), atol=1e-6)


def test_shapes_that_return_are_not_traced_again_within_the_bound(make_trainer):
    module = counted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_trainer(max_epochs=3, max_compiled_variants=5).fit(module, train_dataloaders=Lengths(5))
    assert len(module.traces) == 5


def test_memory_after_the_last_validation_is_that_after_the_first(make_trainer):
    active = []

    class Measure(Callback):
        def on_validation_end(self, trainer, module, metrics):
            gc.collect()
            active.append(mx.get_active_memory())

    module, data = TinyRegression(), DistinctBatches(num_batches=20, batch_size=64)
    module.backbone, module.head = nn.Linear(4, 1_024), nn.Linear(1_024, 1)  # a hundredth of it is some 700 bytes
    trainer = make_trainer(max_steps=200, val_check_interval=20, callbacks=[Measure()])
    trainer.fit(module, train_dataloaders=data, val_dataloaders=DistinctBatches(5, 64))
    assert len(active) == 10 and active[-1] <= 1.01 * active[0], active


def test_an_error_in_the_first_trace_leaves_arrays_that_can_be_used(make_trainer):
    class Fails(TinyRegression):
        def training_step(self, batch):
            outputs = super().training_step(batch)
            if self.fails:
                raise KeyError("in the trace")
            return outputs

    module = Fails()
    before = weights(module)
    module.fails = True
    with pytest.raises(KeyError):
        make_trainer(max_steps=3).fit(module, train_dataloaders=DistinctBatches())
    assert_same(before, weights(module))
    module.fails = False
    make_trainer(max_steps=3).fit(module, train_dataloaders=DistinctBatches())
    alone = TinyRegression()
    make_trainer(max_steps=3).fit(alone, train_dataloaders=DistinctBatches())
    assert_same(weights(module), weights(alone))


def test_an_error_in_a_later_trace_leaves_the_weights_of_the_last_update(make_trainer):
    seen = []

    class Watchdog(Callback):
        def on_train_batch_end(self, trainer, module, metrics, batches):
            seen.append(weights(module))

    data, module = DistinctBatches(3), TinyRegression()
    bad = data.batches[2] | {"x": data.batches[2]["x"][:, :3]}
    with pytest.raises(ValueError, match="shape"):
        make_trainer(max_steps=3, callbacks=[Watchdog()]).fit(module, train_dataloaders=[*data.batches[:2], bad])
    assert_same(seen[-1], weights(module))


def test_without_a_compiler_training_runs_with_one_warning(tmp_path):
    program = """
import warnings
import numpy as np
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from conftest import DistinctBatches, TinyRegression
    from mlxmm import Trainer
    for _ in range(2):
        trainer = Trainer(max_steps=4, logger=False, enable_checkpointing=False, enable_model_summary=False)
        module, data = TinyRegression(), DistinctBatches()
        trainer.fit(module, train_dataloaders=data, val_dataloaders=data)
print(trainer.global_step, trainer.num_compiled_variants, bool(np.isfinite(np.array(module.head.weight)).all()))
print(*[w.message for w in caught if "g++" in str(w.message)], sep="\\n")
"""
    (tmp_path / "empty").mkdir()
    environment = os.environ | {"PATH": str(tmp_path / "empty"), "PYTHONPATH": os.pathsep.join([str(ROOT), "tests"])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    first, *told = done.stdout.splitlines()
    compiles = mx.default_device() != mx.cpu
    assert first == f"4 {2 if compiles else 0} True" and len(told) == 1 and bool(told[0]) is not compiles


def test_dropout_that_a_callback_switches_off_is_off_in_the_compiled_step(make_trainer):
    class Switch(Callback):
        def on_train_batch_start(self, trainer, module, batches):
            module.dropout.train(trainer.global_step not in (3, 4))

    def fit(*callbacks, **settings):
        losses = []

        class Losses(Callback):
            def on_train_batch_end(self, trainer, module, metrics, batches):
                losses.append(metrics["loss"].item())

        data = DistinctBatches(1)
        make_trainer(max_steps=7, callbacks=[*callbacks, Losses()], **settings).fit(
            TinyRegression(dropout=0.5), train_dataloaders=data
        )
        return losses

    compiled, plain, always = fit(Switch()), fit(Switch(), compile=False), fit()
    assert compiled == pytest.approx(plain, abs=1e-6)
    assert compiled[:3] == always[:3] and compiled[3] != pytest.approx(always[3], rel=1e-3)


def test_a_rate_given_as_an_array_acts_and_does_not_trace_again(make_trainer):
    class Rate(Callback):
        def on_train_batch_start(self, trainer, module, batches):
            trainer.optimizer.learning_rate = mx.array(0.01 * (trainer.global_step % 3))

    compiled, plain = counted(), counted()
    make_trainer(max_steps=8, callbacks=[Rate()]).fit(compiled, train_dataloaders=DistinctBatches())
    make_trainer(max_steps=8, callbacks=[Rate()], compile=False).fit(plain, train_dataloaders=DistinctBatches())
    assert len(compiled.traces) == 1
    assert_same(weights(compiled), weights(plain), atol=1e-6)
    fixed = counted()
    make_trainer(max_steps=8).fit(fixed, train_dataloaders=DistinctBatches())
    assert not np.allclose(weights(fixed)["head.weight"], weights(plain)["head.weight"], atol=1e-3)


def test_a_step_that_fails_while_it_is_traced_leaves_a_random_key_that_others_can_draw_from():
    """Without it, the next module's weights were "an array without a primitive", in runs that were not to blame."""

    def step(x):
        mx.random.normal((2,))
        raise ZeroDivisionError

    mx.random.seed(3)
    wanted = mx.random.normal((4,)).tolist()
    mx.random.seed(3)
    compiled = Compiler(enabled=True, most=4)(step, [mx.random.state])
    with pytest.raises(ZeroDivisionError):
        compiled(mx.zeros(2))
    assert mx.random.normal((4,)).tolist() == wanted
