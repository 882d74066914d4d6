"""Training on two real processes of this machine: the numbers of one, and a good end whatever dies."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import DistinctBatches, TinyRegression
from mlx.utils import tree_flatten
from PIL import Image

from callbacks import EarlyStopping, ModelCheckpoint
from mlxmm import Callback, Trainer
from mlxmm.compute import linux_blas
from mlxmm.data.loader import Loader
from mlxmm.distributed import collectives
from mlxmm.errors import UserError

ROOT = Path(__file__).parents[2]
IMPORTS = f"{ROOT}:{ROOT}/tests:{ROOT}/tests/distributed"

# ---- what the processes run: `python tests/test_distributed.py NAME FOLDER`


class Shards(DistinctBatches):
    """Of each batch of 8 rows, every rank's share; weights differ between them."""

    def __init__(self, **sizes):
        super().__init__(batch_size=8, **sizes)
        share = slice(collectives.rank(), None, collectives.world_size())
        self.batches = [{name: array[share] for name, array in batch.items()} for batch in self.batches]


def trainer(folder, **settings):
    defaults = {"default_root_dir": folder, "logger": False, "max_steps": 6, "enable_model_summary": False}
    defaults["enable_checkpointing"] = any(
        isinstance(callback, ModelCheckpoint) for callback in settings.get("callbacks", ())
    )
    return Trainer(**(defaults | settings))


def save(module, folder, name):
    mx.save_safetensors(
        str(folder / f"{name}{collectives.rank()}.safetensors"), dict(tree_flatten(module.parameters()))
    )


def started_apart() -> TinyRegression:
    """Its first weights are each process's own."""
    module = TinyRegression(dropout=0.0)
    module.head.weight = module.head.weight + collectives.rank()
    return module


def equal(folder):
    for name, settings in {"plain": {}, "accumulated": {"accumulate_grad_batches": 4, "max_steps": 3}}.items():
        module = started_apart()
        trainer(folder, **settings).fit(module, train_dataloaders=Shards())
        save(module, folder, name)
    shorter = Shards(num_batches=6 - collectives.rank())
    run = trainer(folder, max_steps=-1, max_epochs=3)
    run.fit(module := started_apart(), train_dataloaders=shorter)
    save(module, folder, f"shorter-{run.global_step}-of-{run.estimated_stepping_batches}-")


def resume(folder):
    def fit(max_steps, ckpt_path=None):
        checkpoint = ModelCheckpoint(every_n_train_steps=4)
        run = trainer(folder, max_steps=max_steps, callbacks=[checkpoint])
        run.fit(module := started_apart(), train_dataloaders=Shards(), ckpt_path=ckpt_path)
        return module

    fit(4)
    save(fit(6, "last"), folder, "plain")


def go_on(folder):
    trainer(folder, callbacks=[ModelCheckpoint()]).fit(TinyRegression(), train_dataloaders=Shards(), ckpt_path="last")


def validate(folder):
    """Three rows: rank 0 has a batch of two and a single one, or nothing; rank 1 the rest."""
    rows = DistinctBatches(num_batches=1, batch_size=3).batches[0]
    told = {}
    for name, shares in {"unequal": ([[0], [1]], [[2]]), "empty": ([], [[0, 1], [2]]), "none": ([], [])}.items():
        share = shares[collectives.rank()]
        batches = [{key: array[rows_of] for key, array in rows.items()} for rows_of in share]
        told[name] = trainer(folder).validate(TinyRegression(), dataloaders=batches)
    run = trainer(folder, callbacks=[EarlyStopping("val/loss")], val_check_interval=3)
    run.fit(TinyRegression(), Shards(), [rows] if collectives.rank() == 0 else [])
    told["steps"] = run.global_step
    (folder / f"told{collectives.rank()}.json").write_text(json.dumps(told))


