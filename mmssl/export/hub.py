"""An exported folder to the Hugging Face hub."""

from pathlib import Path

from mmssl.export.to_open_clip import CONFIG, rename
from mmssl.types import UserError


def push(folder: Path, name: str, private: bool = False) -> str:
    """Upload a folder as USER/MODEL, made if it does not exist; returns its address.

    Raises:
        UserError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if (folder / CONFIG).is_file():
        rename(folder, name)
    api = HfApi()
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(folder_path=str(folder), repo_id=name, commit_message="Upload by mmssl")
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder} could not be pushed to {name}: {reason}; log in with: hf auth login") from None
    return str(address)
