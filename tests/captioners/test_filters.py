"""Filters: what each drops and why; verdicts do not depend on the order of captions; scores are those of evaluation."""

import attrs
import mlx.core as mx
import numpy as np
import pytest
import small_modules
from PIL import Image, ImageDraw
from small_clip import small_clip

from mlxmm.captioners import duplicates, text_filters
from mlxmm.captioners.filters import Candidate, FilterConfig, apply_filters, check_filters, filters_of
from mlxmm.errors import UserError
from mlxmm.evaluation.captions import clip_scores
from mlxmm.evaluation.clip_features import image_features


def candidate(text, image="a", prompt="describe", **settings):
    return Candidate(image=image, prompt=prompt, text=text, **settings)


def flags_of(text, config, **settings):
    verdicts, _ = apply_filters([candidate(text, **settings)], config)
    assert verdicts[0].kept == (not verdicts[0].flags)
    return verdicts[0].flags


def picture(seed, size=96):
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (size, size), tuple(rng.integers(0, 256, 3).tolist()))
    for _ in range(6):
        corners = np.sort(rng.integers(0, size, (2, 2)), axis=0).ravel().tolist()
        ImageDraw.Draw(image).rectangle(corners, fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


@pytest.mark.parametrize(
    ("settings", "text", "flags"),
    [
        ({}, "a dog", {}),
        ({}, " .", {"empty": "there is no word in it"}),
        ({"min_words": 3}, "a dog", {"min_words": "2 of at least 3 words"}),
        ({"max_words": 1}, "a dog", {"max_words": "2 of at most 1 words"}),
        ({"max_repetition": 0.3}, "a red dog and a red dog", {"repetition": "0.412 of it repeats n-grams of 3 words"}),
        ({"max_repetition": 0.3}, "a red dog and a blue cat", {}),
        ({"drop_refusals": True}, "I'm sorry, I can't see it.", {"refusal": "does not describe the picture"}),
        ({"min_latin_share": 0.9}, "ein Hund läuft", {}),
        ({"min_latin_share": 0.9}, "a dog 一只狗", {"latin_share": "0.571 of its letters are Latin"}),
        ({"min_words": 3, "max_words": 1}, None, "min_words=3 is more than max_words=1"),
        ({"min_clip_score": 0.5}, None, "min_clip_score and keep_fraction need a CLIP"),
        ({"keep_fraction": 0.5}, None, "min_clip_score and keep_fraction need a CLIP"),
    ],
)
def test_a_filter_says_why_it_drops_a_caption(settings, text, flags):
    if text is None:
        with pytest.raises(UserError, match=flags):
            FilterConfig(**settings)
    else:
        assert flags_of(text, FilterConfig(**settings)) == flags


def test_a_caption_that_was_cut_off_is_dropped_only_if_asked():
    assert flags_of("a dog and", FilterConfig(), finish_reason="length") == {}
    assert set(flags_of("a dog and", FilterConfig(drop_cut_off=True), finish_reason="length")) == {"cut_off"}


def test_each_filter_judges_by_itself_and_all_reasons_are_kept():
    config = FilterConfig(min_words=9, min_latin_share=0.9, drop_refusals=True)
    assert set(flags_of("Sorry, 一只狗", config)) == {"min_words", "latin_share", "refusal"}


@pytest.mark.parametrize(
    ("text", "is_refusal"),
    [
        ("I'm sorry, but I cannot help with that.", True),
        ("I cannot see the image.", True),
        ("As an AI language model, I have no eyes.", True),
        ("Unfortunately, no image was provided.", True),
        ("There is no image attached.", True),
        ("Please upload the picture.", True),
        ("A sorry dog that cannot swim.", False),
        ("A man who is unable to open a door.", False),
        ("There is no one in the street.", False),
        ("A sign says: I can't read.", False),
    ],
)
def test_refusals_are_told_from_captions(text, is_refusal):
    assert text_filters.is_refusal(text) == is_refusal


@pytest.mark.parametrize(
    ("text", "stripped", "rest"),
    [
        ("The image shows a dog.", "The image shows ", "A dog."),
        ("This picture depicts two men.", "This picture depicts ", "Two men."),
        ("In this photo, we can see a cat.", "In this photo, we can see ", "A cat."),
        ("In the image there is a cat.", "In the image ", "There is a cat."),
        ("Sure! Here is a short caption: A cat.", "Sure! Here is a short caption: ", "A cat."),
        ("Caption: A cat.", "Caption: ", "A cat."),
        ("A picture of a dog on a wall.", "", "A picture of a dog on a wall."),
        ("The picture hangs on a wall.", "", "The picture hangs on a wall."),
        ("a dog", "", "a dog"),
        ("The image shows ", "", "The image shows "),
    ],
)
def test_boilerplate_is_taken_away_and_kept_beside_the_caption(text, stripped, rest):
    assert text_filters.split_boilerplate(text) == (stripped, rest)


def test_what_was_stripped_is_counted_and_what_is_left_is_judged():
    config = FilterConfig(strip_boilerplate=True, min_words=3)
    verdicts, counts = apply_filters([candidate("The image shows a dog"), candidate("a b c", "b")], config)
    assert (verdicts[0].text, verdicts[0].stripped, verdicts[0].kept) == ("A dog", "The image shows ", False)
    assert counts == {"captions": 2, "kept": 1, "stripped": 1, "empty": 0, "min_words": 1}


@pytest.mark.parametrize(
    ("text", "n", "value"),
    [("a b c", 1, 0), ("a a a a", 1, 0.75), ("a b a b a b", 2, 2 / 3), ("a b c a b c", 3, 0.5), ("", 3, 0)],
)
def test_repetition_is_the_share_of_characters_in_ngrams_that_came_before(text, n, value):
    assert text_filters.repetition(text, n) == pytest.approx(value)


def test_the_same_caption_of_many_pictures_stays_with_the_first_by_name():
    captions = [candidate("A dog.", "c"), candidate("a dog", "a"), candidate("a dog", "b"), candidate("a cat", "d")]
    verdicts, counts = apply_filters(captions, FilterConfig(max_same_caption=2))
    assert [verdict.kept for verdict in verdicts] == [False, True, True, True] and counts["same_caption"] == 1


def test_what_another_filter_dropped_is_no_duplicate_of_anything():
    captions = [candidate("a dog", "a", finish_reason="length"), candidate("a dog", "b")]
    verdicts, _ = apply_filters(captions, FilterConfig(max_same_caption=1, drop_cut_off=True))
    assert [set(verdict.flags) for verdict in verdicts] == [{"cut_off"}, set()]


def test_near_duplicates_are_those_of_one_picture():
    pytest.importorskip("rapidfuzz")
    texts = ["a red dog runs", "A red dog runs.", "a red dog ran", "a blue cat sleeps"]
    captions = [candidate(text, "a", str(i)) for i, text in enumerate(texts)] + [candidate("a red dog runs", "b")]
    verdicts, counts = apply_filters(captions, FilterConfig(max_similarity=0.8))
    assert [verdict.kept for verdict in verdicts] == [True, False, False, True, True] and counts["similar_caption"] == 2
    assert verdicts[1].flags == {"similar_caption": "1.000 like another caption of this picture"}


def test_languages_are_told_apart():
    pytest.importorskip("py3langid")
    config = FilterConfig(languages=("en",))
    check_filters(config)
    english, german = "A brown dog runs over the green grass", "Ein brauner Hund rennt über die grüne Wiese"
    assert not any(flags_of(text, config) for text in ("Two dogs.", "a dog", "Man on bike", "A cat on a sofa."))
    assert flags_of(english, config) == {} and set(flags_of(german, config)) == {"language"}
    assert flags_of(german, FilterConfig(languages=("en", "de"))) == {}
    with pytest.raises(UserError, match="there is no language 'xx'; there are ace, af, am, "):
        check_filters(FilterConfig(languages=("xx",)))


def test_a_picture_like_one_of_the_evaluation_gives_no_captions():
    pytest.importorskip("imagehash")
    pictures = {name: picture(seed) for seed, name in enumerate("abc")}
    leaked = pictures["b"].resize((61, 61)).convert("L").convert("RGB")  # smaller, and without its colours
    captions = [candidate("a dog", name, prompt) for name in "cab" for prompt in ("alt", "short")]
    config = FilterConfig(min_hash_distance=10)
    verdicts, counts = apply_filters(captions, config, images=pictures.__getitem__, evaluation_images=[leaked])
    assert [verdict.kept for verdict in verdicts] == [True] * 4 + [False] * 2
    assert counts["evaluation_picture"] == 2 and verdicts[0].scores["hash_distance"] >= 10
    _, counts = apply_filters(captions, config, images=pictures.__getitem__)
    assert counts["evaluation_picture"] == 0


def test_a_hash_that_has_nothing_to_compare_with_is_far_away():
    assert duplicates.nearest_distances(np.zeros(2, np.uint64), np.zeros(0, np.uint64)).tolist() == [65, 65]
    assert duplicates.nearest_distances(np.array([7], np.uint64), np.array([0, 3], np.uint64)).tolist() == [1]


@pytest.fixture(scope="module")
def scored():
    """A CLIP, pictures, captions in a shuffled order and their CLIPScores."""
    clip = small_clip()
    clip = type(clip)(
        attrs.evolve(clip.config, text=attrs.evolve(clip.config.text, max_position_embeddings=64)),
        clip.tokenizer,
        clip.processor,
    )
    mx.eval(clip.parameters())
    pictures = {name: picture(seed) for seed, name in enumerate("abcd")}
    texts = ["a red circle", "a blue square", "cat"]
    captions = [candidate(text, name, str(i)) for name in "dbca" for i, text in enumerate(texts)]
    features = mx.array(image_features(clip, [pictures[caption.image] for caption in captions]))
    values = clip_scores(clip, features, [c.text for c in captions], [["cat"]] * len(captions))["clip_score"]
    return clip, pictures, captions, np.array(values)


def test_clip_scores_are_those_of_the_evaluation_and_a_threshold_cuts_there(scored):
    clip, pictures, captions, values = scored
    least = float(np.median(values))
    config = FilterConfig(clip="small", min_clip_score=least)
    verdicts, _ = apply_filters(captions, config, images=pictures.__getitem__, clip=clip)
    np.testing.assert_allclose([verdict.scores["clip_score"] for verdict in verdicts], values, atol=1e-5)
    assert [verdict.kept for verdict in verdicts] == [v.scores["clip_score"] >= least for v in verdicts]
    assert 0 < sum(verdict.kept for verdict in verdicts) < len(captions)


def test_the_best_are_kept_and_verdicts_do_not_depend_on_the_order(scored):
    clip, pictures, captions, _ = scored
    config = FilterConfig(clip="small", keep_fraction=0.5, max_same_caption=3)
    found = []
    for order in (range(12), np.random.default_rng(0).permutation(12)):
        shuffled = [captions[i] for i in order]
        verdicts, counts = apply_filters(shuffled, config, images=pictures.__getitem__, clip=clip)
        found.append((dict(zip(shuffled, map(attrs.asdict, verdicts))), counts))
    assert found[0] == found[1]
    verdicts, counts = found[0]
    assert counts == {"captions": 12, "kept": 4, "empty": 0, "same_caption": 3, "best": 5}
    kept = [v["scores"]["clip_score"] for v in verdicts.values() if v["kept"]]
    assert min(kept) >= max(v["scores"]["clip_score"] for v in verdicts.values() if "best" in v["flags"])


def test_no_captions_give_no_verdicts():
    config = FilterConfig(clip="small", keep_fraction=0.5, max_same_caption=1, min_words=1)
    assert apply_filters([], config) == ([], {"captions": 0, "kept": 0} | dict.fromkeys(filters_of(config), 0))


def test_a_clip_that_cannot_read_the_captions_after_its_prompt_is_refused_and_without_the_prompt_it_reads_them():
    clip = small_modules.small_clip()
    captions = [
        Candidate(image=str(number), prompt="short", text=text) for number, text in enumerate(small_modules.CAPTIONS)
    ]
    image = lambda name: Image.new("RGB", (16, 16), (int(name) * 60, 0, 0))
    with pytest.raises(UserError, match="the CLIP reads 8 tokens"):
        apply_filters(captions, FilterConfig(clip="here", min_clip_score=0.1), images=image, clip=clip)
    config = FilterConfig(clip="here", clip_prompt="", keep_fraction=0.5)
    verdicts, counts = apply_filters(captions, config, images=image, clip=clip)
    assert counts["kept"] == len(captions) // 2 and all("clip_score" in verdict.scores for verdict in verdicts)
