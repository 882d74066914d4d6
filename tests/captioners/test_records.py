"""From a journal to the records of a data set: every caption is there, with its provenance or the reason why not."""

from mlxmm.captioners.caption_writer import Sampling, WrittenCaption
from mlxmm.captioners.filters import FilterConfig, apply_filters
from mlxmm.captioners.journal import Journal
from mlxmm.captioners.records import Provenance, candidates, caption_records


def test_every_entry_of_a_journal_becomes_a_record_with_its_verdict(tmp_path):
    sampling = Sampling(max_tokens=5)
    journal = Journal(tmp_path / "j.sqlite", writer="alice/captioner", revision="abc", sampling=sampling)
    texts = {("a", "alt"): "The image shows a red dog", ("a", "short"): "dog", ("b", "alt"): "a cat on a mat"}
    written = [(*key, WrittenCaption(text=text, num_tokens=4, finish_reason="stop")) for key, text in texts.items()]
    journal.add(written)
    journal.add_failure("b", "short", "the picture cannot be decoded")
    entries = list(journal.entries())
    verdicts, counts = apply_filters(candidates(entries), FilterConfig(min_words=2, strip_boilerplate=True))
    assert counts == {"captions": 4, "kept": 2, "stripped": 1, "failed": 1, "empty": 0, "min_words": 1}
    provenance = Provenance(captioner="alice/captioner", captioner_revision="abc", quantization="4", sampling=sampling)
    records = caption_records(entries, verdicts, provenance)
    found = {name: [(one.prompt, one.text, one.flags) for one in part] for name, part in records.items()}
    assert found == {
        "a": [("alt", "A red dog", {}), ("short", "dog", {"min_words": "1 of at least 2 words"})],
        "b": [("alt", "a cat on a mat", {}), ("short", "", {"failed": "the picture cannot be decoded"})],
    }
    first = records["a"][0]
    assert (first.captioner, first.captioner_revision, first.quantization) == ("alice/captioner", "abc", "4")
    assert first.stripped == "The image shows " and first.sampling["max_tokens"] == 5
    assert first.created_at == entries[0].seconds and (first.num_tokens, first.finish_reason) == (4, "stop")
