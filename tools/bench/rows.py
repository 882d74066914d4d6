"""The rows of the table: what is measured, against whom, and the goal."""

import attrs

TRANSFORMERS, LIGHTNING = ("torch", "transformers"), ("torch", "lightning")


@attrs.frozen(kw_only=True)
class Row:
    """Two functions `side(case)`, as "file:function", each of which returns the function that is timed.

    `goal` and `aim` are how many times as fast as the peer mlxmm has to be. `clock` is what they are compared by: cpu
    (on a GPU: wall), wall, or another number that both sides measure themselves.
    """

    name: str
    ours: str
    theirs: str
    peer: str
    needs: tuple[str, ...] = ()  # packages of the peer's environment; none: both sides run in mlxmm's own
    goal: float
    aim: float | None = None
    clock: str = "cpu"
    also: tuple[str, ...] = ()  # other numbers that are compared
    cpu_only: bool = False
    options: dict = {}


def _clip(name: str, size: str, theirs: str = "theirs", peer: str = "transformers") -> Row:
    options = {"size": size}
    sides = {"ours": "clip_step:ours", "theirs": f"clip_step:{theirs}"}
    return Row(name=name, **sides, peer=peer, needs=TRANSFORMERS, goal=0.91, aim=1.11, options=options)


def _checkpoint(name: str, which: str, goal: float) -> Row:
    sides = {"ours": f"checkpoints:ours{which}", "theirs": f"checkpoints:theirs{which}"}
    return Row(name=name, **sides, peer="torch.save", needs=("torch",), goal=goal, clock="wall")


def _loader(name: str, ours: str) -> Row:
    sides = {"ours": f"loader:{ours}", "theirs": "loader:theirs"}
    return Row(name=name, **sides, peer="torch DataLoader", needs=("torch",), goal=1.2)


ROWS = (
    Row(
        name="trainer, a nearly free step",
        ours="overhead:ours",
        theirs="overhead:theirs",
        peer="Lightning",
        needs=LIGHTNING,
        goal=10,
        aim=20,
        clock="added_us",
        cpu_only=True,
    ),
    _clip("CLIP step, small", "small"),
    _clip("CLIP step, ViT-S", "ViT-S"),
    _clip("CLIP step, small, compiled", "small", "theirs_compiled", "torch.compile"),
    Row(
        name="aligner step, labels only",
        ours="aligner:ours",
        theirs="aligner:theirs",
        peer="transformers",
        needs=TRANSFORMERS,
        goal=1.0,
        aim=1.4,
    ),
    Row(
        name="alignment, epoch 2, cached",
        ours="aligner:our_epoch",
        theirs="aligner:their_epoch",
        peer="transformers",
        needs=TRANSFORMERS,
        goal=5,
        aim=30,
    ),
    Row(
        name="language model, ragged",
        ours="language_model:ours",
        theirs="language_model:theirs",
        peer="mlx-lm",
        goal=2,
        aim=3,
    ),
    Row(
        name="captioning, V 8,192",
        ours="captioning:ours",
        theirs="captioning:theirs",
        peer="transformers",
        needs=TRANSFORMERS,
        goal=1.5,
        aim=3,
    ),
    _loader("loader, JPEGs, epoch 1", "ours"),
    _loader("loader, JPEGs, epoch 2", "our_later_epoch"),
    Row(name="head of 151,936", ours="head:ours", theirs="head:theirs", peer="plain MLX", goal=2, also=("mb",)),
    _checkpoint("checkpoint of 100M", "", goal=1),
    _checkpoint("checkpoint, 1 of 60 trained", "_partly_trained", goal=3),
    Row(
        name="first start, 100,000 rows",
        ours="startup:first_100_000",
        theirs="startup:first_1_000",
        peer="1,000 rows",
        goal=0.01,
        clock="cpu",
        also=("mb",),
    ),
    Row(
        name="start again, 100,000 rows",
        ours="startup:again_100_000",
        theirs="startup:again_1_000",
        peer="1,000 rows",
        goal=0.5,
        aim=1,
        clock="cpu",
        also=("mb",),
    ),
)
