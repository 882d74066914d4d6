"""The `shapes` data set: pictures of coloured objects and the sentences that describe them, drawn on the spot.

    "a large red circle above a small blue square"

A scene is a function of (seed, split, epoch, index), so nothing is stored and every process draws the same one.
Objects stand in a row or in a column; the canonical caption names them from left to right or from top to bottom.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations, product

import attrs
import numpy as np
from attrs.validators import ge, le
from PIL import Image, ImageDraw

from mlxmm.config import checked, option

SIZES = ("small", "large")
COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 97, 200),
    "yellow": (240, 205, 30),
    "purple": (140, 70, 190),
    "orange": (250, 130, 20),
}
SHAPES = ("circle", "square", "triangle", "cross")
SPLITS = ("train", "val", "test", "test_unseen", "test_unseen_attributes")

NUM_UNSEEN_ATTRIBUTES = 4  # colour-shape combinations in no training picture
UNSEEN_PAIRS_IN = 8  # one pair of objects in so many is in no training picture
SUPERSAMPLING = 4  # drawn so many times larger, then averaged down: smooth edges


@attrs.frozen(kw_only=True, field_transformer=checked)
class ShapesConfig:
    """How many scenes to draw and how hard they are."""

    image_size: int = option(32, "side of the square picture, in pixels", ge(16))
    max_objects: int = option(2, "most objects in a scene", ge(1), le(3))
    num_train: int = option(12_800, "training scenes in an epoch", ge(1))
    num_val: int = option(256, "validation scenes", ge(1))
    num_test: int = option(512, "test scenes in each of the three parts", ge(1))


@attrs.frozen
class Thing:
    """One object: a large red circle."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@attrs.frozen
class Scene:
    """Objects in reading order, in a column or in a row."""

    things: tuple[Thing, ...]
    is_column: bool

    def captions(self) -> tuple[str, ...]:
        """The canonical caption, then true paraphrases of it."""
        forward = [str(thing) for thing in self.things]
        if len(forward) == 1:
            return forward[0], f"there is {forward[0]}", f"one {forward[0].removeprefix('a ')}"
        backward = forward[::-1]
        before, after = ("above", "below") if self.is_column else ("left of", "right of")
        synonyms = ("over", "under") if self.is_column else ("to the left of", "to the right of")
        return (
            f" {before} ".join(forward),
            f" {after} ".join(backward),
            f" {synonyms[0]} ".join(forward),
            f" {synonyms[1]} ".join(backward),
        )


def all_things() -> list[Thing]:
    """Every size x colour x shape."""
    return [Thing(*words) for words in product(SIZES, COLOURS, SHAPES)]


