"""Whatever a file or a line holds, our parsers give a value or one line: examples are drawn by hypothesis.

FUZZ_SECONDS=600 python -m pytest -m slow -s tests/test_fuzz_parsers.py        other examples each time, for so long
"""

import contextlib
import json
import os
import tempfile
import time
from pathlib import Path

import pytest

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from mlxmm.captioners.journal import identity_of  # noqa: E402
from mlxmm.config import from_json, to_json  # noqa: E402
from mlxmm.distributed.messages import BadMessage, parse  # noqa: E402
from mlxmm.errors import UserError  # noqa: E402
from mlxmm.storage import checkpoint, hub, pretrained  # noqa: E402
from mlxmm.storage.checksums import checksum_of_values  # noqa: E402
from mlxmm.storage.dataset_push import merge_cards  # noqa: E402
from mlxmm.storage.lineage import Lineage  # noqa: E402
from mlxmm.training.loggers import JSONLLogger  # noqa: E402
from recipes import align_qwen3  # noqa: E402

CARD = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: default/train-*.parquet
---
# Captions

## Configuration `default`
"""
REPORT = {"count": 3, "waits": True}
STATE = {"format": checkpoint.FORMAT, "global_step": 3, "files": {}, "datamodule": {"lineage": [{"fingerprint": "a"}]}}
LINES = b"".join(b'{"step": %d, "epoch": 0, "train/loss": 1.5, "time": 1.0}\n' % step for step in range(1, 6))
HELLO = {"rank": 1, "pid": 7, "flags": "0" * 64, "challenge": "0" * 32, "proof": "0" * 64}

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4)
)
depths = st.integers(1, 20_000)
deep = st.builds(
    lambda depth, pair: (pair[0] * depth + "1" + pair[1] * depth).encode(),
    depths,
    st.sampled_from([("[", "]"), ('{"a":', "}")]),
)


def damaged(whole: bytes):
    """Pieces of `whole` with something else between them."""
    places = st.integers(0, len(whole))
    return st.builds(lambda a, middle, b: whole[:a] + middle + whole[b:], places, st.binary(max_size=12), places)


def changes(whole: dict):
    """`whole` with some values replaced by others."""
    return st.dictionaries(st.sampled_from(list(whole)), values, max_size=3).map(lambda new: whole | new)


def changed(whole: dict):
    return changes(whole).map(lambda values: json.dumps(values).encode())


def files(*wholes: dict):
    """What may be in a file that should hold one of these objects."""
    texts = [json.dumps(whole).encode() for whole in wholes]
    return st.one_of(
        st.binary(max_size=300),
        deep,
        values.map(lambda value: json.dumps(value).encode()),
        *map(damaged, texts),
        *map(changed, wholes),
    )


@contextlib.contextmanager
def one_line():
    """A `UserError` or `BadMessage` of one line may come, and nothing else."""
    try:
        yield
    except (UserError, BadMessage) as error:
        assert str(error) and "\n" not in str(error), repr(str(error))


def reports(data: bytes, folder: Path) -> None:
    with one_line():
        message = parse(data)
        assert all(type(message.get(name, value)) is type(value) for name, value in (REPORT | HELLO).items())


def configs(data: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(data)
    with one_line():
        from_json(align_qwen3.Config, pretrained.read_config(folder))


def states(data: bytes, folder: Path) -> None:
    (folder / "state.json").write_bytes(data)
    with one_line():
        assert {"format", "files", "global_step"} <= checkpoint.read_state(folder).keys()
    with one_line():
        Lineage.read(folder)
    assert isinstance(checkpoint.step_of(folder), int)


def signed(whole: dict) -> bytes:
    """A state.json with the checksum that its values have."""
    whole = json.loads(json.dumps(whole))
    return json.dumps(whole | {"checksum": checksum_of_values(whole)}).encode()


def metrics(data: bytes, folder: Path) -> None:
    """A run that goes on from step 3 writes whole lines behind those of before that were whole."""
    logger = JSONLLogger(folder)
    logger.path.write_bytes(data)
    logger.rewind(None, 3)
    kept = logger.path.read_bytes()
    assert data.startswith(kept) and kept[-1:] in (b"", b"\n")
    logger.log_metrics({"train/loss": 0.5}, 4, 0)
    assert json.loads(logger.path.read_bytes().removeprefix(kept))["step"] == 4


def cards(data: bytes, folder: Path) -> None:
    (folder / "README.md").write_bytes(data)
    with one_line():
        hub.card_configs(folder)
    with one_line():
        merge_cards(data.decode(errors="replace"), CARD)


def journals(data: bytes, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as own, one_line():
        (Path(own) / "journal").write_bytes(data)
        identity_of(Path(own) / "journal")


SQLITE = b"SQLite format 3\0" + bytes([16, 0, 2, 2, 0, 64, 32, 32]) + bytes(76)
PARSERS = {
    "reports": (reports, files(REPORT, HELLO)),
    "states": (states, st.one_of(files(STATE), changes(STATE).map(signed))),
    "metrics": (metrics, st.one_of(damaged(LINES), files(json.loads(LINES.split(b"\n")[0])))),
    "configs": (configs, files(to_json(align_qwen3.Config()))),
    "cards": (
        cards,
        st.one_of(
            damaged(CARD.encode()),
            st.binary(max_size=200),
            values.map(lambda v: f"---\n{json.dumps({'configs': v})}\n---\n".encode()),
        ),
    ),
    "journals": (journals, st.one_of(damaged(SQLITE), st.binary(max_size=300))),
}


SECONDS = float(os.environ.get("FUZZ_SECONDS", 0))  # of each parser; 0: a fixed number of examples, the same each time


def fuzz(name: str, folder: Path, max_examples: int) -> None:
    check, examples = PARSERS[name]

    @settings(
        max_examples=max_examples,
        deadline=None,
        database=None,
        derandomize=not SECONDS,
        suppress_health_check=list(HealthCheck),
    )
    @given(examples)
    def each(data):
        check(data, folder)

    each()


@pytest.mark.parametrize("name", PARSERS)
def test_a_parser_gives_a_value_or_one_line(name, tmp_path):
    fuzz(name, tmp_path, 30 if name == "journals" else 100)


@pytest.mark.slow
@pytest.mark.parametrize("name", PARSERS)
def test_a_parser_gives_a_value_or_one_line_for_a_minute_of_examples(name, tmp_path):
    num = {"reports": 10_000, "journals": 500}.get(name, 2_000)  # SQLite waits for the disk
    fuzz(name, tmp_path, num)
    rounds, end = 1, time.monotonic() + SECONDS
    while time.monotonic() < end:
        fuzz(name, tmp_path, min(num, 1_000))
        rounds += 1
    print(f"{name}: {num + (rounds - 1) * min(num, 1_000):,} examples")
