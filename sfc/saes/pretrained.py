"""Pretrained dictionaries that SAELens knows how to fetch from a model hub."""

from pathlib import Path

from sfc.errors import UserError


def fetch_pretrained(name: str, folder: Path) -> None:
    """Fetch the dictionary `release/sae_id` and write it into `folder` in SAELens' format.

    The release is one of SAELens' list, or a hub repository `owner/name`. SAELens converts it from the form in which
    it was published, and folds the release's scaling factor into the weights.

    Raises:
        UserError: SAELens cannot fetch it.
    """
    from sae_lens import SAE
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    parts = name.split("/")
    owner = 1 if parts[0] in get_pretrained_saes_directory() else 2
    release, sae_id = "/".join(parts[:owner]), "/".join(parts[owner:])
    if not sae_id:
        raise UserError(f"saes.source: {name} is neither a folder nor a dictionary of a release that SAELens knows")
    try:
        SAE.from_pretrained(release, sae_id).save_model(folder)
    except Exception as error:  # whatever its many loaders and the network raise, the user must hear of it
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"saes.source: SAELens cannot fetch {sae_id!r} of {release!r} ({reason})") from error
