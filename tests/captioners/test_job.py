"""The job's loop: every caption is asked for once, also where a writer makes its batches smaller on the way."""

import pytest
from PIL import Image

from mlxmm.captioners.caption_writer import CaptionFailure, Sampling, WriterFailed, WrittenCaption
from mlxmm.captioners.job import Shard, hashes_of, requests, write_captions
from mlxmm.captioners.journal import Journal
from mlxmm.errors import UserError

PROMPTS = {"short": "Be short.", "alt": "Say it."}


class Pictures(list):
    """Ten pictures, the last two equal."""

    def __init__(self):
        super().__init__(Image.new("RGB", (4, 4), (min(number, 8) * 20, 0, 0)) for number in range(10))

    def sha256(self, place):
        return f"{min(place, 8):064x}"


class Shrinking:
    """Writes in batches that become smaller; fails on the pictures of `bad` places in what it has been asked."""

    name, revision, batch_size = "shrinking", "1", 4

    def __init__(self, bad=(), gives_up_after=None):
        self.asked, self.bad, self.gives_up_after = [], bad, gives_up_after

    def write(self, images, prompts, sampling):
        if self.gives_up_after is not None and len(self.asked) >= self.gives_up_after:
            raise WriterFailed("nobody answers")
        assert len(images) <= self.batch_size
        self.batch_size = max(1, self.batch_size - 1)
        answers = []
        for image, prompt in zip(images, prompts):
            answers.append(
                CaptionFailure("no")
                if len(self.asked) in self.bad
                else WrittenCaption(text=f"{image.getpixel((0, 0))[0]} {prompt}", num_tokens=2, finish_reason="stop")
            )
            self.asked.append((image.getpixel((0, 0)), prompt))
        return answers

    def close(self):
        pass


def job(tmp_path, writer):
    pictures, sampling = Pictures(), Sampling()
    journal = Journal(tmp_path / "j.sqlite", writer=writer.name, revision=writer.revision, sampling=sampling)
    wanted = requests(hashes_of(pictures, Shard()), PROMPTS, journal.written())
    return write_captions(pictures, wanted, PROMPTS, writer, journal, sampling, lambda progress: None), journal


def test_each_caption_of_each_different_picture_is_asked_for_once(tmp_path):
    writer = Shrinking()
    progress, journal = job(tmp_path, writer)
    assert len(writer.asked) == len(set(writer.asked)) == progress.num_captions == 18
    assert {entry.text for entry in journal.entries()} == {f"{pixel[0]} {prompt}" for pixel, prompt in writer.asked}
    again, _ = job(tmp_path, writer)
    assert again.num_captions == 0 and len(writer.asked) == 18


def test_a_picture_that_fails_is_noted_and_not_asked_for_again(tmp_path):
    writer = Shrinking(bad=(3, 7))
    progress, journal = job(tmp_path, writer)
    assert (progress.num_captions, progress.num_failed) == (16, 2)
    assert [entry.reason for entry in journal.entries() if entry.reason] == ["no", "no"]
    job(tmp_path, writer)
    assert len(writer.asked) == 18


def test_a_writer_that_gives_up_ends_the_job_and_what_was_written_stays(tmp_path):
    writer = Shrinking(gives_up_after=7)
    with pytest.raises(WriterFailed, match="nobody answers"):
        job(tmp_path, writer)
    assert len(writer.asked) == 7
    writer.gives_up_after = None
    _, journal = job(tmp_path, writer)
    assert len(writer.asked) == len(set(writer.asked)) == 18 == len(list(journal.entries()))


def test_shards_are_disjoint_and_together_everything_wherever_pictures_stand():
    digests = [f"{number * 2654435761 % 2**32:08x}{'0' * 56}" for number in range(1_000)]
    shards = [{digest for digest in digests if Shard(number, 7).holds(digest)} for number in range(1, 8)]
    assert set.union(*shards) == set(digests) and sum(map(len, shards)) == 1_000
    assert min(map(len, shards)) > 100
    for text in ("0/3", "4/3", "3", "a/b", "-1/3", "1/0"):
        with pytest.raises(UserError, match="--shard"):
            Shard.parse(text)
