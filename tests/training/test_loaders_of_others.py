"""Loaders that are not mlxmm's: what they draw, how they begin an epoch, what their batches hold."""

import random
import warnings
from collections import UserDict, namedtuple

import mlx.core as mx
import numpy as np
import pytest
from conftest import DistinctBatches, TinyRegression

from callbacks import BatchSizeFinder
from mlxmm import Callback, seed_everything
from mlxmm.errors import UserError
from mlxmm.training import batches
from mlxmm.training.datamodule import DataModule


def batch(i: int, size: int = 2) -> dict:
    rng = np.random.default_rng(i)
    return {"x": rng.normal(size=(size, 4)), "y": np.full(size, float(i)), "mask": np.ones(size)}


class OfGlobals:
    """Shuffles by NumPy's global generator, and augments by Python's."""

    def __len__(self):
        return 10

    def __iter__(self):
        for i in np.random.permutation(10):
            yield batch(int(i)) | {"drawn": [random.random(), np.random.normal()]}


class OfItsOwn(OfGlobals):
    """Shuffles by generators that it holds."""

    def __init__(self):
        self.rng, self.python, self.old = np.random.default_rng(1), random.Random(2), np.random.RandomState(3)

    def __iter__(self):
        for i in self.rng.permutation(10):
            yield batch(int(i)) | {"drawn": [self.python.random(), self.old.rand()]}


class Told(OfGlobals):
    """Its sampler shuffles by the epoch that it is told."""

    class Sampler:
        epoch = 0

        def set_epoch(self, epoch):
            self.epoch = epoch

    def __init__(self):
        self.sampler = self.Sampler()

    def __iter__(self):
        for i in np.random.default_rng(self.sampler.epoch).permutation(10):
            yield batch(int(i)) | {"drawn": [0.0]}


class Numbered(OfGlobals):
    """Has `epoch`, as a generator that draws when it is first asked."""

    def epoch(self, number, start=0):
        for i in np.random.permutation(10)[start:]:
            yield batch(int(i)) | {"drawn": [0.0]}


class MadeAnew(DataModule):
    """Shuffles where the loader is made."""

    def train_dataloader(self):
        return [batch(int(i)) | {"drawn": [0.0]} for i in np.random.permutation(10)]


class See(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, module, batches):
        self.seen += [[batch["y"][0].item(), *batch["drawn"].tolist()] for batch in batches]


class Disturb(Callback):
    """Draws from every global generator beside the loader."""

    def on_train_batch_end(self, trainer, module, metrics, batches):
        seed_everything(7)
        np.random.normal()


@pytest.mark.filterwarnings("ignore:.*cannot start at batch")
@pytest.mark.parametrize("make", [OfGlobals, OfItsOwn, Told, Numbered, MadeAnew])
def test_what_a_loader_draws_is_the_same_after_a_resume_whatever_draws_beside_it(make_trainer, tmp_path, make):
    def run(max_steps, ckpt_path=None, val=None, callbacks=()):
        see = See()
        np.random.seed(max_steps)
        trainer = make_trainer(max_steps=max_steps, callbacks=[see, *callbacks], compile=False, val_check_interval=3)
        trainer.fit(TinyRegression(), make(), val_dataloaders=val, ckpt_path=ckpt_path) if val else trainer.fit(
            TinyRegression(), make(), ckpt_path=ckpt_path
        )
        return trainer, see.seen

    _, whole = run(20)
    trainer, first = run(14)
    trainer.save_checkpoint(tmp_path / "c")
    _, rest = run(20, tmp_path / "c")
    assert first + rest == whole
    numbers = [row[0] for row in whole]
    assert sorted(numbers[:10]) == sorted(numbers[10:]) == list(range(10)) and numbers[:10] != numbers[10:]
    if make is OfGlobals:
        assert run(20, val=OfGlobals(), callbacks=[Disturb()])[1] == whole