def load(folder):
    """What each process's loader gives, with draws: as JSON, batches of epoch 2 and the number that `len` tells."""
    told = {}
    for name, drop_last in {"whole": True, "all": False}.items():
        loader = Loader(
            rows=range(15),
            transform=lambda row, rng: {"row": np.array([row, rng.integers(1_000)])},
            batch_size=4 // collectives.world_size(),
            shuffle=True,
            drop_last=drop_last,
        )
        told[name] = [len(loader), [batch["row"].tolist() for batch in loader.epoch(2)]]
    (folder / f"loaded{collectives.rank()}.json").write_text(json.dumps(told))


class At(Callback):
    """Does something at an update, on one rank alone."""

    def __init__(self, step, what, who=1):
        self.step, self.what, self.who = step, what, who

    def on_train_batch_end(self, trainer, module, metrics, batches):
        if trainer.global_step == self.step and collectives.rank() == self.who:
            self.what()


def disturbed(folder, what, who=1):
    checkpoint = ModelCheckpoint(every_n_train_steps=2)
    trainer(folder, max_steps=200, callbacks=[At(5, what, who), checkpoint]).fit(
        TinyRegression(), train_dataloaders=Shards()
    )
    (folder / "ended-well").touch()


def killed(folder):
    disturbed(folder, lambda: os.kill(os.getpid(), signal.SIGKILL))


def raising(folder):
    disturbed(folder, lambda: 1 / 0)


def leaving(folder):
    disturbed(folder, lambda: sys.exit(0))


def hanging(folder):
    disturbed(folder, lambda: time.sleep(60))


def frozen(folder, who=1):
    disturbed(folder, lambda: os.kill(os.getpid(), signal.SIGSTOP), who)


def frozen_0(folder):
    frozen(folder, 0)


def frozen_1(folder):
    frozen(folder, 1)


def signalled(folder):
    disturbed(folder, lambda: os.kill(os.getpid(), signal.SIGTERM))


def late(folder):
    """Rank 1's batches come late. It prints when, and rank 0 when it computes its steps."""
    times = []

    class Late(Callback):
        def on_train_batch_start(self, trainer, module, batches):
            if collectives.rank() == 1:
                time.sleep(0.3)
                times.append(time.monotonic())

    class Timed(TinyRegression):
        def training_step(self, batch):
            if collectives.rank() == 0:
                times.append(time.monotonic())
            return super().training_step(batch)

    trainer(folder, max_steps=3, compile=False, callbacks=[Late()]).fit(Timed(), train_dataloaders=Shards())
    print(json.dumps(times))


def out_of_time(folder):
    """One process's clock is over; the other's is not."""
    run = trainer(folder, max_steps=10_000_000, max_time="00:01" if collectives.rank() else "10:00")
    run.fit(TinyRegression(), train_dataloaders=Shards())
    print(run.global_step)


def cores(folder):
    print(collectives.world_size(), linux_blas.num_threads())


def first(folder):
    """Rank 0 takes a while to make a file that the other one wants."""
    time.sleep(0.5 * (collectives.rank() == 0))
    made = collectives.rank_zero_first(lambda: (folder / "made").exists() or (folder / "made").write_text(""))
    print(made)


def opening(folder):
    """A source of which one image of two hundred cannot be decoded: what each rank decodes and keeps."""
    from mlxmm.data.caption_source import CaptionDataConfig, open_source
    from mlxmm.data.sources import rows

    decoded, decode = [], rows.decode_image
    rows.decode_image = lambda value: decoded.append(value) or decode(value)
    part = open_source(CaptionDataConfig(source=str(folder / "rows.parquet"), split_column="split"), 0).rows["train"]
    print(json.dumps([len(decoded), len(part), collectives.cores_per_process()]))


# ---- the tests

divides_cores = pytest.mark.skipif(
    linux_blas.num_threads() is None, reason=f"ranks divide the threads of OpenBLAS, which is {linux_blas.status()}"
)


