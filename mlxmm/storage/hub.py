"""The Hugging Face Hub: download and upload models. This is the only file that imports `huggingface_hub`."""

import functools
import re
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from mlxmm.errors import UserError
from mlxmm.storage.atomic import follow_link
from mlxmm.storage.disk import read_text
from mlxmm.storage.retries import reading, writing
from mlxmm.terminal import say

NOT_CACHED = "it is not in the cache, and the Hub is not asked (no network, or offline by a setting)"
# Of transformers and mlx-lm, and of a checkpoint.
WEIGHTS = ["model*.safetensors", "weights.safetensors", "frozen.safetensors"]
SETTINGS = ["*.json", "*.txt", "*.model", "*.jinja"]
NEEDED = [*WEIGHTS, *SETTINGS]  # no other frameworks' weights
WRITTEN = [*NEEDED, "README.md", "mlx_vlm_*.py"]  # of an exported model: nothing else is uploaded
LOOK_UP_SECONDS, LOOK_UP_PAUSE = 2.0, 0.9  # of the Hub's name: one look-up may fail, and offline is for good
TORCH_WEIGHTS = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]  # read without running what they may hold


def local_folder(path_or_id: str | Path, revision: str | None = None) -> Path:
    """`path_or_id` if it is a folder, else a snapshot of that Hub repository, from the cache if offline.

    `user/name@revision` names a commit, tag, branch or pull request (refs/pr/1); so does `revision`. Raises `UserError`
    if it is neither a folder nor to be had.
    """
    return _found(path_or_id, revision, _snapshot)


def settings_folder(path_or_id: str | Path, *, offline: bool = False) -> Path:
    """Like `local_folder`, but only settings and tokenizer are fetched: a few MB. `offline` takes the cache's alone."""
    from huggingface_hub import snapshot_download

    def fetch(name: str, revision: str | None) -> Path:
        return Path(snapshot_download(name, revision=revision, allow_patterns=SETTINGS, local_files_only=offline))

    return _found(path_or_id, None, fetch)


def _found(path_or_id: str | Path, revision: str | None, fetch: Callable[[str, str | None], Path]) -> Path:
    """`path_or_id` if it is a folder, else what `fetch` gets of that repository and revision. Raises `UserError`."""
    if (path := follow_link(Path(path_or_id))).is_dir():
        return path
    if not is_hub_id(path_or_id):
        raise UserError(f"{path_or_id} is not there: neither a folder nor a Hub id (user/name, user/name@revision)")
    name, revision = split_revision(str(path_or_id), revision)
    go_offline_without_network()
    try:
        return reading(lambda: fetch(name, revision))
    except Exception as error:  # the client and the network raise a dozen kinds
        line = one_line(error)
        why = NOT_CACHED if line.startswith("Cannot find an appropriate cached snapshot") else line
        raise UserError(f"{path_or_id} is no folder here, and not to be had from the Hub: {why}") from error


def _snapshot(name: str, revision: str | None) -> Path:
    """PyTorch's weights are fetched only where a repository has no others: many have both."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(name, revision=revision, allow_patterns=NEEDED))
    if any(path for pattern in WEIGHTS for path in folder.glob(pattern)):
        return folder
    return Path(snapshot_download(name, revision=revision, allow_patterns=NEEDED + TORCH_WEIGHTS))


def is_hub_id(path_or_id: str | Path) -> bool:
    """Whether this is the name of a Hub repository (user/name, user/name@revision) and no local file or folder."""
    name = str(path_or_id).partition("@")[0]
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(path_or_id).exists()


def split_revision(hub_id: str, revision: str | None = None) -> tuple[str, str | None]:
    """The name of a repository and the revision: that of `hub_id`, user/name@revision, or else `revision`.

    Raises `UserError` if there are two.
    """
    name, at, own_revision = hub_id.partition("@")
    if at and not own_revision:
        raise UserError(f"{hub_id} names no revision after the @: a commit, tag, branch or pull request (refs/pr/1)")
    if own_revision and revision is not None:
        raise UserError(f"{hub_id} names a revision already: leave out {revision}")
    return name, own_revision or revision


def check_upload(repo_id: str) -> None:
    """Raise `UserError` if `repo_id` is not a repository name or there is no token. Makes no network calls."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{repo_id!r} is not a repository name, user/name: {one_line(error)}") from None
    if repo_id.count("/") != 1:
        raise UserError(f"{repo_id!r} is not a repository name: it needs a user, user/name")
    if get_token() is None:
        raise UserError(f"nothing can be uploaded to {repo_id} without a token: hf auth login, or set HF_TOKEN")