class ShapesGrammar:
    """Which scenes a split may hold: what is held out of training is a function of the seed."""

    def __init__(self, config: ShapesConfig, seed: int):
        self.config = config
        rng = np.random.default_rng([seed, 0xA77])
        colours, shapes = rng.permutation(list(COLOURS)), rng.permutation(SHAPES)
        self.unseen_attributes = {(str(c), str(s)) for c, s in zip(colours, shapes[:NUM_UNSEEN_ATTRIBUTES])}
        seen = [thing for thing in all_things() if not self._is_unseen(thing)]
        pairs = [frozenset(pair) for pair in combinations(seen, 2)] + [frozenset([t]) for t in seen]
        order = rng.permutation(len(pairs))
        self.unseen_pairs = {pairs[i] for i in order[: len(pairs) // UNSEEN_PAIRS_IN]}

    def trainable_things(self) -> list[Thing]:
        """The objects that training pictures may show."""
        return [thing for thing in all_things() if not self._is_unseen(thing)]

    def allows(self, scene: Scene, split: str) -> bool:
        """Whether `scene` belongs in `split`."""
        has_unseen_thing = any(self._is_unseen(thing) for thing in scene.things)
        has_unseen_pair = any(frozenset(p) in self.unseen_pairs for p in combinations(scene.things, 2))
        if split == "test_unseen_attributes":
            return has_unseen_thing
        if split == "test_unseen":
            return has_unseen_pair and not has_unseen_thing
        return not has_unseen_thing and not has_unseen_pair

    def sample(self, rng: np.random.Generator, split: str) -> Scene:
        """Draw scenes of the grammar until one belongs in `split`."""
        while True:
            scene = self.sample_any(rng)
            if self.allows(scene, split):
                return scene

    def sample_any(self, rng: np.random.Generator) -> Scene:
        """A scene of the whole grammar, held out or not."""
        # Two objects twice as often as one: there is more to tell of them.
        chances = np.arange(1, self.config.max_objects + 1)
        num_things = int(rng.choice(chances, p=chances / chances.sum()))
        picks = rng.random((num_things, 3))
        names = [SIZES, tuple(COLOURS), SHAPES]
        things = tuple(Thing(*(n[int(p * len(n))] for n, p in zip(names, row))) for row in picks)
        return Scene(things, is_column=bool(rng.random() < 0.5))

    def rows(self, seed: int, epoch: int = 0) -> dict[str, "ShapesRows"]:
        """The rows of every split; those of training differ by epoch. Single objects have no split of unseen pairs."""
        config = self.config
        counts = {"train": config.num_train, "val": config.num_val}
        return {
            split: ShapesRows(self, split, seed, counts.get(split, config.num_test), epoch * (split == "train"))
            for split in SPLITS
            if config.max_objects > 1 or split != "test_unseen"
        }

    def _is_unseen(self, thing: Thing) -> bool:
        return (thing.colour, thing.shape) in self.unseen_attributes


@attrs.frozen
class ShapesRows(Sequence):
    """The rows of one split, drawn when asked for: `{"image": PIL, "captions": [str], "id": str}`.

    Training rows have the canonical caption alone; the others have its paraphrases too, as references.
    """

    grammar: ShapesGrammar
    split: str
    seed: int
    num_rows: int
    epoch: int = 0

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict:
        scene, rng = self._scene(index)
        return {"image": draw(scene, self.grammar.config.image_size, rng)} | self._without_image(scene, index)

    def without_image(self, index: int) -> dict:
        """The row without its picture, which is not drawn."""
        return self._without_image(self._scene(index)[0], index)

    def _scene(self, index: int) -> tuple[Scene, np.random.Generator]:
        """The scene, and the generator that draws it."""
        if not 0 <= index < self.num_rows:
            raise IndexError(index)
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), self.epoch, index])
        return self.grammar.sample(rng, self.split), rng

    def _without_image(self, scene: Scene, index: int) -> dict:
        captions = scene.captions()
        return {"captions": list(captions[:1] if self.split == "train" else captions), "id": self.name(index)}

    def captions(self) -> Iterator[str]:
        """Every caption."""
        return (caption for index in range(len(self)) for caption in self.without_image(index)["captions"])

    def name(self, index: int) -> str:
        """Split, epoch and number."""
        return f"{self.split}-{self.epoch}-{index}"

    def fingerprint(self) -> bytes:
        """What the pictures are a function of."""
        config = self.grammar.config
        parts = config.image_size, config.max_objects, self.split, self.seed, self.num_rows, self.epoch
        return " ".join(map(str, parts)).encode()