@contextlib.contextmanager
def two_processes(*command, only=(0, 1), timeout=10.0, **environment):
    """Start `command` as each rank of `only`; those still there at the end are killed."""
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        hosts = [[f"127.0.0.1:{server.getsockname()[1]}"] for server in taken]
    hostfile = Path(os.environ["HOSTFILES"]) / f"{time.monotonic_ns()}.json"
    hostfile.write_text(json.dumps(hosts))
    shared = {
        "MLX_HOSTFILE": str(hostfile),
        "PYTHONPATH": IMPORTS,
        "MLXMM_RANK_TIMEOUT": str(timeout),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=os.environ | shared | environment | {"MLX_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in only
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def run_workers(*command, only=(0, 1), **settings):
    """(exit code, stdout, stderr) of each rank that runs `command`, and the seconds it took."""
    start = time.monotonic()
    with two_processes(*command, only=only, **settings) as processes:
        ended = [(*process.communicate(timeout=40), process.returncode) for process in processes]
    return [(code, out, err) for out, err, code in ended], time.monotonic() - start


def run(name, folder, **settings):
    return run_workers(__file__, name, folder, **settings)


@pytest.fixture(autouse=True)
def hostfiles(tmp_path, monkeypatch):
    monkeypatch.setenv("HOSTFILES", str(tmp_path))


def own_lines(err: str) -> list[str]:
    others = ("[ring]", "fit: ")  # MLX's own remarks, and progress
    lines = [line for line in err.splitlines() if not line.startswith(others)]
    is_warning = lambda line: "UserWarning: the learning rate is 0" in line or line.startswith("  ")
    return [line for line in lines if not is_warning(line)]  # the schedule of the test's module ends early


def assert_close(left, right, atol):
    left, right = (mx.load(str(path)) for path in (left, right))
    assert left.keys() == right.keys() and left
    for name in left:
        np.testing.assert_allclose(np.array(left[name]), np.array(right[name]), rtol=0, atol=atol, err_msg=name)


def test_two_processes_make_the_updates_of_one_with_the_same_global_batch(tmp_path):
    ended, _ = run("equal", tmp_path)
    assert [code for code, _, _ in ended] == [0, 0], ended
    (tmp_path / "one").mkdir()
    equal(tmp_path / "one")
    for name in ("plain", "accumulated"):
        assert_close(tmp_path / f"{name}0.safetensors", tmp_path / f"{name}1.safetensors", atol=0)
        assert_close(tmp_path / f"{name}0.safetensors", tmp_path / f"one/{name}0.safetensors", atol=1e-6)
    # 5 batches an epoch, the shorter shard's number, on both.
    assert_close(tmp_path / "shorter-15-of-15-0.safetensors", tmp_path / "shorter-15-of-15-1.safetensors", atol=0)


def test_all_processes_resume_what_rank_0_saved(tmp_path):
    ended, _ = run("resume", tmp_path)
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert_close(tmp_path / "plain0.safetensors", tmp_path / "plain1.safetensors", atol=0)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["last", "step=4", "step=6"]


def test_another_number_of_processes_does_not_resume_a_run(tmp_path):
    trainer(tmp_path, max_steps=2, callbacks=[ModelCheckpoint(every_n_train_steps=2)]).fit(
        TinyRegression(), train_dataloaders=Shards()
    )
    ended, _ = run("go_on", tmp_path)
    assert [code for code, _, _ in ended] == [1, 1], ended
    assert "step=2 is of a run of 1 process, and now there are 2" in ended[0][2], ended
    names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert sorted(names) == ["last", "step=2"]


def test_validation_on_unequal_shards_gives_the_means_of_one_process(tmp_path):
    ended, _ = run("validate", tmp_path)
    assert [code for code, _, _ in ended] == [0, 0], ended
    told = [json.loads((tmp_path / f"told{rank}.json").read_text()) for rank in (0, 1)]
    rows = DistinctBatches(num_batches=1, batch_size=3).batches[0]
    one = trainer(tmp_path).validate(TinyRegression(), dataloaders=[rows])
    assert told[0] == told[1] and told[0]["none"] == {} and told[0]["steps"] == 6
    for name in ("unequal", "empty"):
        assert told[0][name] == pytest.approx(one, rel=1e-6)


def test_the_shares_of_two_processes_are_the_batches_of_one(tmp_path):
    assert [code for code, _, _ in run("load", tmp_path)[0]] == [0, 0]
    zero, one = (json.loads((tmp_path / f"loaded{rank}.json").read_text()) for rank in (0, 1))
    (tmp_path / "one").mkdir()
    load(tmp_path / "one")
    whole = json.loads((tmp_path / "one/loaded0.json").read_text())
    assert zero["whole"][0] == one["whole"][0] == 3  # batches of 2: seven rows each, of 15
    for left, right, both in zip(zero["whole"][1], one["whole"][1], whole["whole"][1], strict=True):
        assert sorted(left + right) == sorted(both)
    rows = [row for part in (zero, one) for batch in part["all"][1] for row in batch]
    assert sorted(rows) == sorted(row for batch in whole["all"][1] for row in batch) and len(rows) == 15
    assert all(part["all"][0] == len(part["all"][1]) for part in (zero, one))


@pytest.mark.slow
def test_each_rank_decodes_its_share_once_and_all_keep_the_same_rows(tmp_path):
    import datasets

    files = [io.BytesIO() for _ in range(200)]
    for i, file in enumerate(files):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(file, "PNG")
    cells = [{"bytes": file.getvalue() if i != 7 else b"none", "path": None} for i, file in enumerate(files)]
    columns = {"image": cells, "caption": ["a"] * 200, "split": ["train"] * 198 + ["val", "test"]}
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image(decode=False))
    table.to_parquet(str(tmp_path / "rows.parquet"))
    share = max(1, (os.cpu_count() or 1) // 2)
    for decoded in ([101, 99], [0, 0]):  # of 198, 1 and 1: rank 0 has the single ones
        (zero, one), _ = run("opening", tmp_path, timeout=30.0, MLXMM_CACHE=str(tmp_path / "cache"))
        assert (zero[0], one[0]) == (0, 0), (zero, one)
        skipped, *told = zero[1].splitlines()
        assert [json.loads(line) for line in (*told, one[1])] == [[num, 197, share] for num in decoded], (zero, one)
        assert "row 7" in skipped


def test_the_others_find_what_rank_0_has_made(tmp_path):
    (zero, one), _ = run("first", tmp_path)
    assert (zero[1], one[1]) == ("0\n", "True\n"), (zero, one)


@pytest.mark.parametrize(
    ("how", "told", "codes"),
    [
        ("killed", "error: rank 1 died", (1, -signal.SIGKILL)),
        ("raising", "error: rank 1 failed: ZeroDivisionError", (1, 1)),
        ("leaving", "error: rank 1 ended before the others", (1, 0)),
        ("hanging", "error: rank 1 hangs: rank 0 waited 4 s", (1, 1)),
    ],
)
def test_a_rank_that_is_lost_ends_the_other_with_its_name_and_a_whole_checkpoint(tmp_path, how, told, codes):
    ended, seconds = run(how, tmp_path, timeout=4.0 if how == "hanging" else 10.0)
    assert tuple(code for code, _, _ in ended) == codes, ended
    [line] = own_lines(ended[0][2])
    assert line.startswith(told)
    assert seconds < 30 and not (tmp_path / "ended-well").exists()
    from mlxmm.storage import checkpoint

    assert checkpoint.read_state(tmp_path / "checkpoints/last")["global_step"] == 4


def test_a_rank_that_is_frozen_is_named(tmp_path):
    with two_processes(__file__, "frozen", tmp_path, timeout=4.0) as (zero, one):  # a busy machine is slow, not frozen
        _, err = zero.communicate(timeout=30)
        assert zero.returncode == 1 and re.search("^error: rank 1 (hangs|has been silent)", err, re.MULTILINE)
        assert one.wait(timeout=5) == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_is_frozen_does_not_keep_the_launcher_alive(tmp_path, who):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    launch = "from mlx._distributed_utils.launch import main; main()"
    options = f"-n 2 --backend ring -p {port} -- {sys.executable} {__file__} frozen_{who} {tmp_path}".split()
    environment = os.environ | {"PYTHONPATH": IMPORTS, "MLXMM_RANK_TIMEOUT": "3"}
    ended = subprocess.run(
        [sys.executable, "-c", launch, *options], env=environment, cwd=ROOT, timeout=40, capture_output=True, text=True
    )
    assert re.search(f"error: rank {who} (hangs|has been silent)", ended.stderr), ended


@pytest.mark.parametrize(("present", "missing"), [(0, 1), (1, 0)])
def test_a_rank_that_never_comes_is_named(tmp_path, present, missing):
    [(code, _, err)], seconds = run("killed", tmp_path, only=[present], timeout=1.0)
    assert code != 0 and f"rank {missing} did not come within 1 s" in err and seconds < 10


def test_a_signal_to_one_rank_ends_all_at_the_same_update_with_a_checkpoint(tmp_path):
    ended, _ = run("signalled", tmp_path)
    assert [code for code, _, _ in ended] == [128 + signal.SIGTERM] * 2, ended
    assert json.loads((tmp_path / "checkpoints/last/state.json").read_text())["global_step"] == 5


def test_an_update_begins_once_all_processes_have_their_batches(tmp_path):
    """Or a GPU would wait for them inside the update."""
    ended, _ = run("late", tmp_path)
    began, came = (json.loads(out) for _, out, _ in ended)
    assert len(began) == len(came) == 3 and all(a > b for a, b in zip(began, came)), ended


def test_the_clock_of_one_process_ends_all_at_the_same_update(tmp_path):
    (zero, one), _ = run("out_of_time", tmp_path)
    [told, updates] = zero[1].splitlines()
    assert zero[0] == one[0] == 0 and updates == one[1].strip() and int(updates) > 0
    assert told == f"training ended after {int(updates):,} updates of 6,000: max_time=10:00 is over"


@divides_cores
def test_cores_are_divided_among_the_ranks_of_a_machine(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    ended, _ = run("cores", tmp_path)
    assert [out.strip() for _, out, _ in ended] == [f"2 {max(1, os.cpu_count() // 2)}"] * 2, ended


@divides_cores
@pytest.mark.skipif(not shutil.which("mpirun"), reason="needs Open MPI")
def test_mpirun_starts_ranks_that_divide_the_cores(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}  # as in a container
    command = ["mpirun", "--oversubscribe", "-n", "2", sys.executable, __file__, "cores", str(tmp_path)]
    environment = os.environ | as_root | {"MLX_MPI_LIBNAME": "libmpi.so.40", "PYTHONPATH": IMPORTS}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert sorted(ended.stdout.split("\n")) == ["", *[f"2 {max(1, os.cpu_count() // 2)}"] * 2], ended


def test_fsdp_is_refused_with_the_reason(tmp_path):
    with pytest.raises(UserError, match="fsdp .* there is only one"):
        Trainer(strategy="fsdp")
    ended, _ = run("sharded", tmp_path)
    assert all("fsdp needs sum_scatter, which this backend lacks" in err for _, _, err in ended), ended


def sharded(folder):
    trainer(folder, strategy="fsdp")


RECIPE = """--data.batch-size 8 --data.shapes.num-train 37 --data.shapes.num-val 17 --data.shapes.num-test 8
    --trainer.max-steps 5 --trainer.log-every-n-steps 1 --trainer.val-check-interval 2
    --trainer.no-compile""".split()


@pytest.mark.slow
def test_a_recipe_on_two_processes_leaves_one_run(tmp_path):
    command = ["-m", "recipes.train_clip", *RECIPE, "--run-dir", tmp_path / "run"]
    with two_processes(*command, timeout=30.0, MLXMM_CACHE=str(tmp_path)) as processes:
        outs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outs
    assert "model:" in outs[0][0] and outs[1][0] == ""
    names = sorted(path.name for path in (tmp_path / "run").iterdir() if "tfevents" not in path.name)
    assert names == ["checkpoints", "config.json", "data.json", "metrics.jsonl", "model", "summary.json"]
    assert len(list((tmp_path / "run").glob("*tfevents*"))) == 2  # of training, and of the test after it
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4, 5]
    with two_processes(*command, timeout=30.0) as processes:
        errors = [process.communicate(timeout=60)[1] for process in processes]
    assert "exists" in errors[0] and "rank 0 failed: UserError" in errors[1]
    assert [len(own_lines(error)) for error in errors] == [1, 1] and all(p.returncode for p in processes)


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