def upload(folder: Path, repo_id: str, *, public: bool = False) -> str:
    """Upload the exported model in `folder` to the Hub model `repo_id` in one commit; return the commit's URL.

    Only files of an export are sent: nothing hidden, in folders of their own, or behind links. A missing repository is
    created; an existing one keeps its visibility. Raises `UserError` if the upload fails.
    """
    check_upload(repo_id)
    try:
        return writing(lambda: _commit_model(folder, repo_id, public=public))
    except Exception as error:  # the client and the network raise a dozen kinds
        again = f"hf upload {repo_id} {folder} . {'' if public else '--private'}".strip()
        raise UserError(f"not uploaded to {repo_id}: {one_line(error)}; to try again: {again}") from error


def written_files(folder: Path) -> list[Path]:
    """The files in `folder` that make an exported model."""
    found = {path for pattern in WRITTEN for path in folder.glob(pattern) if not path.name.startswith(".")}
    return sorted(path for path in found if path.is_file() and not path.is_symlink())


def _commit_model(folder: Path, repo_id: str, *, public: bool) -> str:
    """One commit of our own: `upload_folder` splits large files over several. Where all files are there already, as
    after a commit whose answer was lost, the client makes none, and returns the newest."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    api.create_repo(repo_id, private=not public, exist_ok=True)
    added = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in written_files(folder)]
    return api.create_commit(repo_id, added, commit_message="A captioner that mlxmm trained").commit_url


def dataset_head(repo_id: str) -> str | None:
    """The newest commit of the data set `repo_id`; None if there is no such repository, or the token cannot see it."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return HfApi().repo_info(repo_id, repo_type="dataset").sha
    except RepositoryNotFoundError:
        return None


def dataset_commit(repo_id: str, revision: str | None = None) -> str | None:
    """The commit that a revision of the data set `repo_id` names; None if the Hub does not answer."""
    from huggingface_hub import HfApi

    try:
        return reading(lambda: HfApi().repo_info(repo_id, repo_type="dataset", revision=revision)).sha
    except Exception:  # the client and the network raise a dozen kinds
        return None


def dataset_card(repo_id: str, revision: str | None = None) -> str:
    """The card of the data set `repo_id`; empty if it has none, or is not to be had."""
    from huggingface_hub import hf_hub_download

    def download() -> str:
        return hf_hub_download(repo_id, "README.md", repo_type="dataset", revision=revision)

    try:
        return read_text(Path(reading(download)))
    except Exception:  # the client and the network raise a dozen kinds
        return ""


def create_dataset(repo_id: str, *, public: bool) -> None:
    """Create the repository of a data set; one that exists keeps its visibility."""
    from huggingface_hub import HfApi

    HfApi().create_repo(repo_id, repo_type="dataset", private=not public, exist_ok=True)


def dataset_files(repo_id: str, commit: str) -> list[str]:
    """The paths of all files of a data set at a commit."""
    from huggingface_hub import HfApi

    return HfApi().list_repo_files(repo_id, repo_type="dataset", revision=commit)


def download_dataset_file(repo_id: str, path: str, commit: str, folder: Path) -> Path:
    """Download a file of a data set at a commit into `folder`."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo_id, path, repo_type="dataset", revision=commit, local_dir=folder))


def commit_dataset(repo_id: str, files: Mapping[str, Path | bytes], message: str, *, parent: str) -> tuple[str, str]:
    """Add `files`, by their paths there, to a data set in one commit upon the commit `parent`; return it and its URL.

    The Hub refuses it with 412 if `parent` is not the newest commit.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    added = [CommitOperationAdd(path, str(file) if isinstance(file, Path) else file) for path, file in files.items()]
    info = HfApi().create_commit(
        repo_id, added, commit_message=message, repo_type="dataset", revision="main", parent_commit=parent
    )
    return info.oid, info.commit_url