class InPlace(OfGlobals):
    """Shuffles what it holds, at the beginning of an epoch or at its end, which a loader without length comes to."""

    __len__ = None

    def __init__(self, items, at_end=False, copies=False):
        self.items, self.at_end, self.copies = items, at_end, copies

    def __iter__(self):
        items = self.items = self.items.copy() if self.copies else self.items
        random.shuffle(items) if not self.at_end else None
        yield from (batch(int(i)) for i in items)
        random.shuffle(items) if self.at_end else None


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("items", [list(range(10)), np.arange(10)], ids=["list", "array"])
def test_a_loader_that_shuffles_in_place_is_told_that_a_resume_has_another_order(items, at_end):
    with pytest.warns(UserWarning, match="InPlace.items is changed in place while it is read: a resumed run begins"):
        assert len(list(batches.epoch(InPlace(items.copy(), at_end), 0))) == 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what is made anew in each epoch is a function of it
        assert len(list(batches.epoch(InPlace(items.copy(), at_end, copies=True), 0))) == 10
        for make in (OfGlobals, OfItsOwn, Told):
            assert len(list(batches.epoch(make(), 0))) == 10


class Fills(OfGlobals):
    """Keeps each batch that it has made, counts them, and knows a large array of tokens that it sorts."""

    def __init__(self):
        self.cache, self.seen, self.counts = [None] * 10, [], np.zeros(10)
        self.tokens = np.arange(1_000_001)[::-1].copy()

    def __iter__(self):
        self.tokens.sort()
        for i in range(10):
            self.cache[i] = self.cache[i] or batch(i)
            self.seen.append(i)
            self.counts[i] += 1
            yield self.cache[i]


def test_a_cache_that_is_filled_is_no_other_order_and_a_large_array_is_not_looked_at():
    loader = Fills()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in (0, 1):
            assert len(list(batches.epoch(loader, number))) == 10


def test_the_seed_decides_what_a_loader_draws(make_trainer):
    def order(seed):
        return [b["y"][0].item() for b in batches.epoch(OfGlobals(), 0, seed=seed)]

    assert order(1) == order(1) != order(2)


def test_reading_a_batch_leaves_the_random_states_alone():
    seed_everything(5)
    expected = mx.random.uniform().item(), np.random.rand(), random.random()
    seed_everything(5)
    assert len(list(batches.epoch(OfGlobals(), 0))) == 10
    assert (mx.random.uniform().item(), np.random.rand(), random.random()) == expected


class WithoutLength(OfGlobals):
    epoch = 0  # as of Hugging Face's IterableDataset

    def __len__(self):
        raise NotImplementedError


def test_an_epoch_that_is_a_number_and_a_length_that_raises_are_no_obstacle(make_trainer):
    trainer = make_trainer(max_epochs=2, compile=False)
    trainer.fit(TinyRegression(), train_dataloaders=WithoutLength(), val_dataloaders=WithoutLength())
    assert trainer.global_step == 20


Pair = namedtuple("Pair", "x y")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (UserDict(a=np.ones(2)), {"a": [1, 1]}),
        ({"a": [1, 2], "b": [[0.5], [1.5]]}, {"a": [1, 2], "b": [[0.5], [1.5]]}),
        (Pair(np.zeros(1), [True, False]), Pair([0], [True, False])),
        ([{"a": 1}, (2, 3.0)], [{"a": 1}, (2, 3)]),
    ],
    ids=["mapping", "lists", "namedtuple", "numbers"],
)
def test_batches_of_any_mapping_and_of_lists_of_numbers(value, expected):
    def plain(tree):
        if isinstance(tree, mx.array):
            return tree.tolist()
        if isinstance(tree, dict):
            return {key: plain(part) for key, part in tree.items()}
        parts = [plain(part) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)

    assert plain(batches.as_arrays(value)) == expected


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"a": {"b": None}}, "a.b holds None"),
        ({"caption": ["a", "b"]}, "caption.0 holds a str"),
        ({"caption": np.array(["a"])}, "caption holds an array of <U1"),
        ({"x": np.array([None])}, "x holds an array of object"),
        (UserDict(ids=[[1, 2], [3]]), "ids holds lists of different lengths"),
    ],
    ids=["None", "text", "texts", "objects", "ragged"],
)
def test_a_field_that_cannot_be_an_array_is_named(value, told):
    with pytest.raises(UserError, match=f"a batch is a tree of arrays and numbers; {told}"):
        batches.as_arrays(value)


