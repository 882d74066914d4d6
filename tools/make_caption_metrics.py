"""Writes tests/fixtures/caption_metrics.json: captions, and what the published coco-caption tools say of them.

Run it in an environment of its own, with Java: pip install pycocoevalcap numpy; python tools/make_caption_metrics.py
"""

import json
from pathlib import Path

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

FIXTURE = Path(__file__).parent.parent / "tests" / "fixtures" / "caption_metrics.json"


def main() -> None:
    data = json.loads(FIXTURE.read_text())
    tokenize = PTBTokenizer().tokenize
    said = tokenize({i: [{"caption": text}] for i, text in enumerate(data["hypotheses"])})
    wanted = tokenize({i: [{"caption": text} for text in refs] for i, refs in enumerate(data["references"])})
    bleu, _ = Bleu(4).compute_score(wanted, said, verbose=0)
    cider, ciders = Cider().compute_score(wanted, said)
    rouge, _ = Rouge().compute_score(wanted, said)
    data["tokens"] = {"hypotheses": [said[i][0] for i in said], "references": [wanted[i] for i in wanted]}
    data["scores"] = {"bleu": list(bleu), "cider_d": float(cider), "cider_d_each": list(map(float, ciders))}
    data["scores"]["rouge_l"] = float(rouge)
    odd = tokenize({i: [{"caption": text}] for i, text in enumerate(data["odd"]["texts"])})
    data["odd"]["tokens"] = [odd[i][0] for i in odd]
    FIXTURE.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
