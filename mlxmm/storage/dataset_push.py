"""A folder of captions (`mlxmm/export/dataset.py`) on the Hub: private, in one commit, and never over another.

`Dataset.push_to_hub` is not used: it deletes the files of a split that it did not write, takes `private=None` for
public, and does not repeat what failed. One commit of our own files, upon the commit that we looked at, is all or
nothing.
"""

import tempfile
from pathlib import Path

from mlxmm.errors import UserError
from mlxmm.storage import hub
from mlxmm.storage.atomic import sha256
from mlxmm.storage.disk import read_text
from mlxmm.storage.retries import causes, status, writing

DATA = (".parquet", ".csv", ".json", ".jsonl", ".arrow", ".zip", ".tar")
CONFIG_SECTION = "## Configuration"  # begins what a card says about one configuration


def push_dataset(folder: Path, repo_id: str, config_name: str, *, public: bool = False) -> str:
    """Add the configuration in `folder`, and what was dropped from it, to the data set `repo_id`; return its URL.

    A missing repository is created, private unless `public`; one that exists keeps its visibility and everything in it.
    Afterwards the files are read back, and their SHA-256 compared. If these files are there already, nothing is done:
    a push that was cut off may be repeated. Raises `UserError` if the configuration is there with other files, or the
    Hub refuses.
    """
    hub.check_upload(repo_id)
    names = [config["config_name"] for config in hub.card_configs(folder)]
    if config_name not in names:
        raise UserError(f"{folder} holds {', '.join(names) or 'no configuration'}, and not {config_name!r}")
    try:
        return writing(lambda: _push(folder, repo_id, names, public=public))
    except UserError:
        raise
    except Exception as error:  # the client and the network raise a dozen kinds
        raise UserError(f"not pushed to {repo_id}: {_reason(error, repo_id)}") from error


def _push(folder: Path, repo_id: str, names: list[str], *, public: bool) -> str:
    head = hub.dataset_head(repo_id)
    if head is None:
        hub.create_dataset(repo_id, public=public)
        head = hub.dataset_head(repo_id)
    files = {path.relative_to(folder).as_posix(): path for name in names for path in _shards(folder / name)}
    card, remote = "", hub.dataset_files(repo_id, head)
    if "README.md" in remote:
        card = _read(repo_id, "README.md", head)
    if _is_taken(names, card, remote, repo_id):
        if not _is_there(files, repo_id, head, remote):
            raise UserError(
                f"{repo_id} has a configuration {names[0]!r} already: write these captions under another name, "
                "as refresh-2"
            )
        return f"{hub.endpoint()}/datasets/{repo_id}/tree/{head}"
    merged = merge_cards(card, read_text(folder / "README.md"))
    message = f"Captions: configuration {names[0]}"
    commit, url = hub.commit_dataset(repo_id, files | {"README.md": merged.encode()}, message, parent=head)
    if not _is_there(files, repo_id, commit, list(files)):
        raise UserError(f"{repo_id} has other files at {commit} than were pushed: look at {url}")
    return url


def _shards(folder: Path) -> list[Path]:
    """The files of a configuration: no links, which may name anything on this machine."""
    found = [] if folder.is_symlink() else sorted(folder.glob("*.parquet"))
    return [path for path in found if path.is_file() and not path.is_symlink()]


def _is_taken(names: list[str], card: str, remote: list[str], repo_id: str) -> bool:
    """Whether a configuration of this name is there. Raises `UserError` if there are data of another layout."""
    configs = [config["config_name"] for config in hub.configs_of(hub.split_card(card)[0])]
    if not configs and any(path.endswith(DATA) for path in remote):
        raise UserError(f"{repo_id} holds data that its card does not name: push to another repository")
    return bool(set(names) & set(configs)) or any(
        path.startswith(tuple(f"{name}/" for name in names)) for path in remote
    )


def _is_there(files: dict[str, Path], repo_id: str, commit: str, remote: list[str]) -> bool:
    """Whether these files, read back from the Hub, have the same SHA-256."""
    return files.keys() <= set(remote) and all(_hash(repo_id, path, commit) == sha256(files[path]) for path in files)


def _hash(repo_id: str, path: str, commit: str) -> str:
    with tempfile.TemporaryDirectory() as folder:  # one file at a time: a shard of pictures is large
        return sha256(hub.download_dataset_file(repo_id, path, commit, Path(folder)))


def _read(repo_id: str, path: str, commit: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        return read_text(hub.download_dataset_file(repo_id, path, commit, Path(folder)))


def merge_cards(old: str, new: str) -> str:
    """The card `old` with the configurations of `new`, and what `new` says about them, added to it."""
    if not old:
        return new
    (facts, text), (added, added_text) = hub.split_card(old), hub.split_card(new)
    configs = hub.configs_of(facts)
    facts.pop("configs", None)
    for config in added.pop("configs"):
        configs.append({name: value for name, value in config.items() if name != "default" or not configs})
    for name, value in added.items():
        both = isinstance(value, list) and isinstance(facts.get(name, []), list)
        facts[name] = list(dict.fromkeys([*facts.get(name, []), *value])) if both else facts.get(name, value)
    section = added_text[added_text.find(CONFIG_SECTION) :]
    return "\n".join([hub.dataset_metadata(**facts, configs=configs), f"{text.rstrip()}\n", section])


def _reason(error: BaseException, repo_id: str) -> str:
    """Why the Hub refused, and what to do."""
    refusal = next((one for one in causes(error) if status(one) is not None), None)
    if refusal is None:
        return hub.one_line(error)
    if status(refusal) == 401:
        return "the token is not valid: hf auth login, or set HF_TOKEN"
    said = f"the Hub answered {status(refusal)}: {getattr(refusal, 'server_message', None) or hub.one_line(refusal)}"
    return (_missing_right(repo_id) if status(refusal) == 403 else None) or said


def _missing_right(repo_id: str) -> str | None:
    """Why this token may not write to `repo_id`; None if it looks as if it might."""
    try:
        role, names = hub.token_rights()
    except Exception:  # then the Hub's own words have to do
        return None
    if role == "read":
        return "the token may only read: hf auth login with a token that may write"
    owner = repo_id.split("/")[0]
    return None if owner in names else f"{owner} is not yours: this token belongs to {', '.join(names)}"
