"""Where a model's files are: bundled with the package, in a local folder, or on the Hugging Face hub."""

import os
import re
from pathlib import Path

from .errors import CheckpointError, ConfigError

BUNDLED = {"mini-llada": Path(__file__).parent / "models" / "mini-llada"}

# All that is ever downloaded: settings, weights as safetensors, and tokenizers. No code, no pickles.
ALLOWED_FILES = [
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
]

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def model_folder(path_or_repo: str | os.PathLike, revision: str | None = None) -> Path:
    """The local folder with the files of a model, downloaded first where they are not here yet.

    path_or_repo: "mini-llada" (bundled), a folder, or a Hugging Face id such as "GSAI-ML/LLaDA-8B-Instruct". A folder
        goes before an id of the same spelling.
    revision: branch, tag or commit of a Hugging Face id; None is its main branch.

    Raises CheckpointError where there is no such model, ConfigError for a wrong type or a revision of a local folder.
    """
    if not isinstance(path_or_repo, str | os.PathLike):
        raise ConfigError(f"path_or_repo = {path_or_repo!r} is not allowed: it must be a str or a path")
    if not isinstance(revision, str | None):
        raise ConfigError(f"revision = {revision!r} is not allowed: it must be a str or None")
    name = os.fspath(path_or_repo)
    folder = BUNDLED.get(path_or_repo) or Path(name).expanduser()
    if name and folder.is_dir():
        if revision is not None:
            raise ConfigError(f"revision = {revision!r} is not allowed: {name} is a local folder, which has none")
        return folder
    if name and folder.exists():
        raise CheckpointError(f"{name} is a file; give the folder that holds config.json and the safetensors")
    if isinstance(path_or_repo, str) and _REPO_ID.fullmatch(name):
        return _download(name, revision)
    raise CheckpointError(
        f"model {name!r} does not exist: it is no folder, no Hugging Face id (owner/name) and no bundled model "
        f"({', '.join(BUNDLED)})"
    )


def _download(repo: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub import constants, errors

    at = repo if revision is None else f"{repo} at revision {revision!r}"
    try:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=ALLOWED_FILES))
    except errors.GatedRepoError:
        message = f"{repo} is gated: accept its terms on huggingface.co, then log in (hf auth login)"
        raise CheckpointError(message) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{repo} is neither a local folder nor a Hugging Face repository you can read (private ones need a login)"
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{repo} has no revision {revision!r}") from None
    except errors.LocalEntryNotFoundError:
        raise CheckpointError(
            f"{at} is not a local folder, is not in the cache {constants.HF_HUB_CACHE}, and could not be downloaded: "
            "no connection to Hugging Face, or HF_HUB_OFFLINE is set"
        ) from None
    except (errors.HFValidationError, errors.HfHubHTTPError, OSError) as e:
        raise CheckpointError(f"{at} could not be downloaded: {e}") from e
