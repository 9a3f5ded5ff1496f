"""A finished model folder onto the Hugging Face Hub, when a user asks for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vipllava.models.hub_models import web_error
from vipllava.types import CheckpointError, first_line


def upload(directory: Path, repository: str, *, private: bool = True) -> str:
    """Upload every file of a folder to a repository, made if it is not there.

    Args:
        directory: of a model; its README.md becomes the page.
        repository: ``owner/name``.
        private: of a repository that is made.

    Returns:
        The repository's address.

    Raises:
        CheckpointError: the hub refuses or cannot be reached; the folder stays.
    """
    import huggingface_hub

    hub: Any = huggingface_hub
    api = hub.HfApi(endpoint=hub.constants.ENDPOINT)
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(directory))
    except (web_error(), OSError, ValueError) as error:
        raise CheckpointError(
            f"{directory} could not be uploaded to {repository} ({first_line(error)}): log in "
            f"with `hf auth login` and a token that may write, then `hf upload {repository} "
            f"{directory}`; the folder itself is finished"
        ) from error
    return str(address)