def token_rights() -> tuple[str, list[str]]:
    """The role of the token ("read", "write", "fineGrained") and the names that it belongs to: user, organizations."""
    from huggingface_hub import HfApi

    found = HfApi().whoami()
    return found["auth"]["accessToken"]["role"], [found["name"], *(one["name"] for one in found.get("orgs", ()))]


def endpoint() -> str:
    """The address of the Hub."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def is_offline() -> bool:
    """Whether everything is taken from the cache: HF_HUB_OFFLINE."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def has_token() -> bool:
    """Whether there is a token, of `hf auth login` or HF_TOKEN. It may have expired."""
    from huggingface_hub import get_token

    return get_token() is not None


def downloads_folder() -> Path:
    """The cache of what was downloaded from the Hub."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


@functools.cache
def go_offline_without_network() -> None:
    """Where the Hub's name is not known here, take everything from the cache: its clients try for minutes else.

    Asked once, as downloads begin. A proxy looks names up itself, so with one nothing is asked.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or getproxies():
        return
    try:
        _look_up(host := urlsplit(endpoint()).hostname)
    except OSError as error:
        say(f"no network: {host} is not found ({error.strerror}); only what was downloaded before is used")
        constants.HF_HUB_OFFLINE = True


def _look_up(host: str | None) -> None:
    """Ask for the address of `host`, three times where the answer comes at once. Raises `OSError` if none is found."""
    end = time.monotonic() + LOOK_UP_SECONDS
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError:
            if time.monotonic() + LOOK_UP_PAUSE > end:
                raise
            time.sleep(LOOK_UP_PAUSE)


def require_answer(timeout: float) -> None:
    """Ask the Hub for its first page. Raises `UserError` if no answer comes within `timeout` seconds."""
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint(), timeout=timeout)
    except Exception as error:  # the client has a dozen kinds
        raise UserError(f"{endpoint()} does not answer: {one_line(error)}") from None


def card_metadata(**data) -> str:
    """The YAML block that a model card begins with, of fields of `huggingface_hub.ModelCardData`."""
    from huggingface_hub import ModelCardData

    return f"---\n{ModelCardData(**data)}\n---"


def dataset_metadata(**data) -> str:
    """The YAML block that a data set's card begins with, of fields of `huggingface_hub.DatasetCardData`."""
    from huggingface_hub import DatasetCardData

    return f"---\n{DatasetCardData(**data)}\n---"


def card_configs(folder: Path) -> list[dict]:
    """The configurations in the card of a data set's folder; empty if there is no card, or none in it.

    Raises `UserError` where the card cannot be read.
    """
    path = folder / "README.md"
    try:
        return configs_of(split_card(read_text(path))[0]) if path.is_file() else []
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None


def configs_of(metadata: dict) -> list[dict]:
    """The configurations in the metadata of a card. Raises `UserError` where they are no list of names and more."""
    configs = metadata.get("configs") or []
    named = isinstance(configs, list) and all(isinstance(one, dict) for one in configs)
    if not named or not all(isinstance(one.get("config_name"), str) for one in configs):
        raise UserError('"configs" in the card of a data set is no list of configurations with a config_name each')
    return configs


def split_card(text: str) -> tuple[dict, str]:
    """The metadata of a card and what follows them; a text without metadata has none. Raises `UserError`."""
    from huggingface_hub import DatasetCard

    if not text.startswith("---"):
        return {}, text
    try:
        card = DatasetCard(text, ignore_metadata_errors=True)
        return card.data.to_dict(), card.text
    except Exception as error:  # of YAML and the client, for whatever people write
        raise UserError(f"the metadata of a card cannot be read: {one_line(error)}") from None


def one_line(error: Exception) -> str:
    """The message of `error` on one line, without the request ID."""
    lines = [re.sub(r"\(Request ID: .*?\)", "", line).strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if line) or type(error).__name__
