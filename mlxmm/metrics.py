"""Caption metrics: pure functions of strings."""

from collections.abc import Sequence


def exact_match(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The fraction of hypotheses that equal one of their references."""
    return sum(h in refs for h, refs in zip(hypotheses, references, strict=True)) / len(hypotheses)


def bleu(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4 in percent, one hypothesis an image against all its references (sacrebleu, tokenizer 13a)."""
    from sacrebleu.metrics import BLEU

    most = max(map(len, references))
    # sacrebleu wants the first references of all, then the second of all; None where there is none.
    columns = [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]
    return BLEU().corpus_score(list(hypotheses), columns).score
