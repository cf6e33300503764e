"""An exported folder to the Hugging Face hub."""

from pathlib import Path

from mmssl.apps.export.to_open_clip import CONFIG, rename
from mmssl.errors import UserError


def push(folder: Path, name: str, private: bool = False) -> str:
    """Upload a folder as USER/MODEL, made if it does not exist; returns its address. The folder stays as it was.

    Raises:
        UserError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    named = (folder / CONFIG).is_file()
    api = HfApi()
    try:
        if named:
            rename(folder, name)
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(folder_path=str(folder), repo_id=name, commit_message="Upload by mmssl")
    except Exception as error:  # what goes wrong in a network has no class of its own
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder} is written, but could not be pushed to {name}: {reason}; log in with: hf auth login"
        ) from None
    finally:
        if named:
            rename(folder, str(folder.resolve()))
    return str(address)
