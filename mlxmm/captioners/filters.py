"""Filters: what a caption must pass before it goes into a data set. Each is optional and counted.

Filters of one caption see every caption. Those that compare captions (the same caption, near-duplicates, the best by
score) see what passed the others, in this order. Captions are judged in the order of their keys, so verdicts do not
depend on the order in which captions come.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import attrs
import mlx.core as mx
import numpy as np
from attrs.validators import ge, gt, le, optional
from PIL import Image

from mlxmm.captioners import duplicates, text_filters
from mlxmm.captioners.journal import FAILED
from mlxmm.config import checked, option
from mlxmm.errors import UserError
from mlxmm.evaluation.caption_metrics import CLIP_SCORE_PROMPT, clip_score, words
from mlxmm.evaluation.captions import require_room
from mlxmm.evaluation.clip_features import image_features, text_features
from mlxmm.modules.contrastive_clip import ContrastiveCLIP

Images = Callable[[str], Image.Image]  # the picture with this SHA-256


@attrs.frozen(kw_only=True, field_transformer=checked)
class FilterConfig:
    """What captions must pass; without settings, all that hold a word do."""

    clip: str | None = option(None, "CLIP of the filters by CLIPScore: a folder or a Hub id")
    clip_prompt: str = option(
        CLIP_SCORE_PROMPT,
        "text before each caption, for CLIP: CLIPScore's; none for a CLIP of such captions alone",
        rare=True,
    )
    min_clip_score: float | None = option(None, "least CLIPScore, 0 to 2.5", optional(ge(0)))
    keep_fraction: float | None = option(
        None, "fraction of captions to keep, the best by CLIPScore", optional([gt(0), le(1)])
    )
    min_words: int | None = option(None, "fewest words", optional(ge(1)))
    max_words: int | None = option(None, "most words", optional(ge(1)), first=True)
    drop_cut_off: bool = option(False, "drop captions that were cut off at the longest length")
    max_repetition: float | None = option(
        None, "most characters, as a fraction, in n-grams that came before (Gopher)", optional([ge(0), le(1)])
    )
    repetition_ngram: int = option(3, "words of such an n-gram; 1: repeated words", ge(1), rare=True)
    drop_refusals: bool = option(False, "drop answers that refuse to describe the picture")
    strip_boilerplate: bool = option(False, 'take away "The image shows" and the like')
    min_latin_share: float | None = option(None, "least fraction of Latin letters", optional([ge(0), le(1)]))
    languages: tuple[str, ...] = option((), "languages to keep, as en (needs py3langid)")
    min_language_probability: float = option(
        0.01, "least probability of these languages; it is small for captions of few words", gt(0), le(1), rare=True
    )
    max_same_caption: int | None = option(None, "most pictures with the same caption", optional(ge(1)))
    max_similarity: float | None = option(
        None, "most similarity of captions of one picture, 0 to 1 (needs rapidfuzz)", optional([ge(0), le(1)])
    )
    min_hash_distance: int | None = option(
        None,
        "fewest bits, of 64, by which the pHash of a picture differs from that of every evaluation picture "
        "(needs ImageHash)",
        optional([ge(1), le(64)]),
    )

    def __attrs_post_init__(self):
        if self.clip is None and self.uses_scores:
            raise UserError("min_clip_score and keep_fraction need a CLIP: name one with clip")
        if None not in (self.min_words, self.max_words) and self.min_words > self.max_words:
            raise UserError(f"min_words={self.min_words} is more than max_words={self.max_words}")

    @property
    def uses_scores(self) -> bool:
        """Whether a caption may be dropped for its CLIPScore."""
        return self.min_clip_score is not None or self.keep_fraction is not None


@attrs.frozen(kw_only=True, order=True, field_transformer=checked)
class Candidate:
    """A caption to be judged."""

    image: str  # SHA-256 of the picture's file, in hexadecimal
    prompt: str  # its id
    text: str
    finish_reason: str = "stop"


@attrs.frozen(kw_only=True, field_transformer=checked)
class Verdict:
    """What the filters make of one caption."""

    kept: bool
    text: str  # as it came, less `stripped`
    stripped: str  # the boilerplate that was taken away
    flags: dict[str, str]  # by filter, why it drops the caption
    scores: dict[str, float]


def apply_filters(
    captions: Sequence[Candidate],
    config: FilterConfig,
    *,
    images: Images | None = None,
    clip: ContrastiveCLIP | None = None,
    evaluation_images: Iterable[Image.Image] = (),
) -> tuple[list[Verdict], dict[str, int]]:
    """The verdict on each caption, and counts: "captions", "kept", "stripped", and how many each filter dropped.

    `images` and `clip`, the model that `config.clip` names, are needed for filters by CLIPScore; `images` and
    `evaluation_images` for the filter by pHash.
    """
    order = sorted(range(len(captions)), key=captions.__getitem__)
    judged = _Judged.of([captions[place] for place in order], config)
    judged.judge_texts(config)
    if config.clip is not None:
        judged.add_clip_scores(clip, images, config)
    if config.min_hash_distance is not None:
        judged.judge_pictures(images, evaluation_images, config.min_hash_distance)
    judged.compare(config)
    verdicts = dict(zip(order, judged.verdicts()))
    return [verdicts[place] for place in range(len(captions))], judged.counts(config)


@attrs.frozen
class _Judged:
    """Captions in the order of their keys, with what was found of them so far."""

    captions: list[Candidate]
    texts: list[str]
    stripped: list[str]
    flags: list[dict[str, str]]
    scores: list[dict[str, float]]

    @classmethod
    def of(cls, captions: list[Candidate], config: FilterConfig) -> "_Judged":
        split = text_filters.split_boilerplate if config.strip_boilerplate else lambda text: ("", text)
        pairs = [split(caption.text.strip()) for caption in captions]
        blank = lambda: [{} for _ in captions]
        return cls(captions, [text for _, text in pairs], [stripped for stripped, _ in pairs], blank(), blank())

    def judge_texts(self, config: FilterConfig) -> None:
        for caption, text, flags, scores in zip(self.captions, self.texts, self.flags, self.scores):
            scores |= _text_scores(text, config)
            flags |= _text_flags(caption, text, scores, config)

    def add_clip_scores(self, clip: ContrastiveCLIP, images: Images, config: FilterConfig) -> None:
        places = [place for place, text in enumerate(self.texts) if words(text)]
        names = [self.captions[place].image for place in places]
        texts = [self.texts[place] for place in places]
        values = clip_scores(clip, images, names, texts, config.clip_prompt) if places else ()
        for place, value in zip(places, values):
            self.scores[place]["clip_score"] = float(value)
            if config.min_clip_score is not None and value < config.min_clip_score:
                self.flags[place]["clip_score"] = f"CLIPScore {value:.3f}, below {config.min_clip_score}"

    def judge_pictures(self, images: Images, evaluation_images: Iterable, least: int) -> None:
        names = sorted({caption.image for caption, text in zip(self.captions, self.texts) if words(text)})
        hashes = duplicates.perceptual_hashes(map(images, names))
        distances = duplicates.nearest_distances(hashes, duplicates.perceptual_hashes(evaluation_images))
        found = dict(zip(names, distances.tolist()))
        for caption, flags, scores in zip(self.captions, self.flags, self.scores):
            if caption.image not in found:  # without a caption: perhaps no picture that can be decoded
                continue
            scores["hash_distance"] = found[caption.image]
            if found[caption.image] < least:
                flags["evaluation_picture"] = f"{found[caption.image]} bits from an evaluation picture"

    def compare(self, config: FilterConfig) -> None:
        """The filters that see what passed the others."""
        if config.max_same_caption is not None:
            places, texts = self._passed()
            for i in duplicates.same_captions(texts, config.max_same_caption):
                self.flags[places[i]]["same_caption"] = f"more than {config.max_same_caption} have this caption"
        if config.max_similarity is not None:
            places, texts = self._passed()
            pictures = [self.captions[place].image for place in places]
            for i, value in duplicates.similar_captions(texts, pictures, config.max_similarity).items():
                self.flags[places[i]]["similar_caption"] = f"{value:.3f} like another caption of this picture"
        if config.keep_fraction is not None:
            places, _ = self._passed()
            best = sorted(places, key=lambda place: -self.scores[place]["clip_score"])
            for place in best[round(config.keep_fraction * len(best)) :]:
                self.flags[place]["best"] = f"not in the best {config.keep_fraction:g} by CLIPScore"

    def _passed(self) -> tuple[list[int], list[str]]:
        places = [place for place, flags in enumerate(self.flags) if not flags]
        return places, [self.texts[place] for place in places]

    def verdicts(self) -> list[Verdict]:
        parts = zip(self.texts, self.stripped, self.flags, self.scores)
        return [
            Verdict(kept=not flags, text=text, stripped=stripped, flags=flags, scores=scores)
            for text, stripped, flags, scores in parts
        ]

    def counts(self, config: FilterConfig) -> dict[str, int]:
        num_dropped = Counter(name for flags in self.flags for name in flags)
        counts = {"captions": len(self.captions), "kept": sum(not flags for flags in self.flags)}
        counts |= {"stripped": sum(map(bool, self.stripped))} if config.strip_boilerplate else {}
        counts |= {"failed": num_dropped["failed"]} if num_dropped["failed"] else {}
        return counts | {name: num_dropped[name] for name in filters_of(config)}


def filters_of(config: FilterConfig) -> list[str]:
    """The names of the filters that are on, in the order in which they judge."""
    on = {
        "empty": True,
        "min_words": config.min_words is not None,
        "max_words": config.max_words is not None,
        "cut_off": config.drop_cut_off,
        "repetition": config.max_repetition is not None,
        "refusal": config.drop_refusals,
        "latin_share": config.min_latin_share is not None,
        "language": bool(config.languages),
        "clip_score": config.min_clip_score is not None,
        "evaluation_picture": config.min_hash_distance is not None,
        "same_caption": config.max_same_caption is not None,
        "similar_caption": config.max_similarity is not None,
        "best": config.keep_fraction is not None,
    }
    return [name for name, is_on in on.items() if is_on]


def check_filters(config: FilterConfig) -> None:
    """Raise `UserError` where a filter needs a package that is not installed, or a language is unknown."""
    if config.languages:
        text_filters.check_languages(config.languages)
    if config.max_similarity is not None:
        duplicates.similar_captions([], [], 1.0)
    if config.min_hash_distance is not None:
        duplicates.perceptual_hashes([])


def _text_scores(text: str, config: FilterConfig) -> dict[str, float]:
    scores = {"num_words": float(len(words(text)))}
    if config.max_repetition is not None:
        scores["repetition"] = text_filters.repetition(text, config.repetition_ngram)
    if config.min_latin_share is not None:
        scores["latin_share"] = text_filters.latin_share(text)
    if config.languages:
        scores["language_probability"] = text_filters.language_probability(text, config.languages)
    return scores


def _text_flags(caption: Candidate, text: str, scores: dict[str, float], config: FilterConfig) -> dict[str, str]:
    """Why the filters of one text drop it."""
    if caption.finish_reason == FAILED:
        return {"failed": "no caption was written"}
    num, languages = int(scores["num_words"]), " or ".join(config.languages)
    above = lambda score, most: most is not None and score > most
    below = lambda score, least: least is not None and score < least
    found = {
        "empty": num == 0 and "there is no word in it",
        "min_words": below(num, config.min_words) and f"{num} of at least {config.min_words} words",
        "max_words": above(num, config.max_words) and f"{num} of at most {config.max_words} words",
        "cut_off": config.drop_cut_off and caption.finish_reason == "length" and "cut off at the longest length",
        "repetition": above(scores.get("repetition"), config.max_repetition)
        and f"{scores['repetition']:.3f} of it repeats n-grams of {config.repetition_ngram} words",
        "refusal": config.drop_refusals and text_filters.is_refusal(caption.text) and "does not describe the picture",
        "latin_share": below(scores.get("latin_share"), config.min_latin_share)
        and f"{scores['latin_share']:.3f} of its letters are Latin",
        "language": bool(config.languages)
        and scores["language_probability"] < config.min_language_probability
        and f"in {languages} with probability {scores['language_probability']:.3f}",
    }
    return {name: reason for name, reason in found.items() if reason}


def clip_scores(clip: ContrastiveCLIP, images: Images, names: list[str], texts: list[str], prompt: str) -> np.ndarray:
    """CLIPScore of each text with the picture of its name (N,). Raises `UserError` if CLIP would cut off most texts."""
    require_room(clip, texts, prompt)
    place_of = {name: place for place, name in enumerate(sorted(set(names)))}
    pictures = image_features(clip, map(images, place_of))[[place_of[name] for name in names]]
    return np.array(clip_score(mx.array(pictures), mx.array(text_features(clip, [prompt + text for text in texts]))))
