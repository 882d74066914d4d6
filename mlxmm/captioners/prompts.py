"""Prompts with ids: what a writer is asked, under a name that goes into the data set."""

from mlxmm.errors import UserError

PROMPTS = {
    "describe": "Describe this picture in one sentence.",
    "short": "Write a short caption of this picture.",
    "objects": "Name what is in this picture, and where, in one sentence.",
    "action": "Say in one sentence what is happening in this picture.",
    "alt": "Write alternative text of this picture for somebody who cannot see it, in one sentence.",
    "detail": "Describe this picture in detail.",
    "none": "",  # for captioners that read no prompt
}


def find_prompts(ids: tuple[str, ...], own: tuple[str, ...] = ()) -> dict[str, str]:
    """The prompts by their ids, in this order; `own` are more of them, written id=text. Raises `UserError`."""
    known = PROMPTS | dict(_own_prompt(text) for text in own)
    if unknown := [name for name in ids if name not in known]:
        raise UserError(f"there is no prompt {unknown[0]!r}; there are {', '.join(known)}")
    if not ids or len(set(ids)) < len(ids):
        raise UserError("name at least one prompt, and each only once")
    return {name: known[name] for name in ids}


def _own_prompt(text: str) -> tuple[str, str]:
    name, equals, prompt = text.partition("=")
    if not equals or not name.isidentifier():
        raise UserError(f"a prompt of your own is written id=text; this is {text!r}")
    return name, prompt


def first_sentence(text: str) -> str:
    """The text up to its first full stop that ends a sentence."""
    head, stop, _ = text.strip().partition(". ")
    return f"{head}." if stop else head
