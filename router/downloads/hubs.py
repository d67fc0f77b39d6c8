"""The two hubs: where they list and serve a model's files, and their folders on this machine.

Owns their addresses, the variables of the environment that steer their own tools, and the layout of
their caches, which those tools share. Must not know which files a model needs.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote, urlsplit

import msgspec

from router.downloads.transfer import HubFile, has_digest
from router.downloads.web import Address, NoAnswer, Refused, read_json
from router.errors import EXIT_CONFIG, EXIT_UNAVAILABLE, StartError

_TRUE = ("1", "ON", "YES", "TRUE")


class Listing(NamedTuple):
    """A repository's files as they are at `revision`."""

    revision: str
    files: tuple[HubFile, ...]


class Hub(Protocol):
    """A place that models come from, and the folder on this machine that keeps them."""

    @property
    def site(self) -> str:
        """Its host, for messages."""
        ...

    @property
    def offline(self) -> str:
        """The variable that forbids to ask it, "" if none does."""
        ...

    def home(self, repository: str) -> Path:
        """Where everything of this repository is kept."""
        ...

    def lock(self, repository: str) -> Path:
        """The file that whoever downloads this repository holds."""
        ...

    def snapshot(self, repository: str) -> Path | None:
        """The folder with the model, complete or not, None if there is none."""
        ...

    def listing(self, repository: str) -> Listing:
        """Asks the hub. Raises `StartError`."""
        ...

    def address(self, repository: str, revision: str, name: str) -> Address:
        """Of one file."""
        ...

    def target(self, repository: str, file: HubFile) -> Path:
        """Where the file's content is to be kept."""
        ...

    def has(self, repository: str, file: HubFile) -> bool:
        """Is it there already?"""
        ...

    def publish(self, repository: str, listing: Listing, files: list[HubFile]) -> None:
        """Makes files that are all there the repository's snapshot."""
        ...

    def refusal(self, repository: str, error: Refused) -> StartError:
        """What the status means, and the remedy."""
        ...


class Hubs(NamedTuple):
    """The hubs as this command's environment sets them up."""

    hugging_face: Hub
    modelscope: Hub