def test_a_batch_without_examples_is_refused_and_one_with_an_empty_part_is_not():
    with pytest.raises(UserError, match="a batch has no examples"):
        batches.as_arrays({"x": np.zeros((0, 4)), "y": [np.zeros(0)], "scale": 1.0})
    batches.as_arrays({"x": np.zeros((2, 4)), "boxes": np.zeros((0, 4))})
    batches.as_arrays({"scale": 1.0})


class Several(DataModule):
    def __init__(self, **loaders):
        self.loaders = loaders

    def train_dataloader(self):
        return self.loaders.get("train", DistinctBatches(2))

    def val_dataloader(self):
        return self.loaders.get("val")


@pytest.mark.parametrize("stage", ["train", "val"])
@pytest.mark.parametrize(
    ("loader", "what"),
    [
        ({"a": [], "b": []}, "a dict"),
        ([OfGlobals(), OfGlobals()], "a list of loaders"),
        ([iter([])], "a list of loaders"),
    ],
    ids=["dict", "list", "iterators"],
)
def test_several_loaders_for_a_stage_are_refused_by_its_name(make_trainer, stage, loader, what):
    for give in ({"datamodule": Several(**{stage: loader})}, {"train_dataloaders": DistinctBatches(2)}):
        given = give if "datamodule" in give else give | {f"{stage}_dataloaders": loader}
        with pytest.raises(UserError, match=f"the {stage} data are {what}: a stage has one"):
            make_trainer(max_steps=1, compile=False).fit(TinyRegression(), **given)


class FixedSize(OfGlobals):
    """Its batch size is set once, as of torch's DataLoader."""

    @property
    def batch_size(self):
        return 2


def test_a_batch_size_that_cannot_be_set_is_refused_in_words(make_trainer):
    finder = BatchSizeFinder(memory_limit=2**30, attribute="train.batch_size")
    with pytest.raises(UserError, match="FixedSize cannot take another batch_size: give a DataModule"):
        make_trainer(max_steps=1, callbacks=[finder], compile=False).fit(
            TinyRegression(), train_dataloaders=FixedSize()
        )


def test_torchs_loader_gives_the_same_order_after_a_resume(make_trainer, tmp_path):
    torch = pytest.importorskip("torch")

    class Rows(torch.utils.data.Dataset):
        __len__ = lambda self: 20
        __getitem__ = lambda self, i: {"x": torch.rand(4), "y": torch.tensor(float(i)), "mask": 1.0}

    def run(max_steps, ckpt_path=None):
        seen = []

        class See(Callback):
            def on_train_batch_start(self, trainer, module, batches):
                seen.append([batches[0]["y"].tolist(), batches[0]["x"].tolist()])

        loader = torch.utils.data.DataLoader(Rows(), 2, shuffle=True, generator=torch.Generator())
        torch.manual_seed(max_steps)
        trainer = make_trainer(max_steps=max_steps, callbacks=[See()], compile=False)
        trainer.fit(TinyRegression(), train_dataloaders=loader, ckpt_path=ckpt_path)
        return trainer, seen

    trainer, first = run(14)
    trainer.save_checkpoint(tmp_path / "c")
    with pytest.warns(UserWarning, match="DataLoader cannot start at batch 4"):
        assert first + run(20, tmp_path / "c")[1] == run(20)[1]
