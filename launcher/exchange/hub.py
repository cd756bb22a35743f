"""Upload an export to the Hugging Face hub, and download a folder of weights from it.

The token is that of the environment (HF_TOKEN) or of `hf auth login`. huggingface_hub reads it; it is in no argument,
no file and no message of ours. HF_ENDPOINT and HF_HUB_OFFLINE have effect as in huggingface_hub.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headway.launcher.base import console
from headway.launcher.base.errors import HeadwayError, NoInputError, SpecError, printable
from headway.model.huggingface import folder as hf

SCHEME = "hf://"
LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token with write access"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,254}")
_OF_A_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
_REPLACED = ("model*.safetensors", hf.INDEX)
"""Files of an earlier export that a new one deletes: shards that it does not have."""


class HubError(HeadwayError):
    """The hub cannot be reached or refuses."""

    exit_code = 74


@dataclass(frozen=True, kw_only=True)
class Repository:
    """A repository of a model on the hub. `revision`: a branch, tag or commit; None for the main branch."""

    name: str  # OWNER/NAME
    revision: str | None = None

    def __str__(self) -> str:
        return f"{SCHEME}{self.name}" + (f"@{self.revision}" if self.revision else "")


def is_remote(source: Path | str) -> bool:
    """Whether it names a repository of the hub. A Path holds `hf://` as `hf:/`."""
    return str(source).startswith("hf:/")


def repository(reference: Path | str, *, option: str) -> Repository:
    """The repository that `OWNER/NAME` or `hf://OWNER/NAME[@REVISION]` names. Raises SpecError for another form."""
    name, at, revision = re.sub("^hf:/+", "", str(reference)).partition("@")
    shown = printable(str(reference), 200)
    if name.partition("/")[0] in ("datasets", "spaces"):
        raise SpecError(f"{option}: {shown} is no repository of a model; name one as OWNER/NAME")
    if _NAME.fullmatch(name) is None or (at and _REVISION.fullmatch(revision) is None):
        raise SpecError(
            f"{option}: {shown} is no name of a repository; use OWNER/NAME, such as {SCHEME}your-name/your-model"
            + ("@main" if at else "")
        )
    return Repository(name=name, revision=revision or None)


class Hub:
    """The hub as huggingface_hub reaches it. Raises HubError if the package is missing."""

    def __init__(self) -> None:
        try:
            self._library: Any = importlib.import_module("huggingface_hub")
            self._known: Any = importlib.import_module("huggingface_hub.errors")
        except ImportError as e:
            raise HubError(
                f"huggingface_hub cannot be imported ({printable(str(e), 300)}); install it with "
                "`pip install 'headway[hf]'`"
            ) from e
        importlib.import_module("huggingface_hub.utils").disable_progress_bars()
        endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
        self._api: Any = self._library.HfApi(endpoint=endpoint, library_name="headway")

    # ------------------------------------------------------------ upload

    def check_push(self, repo: Repository, *, public: bool) -> None:
        """Check that an upload can succeed, before work is done for it.

        Raises HubError if there is no token, the hub does not accept it or cannot be reached, or the repository exists
        and is visible to others than asked for.
        """
        if self._library.get_token() is None:
            raise HubError(f"--push: there is no token of the hub; {LOGIN}")
        with self._errors(f"--push {repo.name}"):
            self._api.whoami()
            private = self._is_private(repo)
        if private is False and not public:
            raise HubError(
                f"--push: {repo.name} exists and is public, so that everybody would see these weights; name another "
                "repository, or add --public"
            )
        if private and public:
            raise HubError(
                f"--push: {repo.name} exists and is private; leave out --public, or change it in the settings of the "
                "repository on the hub"
            )

    def _is_private(self, repo: Repository) -> bool | None:
        """None if the repository does not exist."""
        try:
            return bool(self._api.model_info(repo.name).private)
        except self._known.RepositoryNotFoundError:
            return None

    def push(self, folder: Path, repo: Repository, *, public: bool, message: str) -> str:
        """Upload the files of `folder` as one commit. A new repository is private unless `public`. Returns its URL.

        Shards of an earlier export that this one does not have are deleted. Raises HubError; then the folder is kept,
        and the message names the command that uploads it.
        """
        again = f"hf upload {repo.name} {folder} --repo-type model" + ("" if public else " --private")
        with (
            self._errors(f"--push {repo.name}", then=f". {folder} is complete: `{again}` uploads it"),
            console.progress(f"upload to {repo.name}", lines=False),
        ):
            url = self._api.create_repo(repo.name, private=not public, exist_ok=True)
            self._api.upload_folder(
                repo_id=repo.name, folder_path=folder, commit_message=message, delete_patterns=list(_REPLACED)
            )
        return str(url)

    # ------------------------------------------------------------ download

    @contextlib.contextmanager
    def downloaded(self, repo: Repository, near: Path) -> Iterator[tuple[Path, Repository]]:
        """A temporary folder beside `near` with the weights of a repository, and its commit.

        Only config.json, safetensors and tokenizer.json at the top of the repository are fetched, no code and no
        pickles. Raises NoInputError if there is no such repository, HubError if the hub cannot be reached or refuses,
        WeightsError if it has no safetensors.
        """
        near.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=near.parent, prefix=f".{near.name}.download-") as temporary:
            with self._errors(str(repo)):
                info = self._api.model_info(repo.name, revision=repo.revision)
                names = [file.rfilename for file in info.siblings or []]
                shards = [name for name in names if hf.SHARD.fullmatch(name)]
                if not shards:
                    raise hf.WeightsError(
                        f"{repo}: has no safetensors; use a repository that has them, or ask its author for them"
                    )
                wanted = [*shards, *(name for name in names if name in (hf.CONFIG, hf.INDEX, hf.TOKENIZER))]
                with console.progress(f"download {repo.name}", lines=False):
                    self._api.snapshot_download(
                        repo.name, revision=info.sha, local_dir=temporary, allow_patterns=wanted
                    )
            yield Path(temporary), Repository(name=repo.name, revision=info.sha)

    # ------------------------------------------------------------ errors

    @contextlib.contextmanager
    def _errors(self, what: str, *, then: str = "") -> Iterator[None]:
        """Raise errors of the library as ours, without the token. `then`: end of the message."""
        try:
            yield
        except (HeadwayError, hf.WeightsError):
            raise
        except Exception as e:  # whatever the library and its transport raise
            if getattr(e, "errno", None) in _OF_A_DISK:
                raise
            found = self._meaning(e, what)
            raise type(found)(f"{found}{then}") from None

    def _meaning(self, error: Exception, what: str) -> HeadwayError:
        errors = self._known
        hides = isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception)
        reason = error.__cause__ if hides else error
        status = getattr(getattr(reason, "response", None), "status_code", None)
        if isinstance(reason, errors.OfflineModeIsEnabled):
            return HubError(f"{what}: HF_HUB_OFFLINE is set, so the hub is not asked; unset it")
        if isinstance(error, errors.RevisionNotFoundError):
            return NoInputError(f"{what}: the repository has no such revision; name a branch, tag or commit of it")
        if isinstance(error, errors.GatedRepoError):
            return HubError(f"{what}: the repository asks for an agreement; accept it on the hub, and {LOGIN}")
        if status == 401 and not isinstance(error, errors.RepositoryNotFoundError):
            return HubError(f"{what}: the hub does not accept the token (status 401); {LOGIN}")
        if isinstance(error, errors.RepositoryNotFoundError):
            return NoInputError(
                f"{what}: the hub has no such repository, or it is private to others; check OWNER/NAME, and for a "
                f"private one {LOGIN}"
            )
        if status == 403:
            return HubError(
                f"{what}: the token may not do this (status 403); use one with write access to this owner, or name a "
                "repository of yours"
            )
        text = printable(self._without_token(str(reason) or type(reason).__name__), 300)
        if status is not None:
            return HubError(f"{what}: the hub answers with status {status} ({text}); try again later")
        if not isinstance(reason, OSError):  # as errors of the network are
            return HubError(
                f"{what}: huggingface_hub failed ({type(reason).__name__}: {text}); use another version of it, or "
                "report this"
            )
        return HubError(
            f"{what}: {self._api.endpoint} cannot be reached ({type(reason).__name__}: {text}); check the network, the "
            "proxy and HF_ENDPOINT"
        )

    def _without_token(self, text: str) -> str:
        token = self._library.get_token()
        return text.replace(token, "***") if token else text
