"""What the text of one caption tells: refusals, boilerplate, repetition, language. Pure functions of a string."""

import functools
import re
from collections.abc import Sequence

from mlxmm.errors import UserError
from mlxmm.evaluation.caption_metrics import words

NOT = r"(?:cannot|can['’]t|can not|am unable to|['’]m unable to|am not able to|['’]m not able to|could not|couldn['’]t)"
REFUSAL = re.compile(
    rf"^\W*(?:i(?:['’]m| am) sorry|sorry\b|i apologi[sz]e|unfortunately\b|as an ai\b|i ?{NOT}\b"
    r"|please (?:provide|upload|share)\b"
    r"|(?:there is|i see) no (?:image|picture|photo)\b|no (?:image|picture|photo) (?:was|is|has been)\b)"
    rf"|\bas an ai (?:language )?model\b|\bi ?{NOT} (?:see|view|help|assist|describe|identify|provide)\b",
    re.IGNORECASE,
)
PICTURE = r"(?:provided |given |attached )?(?:image|picture|photo|photograph)"
BOILERPLATE = re.compile(
    r"^\W*(?:(?:sure|certainly|of course)[,!.]? *)?(?:here(?: is|['’]s) [^:.]{0,40}: *|caption: *)?"
    rf"(?:(?:the|this) {PICTURE} (?:clearly )?(?:shows|depicts|displays|features|captures|presents|portrays|is of) "
    rf"|in (?:the|this) {PICTURE},? *(?:(?:we|you|one) can see(?: that)? )?)?",
    re.IGNORECASE,
)


def is_refusal(text: str) -> bool:
    """Whether a captioner says that it cannot, or will not, describe the picture."""
    return REFUSAL.search(text) is not None


def split_boilerplate(text: str) -> tuple[str, str]:
    """("The image shows ", "A dog."): what comes before the caption, and the caption, which begins with a capital."""
    rest = text[BOILERPLATE.match(text).end() :].strip().removeprefix('"').removesuffix('"')
    stripped = text[: text.find(rest)] if rest else ""
    if not stripped.strip() or not rest:
        return "", text
    return stripped, rest[0].upper() + rest[1:]


def repetition(text: str, n: int) -> float:
    """The fraction of the characters of a text's words that are in n-grams which came before: Gopher's "fraction of
    characters in duplicate n-grams" (arXiv 2112.11446, table A1), counted as datatrove's `find_all_duplicate` does.
    With n=1 it is the share of repeated words."""
    tokens = words(text)
    seen, repeated, place = set(), 0, 0
    while place <= len(tokens) - n:
        ngram = tuple(tokens[place : place + n])
        is_repeated = ngram in seen
        seen.add(ngram)
        repeated += is_repeated * sum(map(len, ngram))
        place += n if is_repeated else 1
    return repeated / max(1, sum(map(len, tokens)))


def latin_share(text: str) -> float:
    """The fraction of a text's letters that are Latin, with or without accents; 1 if it has no letters."""
    letters = [letter for letter in text if letter.isalpha()]
    return sum(letter < "\u0250" for letter in letters) / len(letters) if letters else 1.0


def language_probability(text: str, languages: Sequence[str]) -> float:
    """The probability that a text is in one of `languages` (ISO 639-1), by py3langid's naive Bayes of byte n-grams."""
    return sum(probability for name, probability in _identifier().rank(text) if name in languages)


def check_languages(languages: Sequence[str]) -> None:
    """Raise `UserError` if a language is unknown, or py3langid is not installed."""
    known = {name for name, _ in _identifier().rank("")}
    if unknown := [name for name in languages if name not in known]:
        raise UserError(f"there is no language {unknown[0]!r}; there are {', '.join(sorted(known))}")


@functools.cache
def _identifier():
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise UserError('a filter by language needs py3langid: pip install "mlxmm[filters]"') from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
