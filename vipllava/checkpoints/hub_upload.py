"""A finished model folder onto the Hugging Face Hub, when a user asks for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vipllava.types import CheckpointError


def upload(directory: Path, repository: str, *, private: bool = True) -> str:
    """Upload every file of a folder to a repository, made if it is not there.

    Args:
        directory: of a model; its README.md becomes the page.
        repository: ``owner/name``.
        private: of a repository that is made; weights with terms of use are published on purpose
            only.

    Returns:
        The repository's address.

    Raises:
        CheckpointError: the hub refuses or cannot be reached; the folder stays.
    """
    import huggingface_hub
    from huggingface_hub import errors

    hub: Any = huggingface_hub
    web_error: Any = vars(errors)["HTTPError"]  # of the HTTP client that this release uses
    api = hub.HfApi(endpoint=hub.constants.ENDPOINT)
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(directory))
    except (web_error, OSError, ValueError) as error:
        reason = str(error).strip().split("\n", 1)[0] or type(error).__name__
        raise CheckpointError(
            f"{directory} could not be uploaded to {repository} ({reason}): log in with `hf auth "
            f"login` and a token that may write, then `hf upload {repository} {directory}`; the "
            "folder itself is finished"
        ) from error
    return str(address)