def hubs_of(environ: Mapping[str, str]) -> Hubs:
    """By the variables of the hubs' own tools (HF_ENDPOINT, MODELSCOPE_CACHE, ...)."""
    return Hubs(
        HuggingFace(
            endpoint=_endpoint(environ.get("HF_ENDPOINT"), "https://huggingface.co"),
            cache=hub_cache_dir(environ),
            token=_hf_token(environ),
            offline=_first_true(environ, "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"),
        ),
        ModelScope(
            endpoint=_endpoint(
                environ.get("MODELSCOPE_ENDPOINT") or environ.get("MODELSCOPE_DOMAIN"),
                "https://modelscope.cn",
            ),
            cache=Path(environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope").expanduser(),
            token=environ.get("MODELSCOPE_API_TOKEN", "").strip(),
        ),
    )


def hub_cache_dir(environ: Mapping[str, str]) -> Path:
    """Where Hugging Face's tools keep downloads, by their rules."""
    named = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(named).expanduser() if named else _hf_home(environ) / "hub"


@dataclass(frozen=True, slots=True)
class HuggingFace:
    """Hugging Face's hub, or a mirror of it at `endpoint`.

    Layout of its cache: content in blobs/, named by its digest; snapshots/COMMIT/NAME are links
    to it; refs/main holds the commit.
    """

    endpoint: str
    cache: Path
    token: str = field(default="", repr=False)
    offline: str = ""

    @property
    def site(self) -> str:
        return _host(self.endpoint)

    def home(self, repository: str) -> Path:
        return self.cache / f"models--{repository.replace('/', '--')}"

    def lock(self, repository: str) -> Path:
        return self.cache / ".locks" / self.home(repository).name / "router.lock"

    def snapshot(self, repository: str) -> Path | None:
        """The folder of the cached main revision (or of the only one)."""
        home = self.home(repository)
        main = home / "refs" / "main"
        if main.is_file():
            snapshot = home / "snapshots" / main.read_text(encoding="utf-8").strip()
            if snapshot.is_dir():
                return snapshot
        snapshots = sorted(folder for folder in home.glob("snapshots/*") if folder.is_dir())
        return snapshots[0] if len(snapshots) == 1 else None

    def listing(self, repository: str) -> Listing:
        url = f"{self.endpoint}/api/models/{repository}/revision/main?blobs=true"
        answer = _asked(self, repository, Address(url, self._secrets()))
        try:
            info = msgspec.convert(answer, _HfInfo)
            files = tuple(_hub_file(s.rfilename, s.num_bytes, s.digest) for s in info.siblings)
            return Listing(_checked_digest(info.sha), files)
        except ValueError as error:
            raise _strange(self, repository, error) from error

    def address(self, repository: str, revision: str, name: str) -> Address:
        url = f"{self.endpoint}/{repository}/resolve/{revision}/{quote(name)}"
        return Address(url, self._secrets())

    def target(self, repository: str, file: HubFile) -> Path:
        return self.home(repository) / "blobs" / file.digest

    def has(self, repository: str, file: HubFile) -> bool:
        target = self.target(repository, file)
        return target.is_file() and target.stat().st_size == file.num_bytes

    def publish(self, repository: str, listing: Listing, files: list[HubFile]) -> None:
        snapshot = self.home(repository) / "snapshots" / listing.revision
        for file in files:
            link = snapshot / file.name
            link.parent.mkdir(parents=True, exist_ok=True)
            _link(link, self.target(repository, file))
        main = self.home(repository) / "refs" / "main"
        main.parent.mkdir(parents=True, exist_ok=True)
        main.write_text(listing.revision, encoding="utf-8")

    def refusal(self, repository: str, error: Refused) -> StartError:
        if error.reason == "GatedRepo":
            text = (
                f"is gated: accept its terms at {self.site}/{repository}, then set HF_TOKEN to "
                "a token of the account that did (or run 'hf auth login')"
            )
        elif error.status == 401 and self.token and error.reason != "RepoNotFound":
            text = (
                f"cannot be read: {self.site} does not accept the token: renew HF_TOKEN or unset it"
            )
        elif error.status in (401, 404):
            text = (
                f"is not at {self.site}, or is private: check the spelling; a private one needs "
                "HF_TOKEN (or 'hf auth login')"
            )
        elif error.status == 403:
            text = (
                f"may not be read with this token, says {self.site}: give HF_TOKEN that right, or "
                "unset it"
            )
        else:
            text = f"cannot be read: {self.site} answered {error.status}; try again later"
        return StartError(f"model '{repository}' {text}", EXIT_CONFIG)

    def _secrets(self) -> dict[str, str]:
        return {"Authorization": _bearer(self.token, "HF_TOKEN")} if self.token else {}


@dataclass(frozen=True, slots=True)
class ModelScope:
    """ModelScope's hub; its cache holds plain files.

    Its own package is not used: it brings more than it saves, two GETs of a documented API.
    """

    endpoint: str
    cache: Path
    token: str = field(default="", repr=False)
    offline: str = ""

    @property
    def site(self) -> str:
        return _host(self.endpoint)

    def home(self, repository: str) -> Path:
        return self.cache / "models" / repository.replace("/", "--")

    def lock(self, repository: str) -> Path:
        return self.cache / ".lock" / f"router_{self.home(repository).name}.lock"

    def snapshot(self, repository: str) -> Path | None:
        """Also where older versions of its package kept models."""
        owner, _, name = repository.partition("/")
        old_name = name.replace(".", "___")
        places = (
            self._folder(repository),
            self.cache / "models" / owner / old_name,
            self.cache / "hub" / "models" / owner / old_name,
            self.cache / "hub" / owner / name,
        )
        kinds = ("config.json", "**/*.gguf")
        return next((place for place in places for kind in kinds if any(place.glob(kind))), None)

    def listing(self, repository: str) -> Listing:
        url = f"{self._api(repository)}/files?Revision=master&Recursive=True"
        answer = _asked(self, repository, Address(url, self._secrets()))
        try:
            entries = msgspec.convert(answer, _MsAnswer).Data.Files
            files = [_hub_file(e.Path, e.Size, e.Sha256) for e in entries if e.Type != "tree"]
            return Listing("master", tuple(files))
        except ValueError as error:
            raise _strange(self, repository, error) from error

    def address(self, repository: str, revision: str, name: str) -> Address:
        path = quote(name, safe="")
        url = f"{self._api(repository)}?Revision={revision}&FilePath={path}"
        return Address(url, self._secrets())

    def target(self, repository: str, file: HubFile) -> Path:
        return self._folder(repository) / file.name

    def has(self, repository: str, file: HubFile) -> bool:
        """By its hash: the name may stand for the content of an older revision."""
        target = self.target(repository, file)
        if not target.is_file() or target.stat().st_size != file.num_bytes:
            return False
        return has_digest(target, file)

    def publish(self, repository: str, listing: Listing, files: list[HubFile]) -> None:
        """Nothing to do: they are where they belong."""

    def refusal(self, repository: str, error: Refused) -> StartError:
        if error.status in (401, 403, 404):
            text = (
                f"is not at {self.site}, or is private: check the spelling; a private one needs "
                "MODELSCOPE_API_TOKEN"
            )
        else:
            text = f"cannot be read: {self.site} answered {error.status}; try again later"
        return StartError(f"model 'modelscope:{repository}' {text}", EXIT_CONFIG)

    def _folder(self, repository: str) -> Path:
        return self.home(repository) / "snapshots" / "master"

    def _api(self, repository: str) -> str:
        return f"{self.endpoint}/api/v1/models/{repository}/repo"

    def _secrets(self) -> dict[str, str]:
        if not self.token:
            return {}
        bearer = _bearer(self.token, "MODELSCOPE_API_TOKEN")
        return {"Authorization": bearer, "Cookie": f"m_session_id={self.token}"}


def _bearer(token: str, variable: str) -> str:
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise StartError(f"{variable} holds characters that no token has: set it anew", EXIT_CONFIG)
    return f"Bearer {token}"


def unreachable(hub: Hub, repository: str, error: NoAnswer) -> StartError:
    """There is no network, or the hub does not answer."""
    elsewhere = "set HF_ENDPOINT to a mirror, name it modelscope:ORG/NAME, "
    if isinstance(hub, ModelScope):
        elsewhere = "name it without modelscope:, "
    return StartError(
        f"model '{repository}' cannot be fetched from {hub.site} ({error}): check the network and "
        f"its proxy, {elsewhere}or give the path of a folder that holds it",
        EXIT_UNAVAILABLE,
    )


def _asked(hub: Hub, repository: str, address: Address) -> Any:
    try:
        return read_json(address)
    except Refused as error:
        raise hub.refusal(repository, error) from error
    except NoAnswer as error:
        raise unreachable(hub, repository, error) from error


def _strange(hub: Hub, repository: str, error: Exception) -> StartError:
    return StartError(
        f"model '{repository}': {hub.site} does not list its files with sizes and hashes "
        f"({error!r}): fetch them by other means and give the folder's path",
        EXIT_UNAVAILABLE,
    )


class _HfLarge(msgspec.Struct):
    sha256: str
    size: int


class _HfSibling(msgspec.Struct, rename="camel"):
    rfilename: str
    size: int = -1
    blob_id: str = ""
    lfs: _HfLarge | None = None

    @property
    def num_bytes(self) -> int:
        return self.lfs.size if self.lfs else self.size

    @property
    def digest(self) -> str:
        return self.lfs.sha256 if self.lfs else self.blob_id


class _HfInfo(msgspec.Struct):
    sha: str
    siblings: list[_HfSibling]


class _MsFile(msgspec.Struct):
    Path: str
    Type: str
    Size: int
    Sha256: str


class _MsData(msgspec.Struct):
    Files: list[_MsFile]


class _MsAnswer(msgspec.Struct):
    Data: _MsData


def _hub_file(name: str, num_bytes: int, digest: str) -> HubFile:
    if num_bytes < 0:
        raise ValueError(f"{name} has no size")
    return HubFile(_safe(name), num_bytes, _checked_digest(digest))


def _checked_digest(text: str) -> str:
    if len(text) not in (40, 64) or set(text) - set("0123456789abcdef"):
        raise ValueError(f"{text!r} is no digest")
    return text


def _safe(name: str) -> str:
    """A name of a listing becomes a path on this machine."""
    parts = name.split("/")
    if not name or "\0" in name or "\\" in name or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{name!r} is no path inside a repository")
    return name


def _link(link: Path, target: Path) -> None:
    if link.exists():
        return
    with contextlib.suppress(FileNotFoundError):  # a link to nothing
        link.unlink()
    try:
        link.symlink_to(os.path.relpath(target, link.parent))
    except OSError:  # a file system without links
        target.replace(link)


def _host(endpoint: str) -> str:
    return urlsplit(endpoint).hostname or endpoint


def _endpoint(value: str | None, default: str) -> str:
    text = (value or default).strip().rstrip("/")
    return text if "://" in text else f"https://{text}"


def _first_true(environ: Mapping[str, str], *names: str) -> str:
    return next((name for name in names if environ.get(name, "").upper() in _TRUE), "")


def _hf_home(environ: Mapping[str, str]) -> Path:
    cache = environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = environ.get("HF_HOME") or f"{cache}/huggingface"
    return Path(home).expanduser()


def _hf_token(environ: Mapping[str, str]) -> str:
    """HF_TOKEN, or what 'hf auth login' left."""
    named = environ.get("HF_TOKEN") or environ.get("HUGGING_FACE_HUB_TOKEN") or ""
    if named.strip() or _first_true(environ, "HF_HUB_DISABLE_IMPLICIT_TOKEN"):
        return named.strip()
    file = Path(environ.get("HF_TOKEN_PATH") or _hf_home(environ) / "token").expanduser()
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