@attrs.frozen
class ShapesTexts(Sequence):
    """Text of the whole grammar, scenes included that no picture shows: (notes, caption) pairs, without end.

    Notes are a scene in words, as a plan drawn on squared paper has it: a word in each cell that an object
    covers (its size, its colour or its shape), a full stop in each that is empty. Who has read plans and the
    sentences that go with them can say what is where once something else writes the plan.
    """

    grammar: ShapesGrammar
    seed: int
    num_texts: int = 1_000_000
    cells: int = 4  # along each side of the plan

    def __len__(self) -> int:
        return self.num_texts

    def __getitem__(self, index: int) -> tuple[str, str]:
        if not 0 <= index < self.num_texts:
            raise IndexError(index)
        rng = np.random.default_rng([self.seed, 0x7E, index])
        scene = self.grammar.sample_any(rng)
        return " ".join(self._plan(scene, rng)), scene.captions()[0]

    def _plan(self, scene: Scene, rng: np.random.Generator) -> list[str]:
        """Words by rows; an object takes the cells within half a cell of its square, nearest object first."""
        centres = (np.stack(np.meshgrid(*[np.arange(self.cells)] * 2), -1).reshape(-1, 2) + 0.5) / self.cells
        places, radii = _places(scene, rng)
        distances = np.abs(centres[:, None] - np.array(places)[None])  # (cells, things, 2)
        covered = (distances < np.array(radii)[None, :, None] + 1 / self.cells).all(-1)
        nearest = np.where(covered, distances.sum(-1), np.inf).argmin(-1)
        words = ["."] * len(centres)
        for i, thing in enumerate(scene.things):
            cells = np.flatnonzero(covered[:, i] & (nearest == i))
            names = (thing.size, thing.colour, thing.shape)
            order = np.concatenate([rng.permutation(3) for _ in range(len(cells) // 3 + 1)])
            for cell, word in zip(cells, order):
                words[cell] = names[word]
        return words


def single_objects(grammar: ShapesGrammar, seed: int, num_each: int) -> Iterator[tuple[Image.Image, Thing]]:
    """New pictures of every object that training may show, alone: what zero-shot accuracy is measured on."""
    rng = np.random.default_rng([seed, 0x51])
    for thing in grammar.trainable_things():
        for _ in range(num_each):
            yield draw(Scene((thing,), is_column=True), grammar.config.image_size, rng), thing


def names_several(caption: str) -> bool:
    """Whether a canonical caption is of more than one object."""
    return any(f" {place} " in caption for place in ("above", "left of"))


def draw(scene: Scene, image_size: int, rng: np.random.Generator) -> Image.Image:
    """Paint `scene` with places, shade and tints of its own. (image_size, image_size) RGB."""
    side = image_size * SUPERSAMPLING
    shade = int(rng.integers(225, 256))
    image = Image.new("RGB", (side, side), (shade, shade, shade))
    pen = ImageDraw.Draw(image)
    for thing, (x, y), radius in zip(scene.things, *_places(scene, rng)):
        tint = rng.integers(-14, 15, size=3)
        colour = tuple(int(c) for c in np.clip(np.array(COLOURS[thing.colour]) + tint, 0, 255))
        _paint(pen, thing.shape, x * side, y * side, radius * side, colour)
    return image.reduce(SUPERSAMPLING)


def _places(scene: Scene, rng: np.random.Generator) -> tuple[list[tuple[float, float]], list[float]]:
    """Centres and radii in units of the picture's side; the order along the line is never in doubt."""
    num_things = len(scene.things)
    band = 1 / max(num_things, 2)
    radii = [(0.42 if thing.size == "large" else 0.23) * band for thing in scene.things]
    middle = rng.uniform(max(radii) + 0.05, 0.95 - max(radii))
    places = []
    for i, radius in enumerate(radii):
        start, room = (0.0, 1.0) if num_things == 1 else (i * band, band)
        along = start + radius + rng.random() * (room - 2 * radius)
        across = float(np.clip(middle + rng.uniform(-0.08, 0.08), radius, 1 - radius))
        places.append((across, along) if scene.is_column else (along, across))
    return places, radii


def _paint(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, colour: tuple) -> None:
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    elif shape == "square":
        pen.rectangle((x - r, y - r, x + r, y + r), fill=colour)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x - r, y + 0.87 * r), (x + r, y + 0.87 * r)], fill=colour)
    else:
        arm = 0.34 * r
        pen.rectangle((x - r, y - arm, x + r, y + arm), fill=colour)
        pen.rectangle((x - arm, y - r, x + arm, y + r), fill=colour)
