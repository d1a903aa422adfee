"""Patches on the Hugging Face Hub: pushed when asked, never else; read from there with the suspicion of any file.

    place = patch.push_to_hub("user/dog-to-cat")      # "hub:user/dog-to-cat@COMMIT"
    Patch.load("hub:user/dog-to-cat")

A repository holds one patch, `patch.safetensors`, and its card, `README.md`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, errors, hf_hub_url

from mmneurons.errors import HubError
from mmneurons.patches import file
from mmneurons.patches.patch import HUB, Patch

FILE = "patch.safetensors"
"""Name of the patch in its repository."""
CARD = "README.md"
"""Name of its card there."""
BESIDE = {".gitattributes", CARD, "LICENSE"}
"""Names of files that a repository without a patch may have, to become one with a patch."""
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_UNREACHABLE: tuple[type[Exception], ...] = (
    *(base for base in errors.HfHubHTTPError.__bases__ if issubclass(base, Exception)),
    OSError,
)
"""What a request raises that gets no answer: the base of the HTTP library's errors, whichever one it is."""


def files_of(patch: Patch, repository: str, metrics: Mapping[str, object] | None = None) -> dict[str, bytes]:
    """Return all that `push` uploads, by name: the patch, and the card that is written from it.

    Args:
        patch: The patch.
        repository: The repository's name, `user/name`.
        metrics: Figures that the card states, by name.
    """
    from mmneurons.report.model_card import patch_card

    card = patch_card(patch, f"{HUB}{repository}", metrics or {})
    return {FILE: file.content_of(patch), CARD: card.encode("utf-8", "replace")}


def push(patch: Patch, repository: str, *, private: bool = False, metrics: Mapping[str, object] | None = None) -> str:
    """Upload a patch and its card in one commit, to a repository of the user's that is made if it is not there.

    Args:
        patch: The patch.
        repository: The repository's name, `user/name`.
        private: Make it private; refused where it is there and public.
        metrics: Figures that the card states, by name.

    Returns:
        What `Patch.load` takes to read exactly this commit: `hub:user/name@COMMIT`.

    Raises:
        HubError: the Hub cannot be reached or refuses, or the repository holds something else.
    """
    _check_name(repository)
    contents = files_of(patch, repository, metrics)
    operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
    api = HfApi(library_name="mmneurons")
    with _told(repository):
        _check_free(api, repository, private)
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.create_commit(repository, operations, commit_message=f"Patch {patch.hash[:12]}")
    return f"{HUB}{repository}@{commit.oid}"


def pull(place: str) -> Patch:
    """Read a patch from the Hub, or from the cache where it has been read before and the Hub cannot be reached.

    Args:
        place: `hub:user/name`, or `hub:user/name@REVISION` with a branch, a tag or a commit.

    Returns:
        The patch; its provenance says under `hub` which repository and which commit it was read from.

    Raises:
        HubError: the Hub cannot be reached or refuses, or there is no patch.
        FormatError: what is there is no sound patch.
    """
    repository, _, revision = place.removeprefix(HUB).partition("@")
    _check_name(repository)
    api = HfApi(library_name="mmneurons")
    with _told(repository, revision):
        # Its size is asked first: nobody vouches for what lies there, and a disk is soon full.
        size = _size(api, hf_hub_url(repository, FILE, revision=revision or None, endpoint=api.endpoint))
        if size > file.LARGEST:
            raise HubError(f"{FILE} of {repository} is too large for a patch.", seen=f"It has {size:,} bytes.")
        path = Path(api.hf_hub_download(repository, FILE, revision=revision or None))
    patch = file.read(path)
    # The cache keeps each commit in a folder of its name.
    commit = path.parent.name if _COMMIT.fullmatch(path.parent.name) else revision or None
    return replace(patch, provenance={**patch.provenance, "hub": {"id": repository, "revision": commit}})


def _size(api: HfApi, url: str) -> int:
    """Return the size in bytes of a file on the Hub; 0 where the Hub gives no answer: the cache may have it."""
    try:
        return api.get_hf_file_metadata(url=url).size or 0
    except errors.HfHubHTTPError:
        raise
    except _UNREACHABLE:
        return 0


def _check_name(repository: str) -> None:
    """Refuse what cannot be the name of a repository, before anything is asked."""
    if not _REPOSITORY.fullmatch(repository) or ".." in repository or "--" in repository or len(repository) > 96:
        raise HubError(
            "This is no name of a repository on the Hub.",
            seen=repository,
            fix="Its form is user/name: hub:ana/dog-to-cat",
        )


def _check_free(api: HfApi, repository: str, private: bool) -> None:
    """Refuse a repository that is there and holds something else, such as a model, or is seen by more people."""
    try:
        info = api.model_info(repository)
    except errors.GatedRepoError:
        raise
    except errors.RepositoryNotFoundError:
        return
    names = {one.rfilename for one in info.siblings or ()}
    if FILE not in names and names - BESIDE:
        raise HubError(
            f"{repository} is there already, and holds something else.",
            seen=", ".join(sorted(names - BESIDE)[:5]),
            fix="Push to a repository of another name.",
        )
    if private and not info.private:
        raise HubError(
            f"{repository} is there already, and is public.", fix="Make it private on the Hub first, or name another."
        )


@contextmanager
def _told(repository: str, revision: str = "") -> Iterator[None]:
    """Turn what the Hub answers inside the `with`, or that it does not, into an error of ours."""
    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(
            f"{repository} is gated.", fix=f"Ask for access at {constants.ENDPOINT}/{repository}, then: hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(
            f"{repository} has no revision {revision}.",
            fix=f"Name a branch, a tag or a commit, or none: {HUB}{repository}",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"There is no repository {repository} on the Hub, or it is private.",
            seen=constants.ENDPOINT,
            fix="Check the name; for a private one log in first: hf auth login",
        ) from error
    except errors.LocalEntryNotFoundError as error:  # no answer, and nothing in the cache
        raise _unreachable(error) from error
    except errors.EntryNotFoundError as error:
        raise HubError(
            f"{repository} holds no patch.",
            seen=f"It has no file {FILE}.",
            fix=f"A patch gets there by: mmneurons patch push FILE {repository}",
        ) from error
    except errors.HfHubHTTPError as error:
        raise _refused(repository, error) from error
    except _UNREACHABLE as error:
        raise _unreachable(error) from error


def _refused(repository: str, error: errors.HfHubHTTPError) -> HubError:
    """Return the error for an answer of the Hub that is a refusal."""
    status = error.response.status_code
    if status == 401:
        return HubError("The Hub does not know who you are.", seen=_said(error), fix="Log in first: hf auth login")
    if status == 403:
        return HubError(
            f"You may not write to {repository}.",
            seen=_said(error),
            fix="Take a name of your own, and a token that may write: hf auth login",
        )
    return HubError(f"The Hub refuses {repository}.", seen=_said(error))


def _unreachable(error: Exception) -> HubError:
    """Return the error for a Hub that gives no answer."""
    if constants.HF_HUB_OFFLINE:
        return HubError(
            "The Hub is not asked: this process is to stay offline.",
            seen="HF_HUB_OFFLINE is set, and the cache does not have it.",
            fix="unset HF_HUB_OFFLINE, or give a file.",
        )
    cause = error.__cause__ or error
    return HubError(
        "The Hub cannot be reached.",
        seen=f"{constants.ENDPOINT}: {_said(cause)}",
        fix="Check the network, and HF_ENDPOINT if it is set; or give a file.",
    )


def _said(error: BaseException) -> str:
    """Return the last line of an error that says something: the Hub's own word stands after the address."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
