"""Hugging Face Hub errors as one sentence: repository, file, cause, remedy.

huggingface_hub raises some errors itself and wraps others, and transformers wraps them again, so
the cause is found by walking the exception chain. The HTTP client differs between versions of
huggingface_hub, so its errors are recognised by module name.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from huggingface_hub import constants, get_token, try_to_load_from_cache
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sdrpn.io.plurals import counted

HTTP_CLIENTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "ssl")
STATUS_PAGE = "https://status.huggingface.co"
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
LOG_IN_AGAIN = "log in again with `hf auth login`, or correct or unset HF_TOKEN"
NETWORK = "check the network connection, HTTPS_PROXY and HF_ENDPOINT"

_IN_CACHE = re.compile(r"(model|dataset)s--(?P<repo>.+)")


class HubError(OSError):
    """A refused or failed download, with its cause and remedy in the message."""


class HubFileNotFound(HubError, FileNotFoundError):
    """The repository does not exist or is hidden, or the Hub is offline and the file not cached."""


def explain(
    error: BaseException,
    repo: str,
    file: str | None = None,
    *,
    repo_type: str = "model",
    revision: str | None = None,
) -> str | None:
    """Explain why a file of a repository could not be fetched, and what to do about it.

    Args:
        error: Exception raised by huggingface_hub, datasets or transformers.
        repo: Repository id.
        file: File of the repository; by default the one that the failed request names.
        repo_type: `model` or `dataset`.
        revision: As given by the user.

    Returns:
        One sentence, or None if the error does not come from the Hub.
    """
    found = cause(error, repo, repo_type=repo_type, revision=revision)
    if found is None:
        return None
    file = file or next((name for one in _chain(error) if (name := _file(one))), None)
    return f"cannot fetch {file} of {repo}: {found}" if file else f"cannot fetch {repo}: {found}"


def cause(
    error: BaseException, repo: str, *, repo_type: str = "model", revision: str | None = None
) -> str | None:
    """Return the cause and remedy of `explain`, without repository and file."""
    found = (_cause(one, repo, repo_type, revision) for one in _chain(error))
    return next((sentence for sentence in found if sentence), None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Iterate over an exception and its causes, outermost first."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or (
            None if current.__suppress_context__ else current.__context__
        )


def _cause(error: BaseException, repo: str, repo_type: str, revision: str | None) -> str | None:
    """Cause and remedy of one exception of the chain; None if it only wraps another."""
    page = f"{constants.ENDPOINT}/{'datasets/' if repo_type == 'dataset' else ''}{repo}"
    if isinstance(error, HFValidationError):
        return "it is neither a folder nor a hub id (owner/name)"
    if isinstance(error, LocalTokenNotFoundError):
        return f"this needs a login: {LOG_IN}"
    if isinstance(error, OfflineModeIsEnabled):
        return (
            f"it is not in the cache ({constants.HF_HUB_CACHE}) and HF_HUB_OFFLINE=1 is set; unset "
            f"it, or run `hf download {repo}` on a machine with access and copy the cache"
        )
    if isinstance(error, GatedRepoError):
        if get_token() is None:
            return f"the repository is gated; accept its licence at {page}, then {LOG_IN}"
        return (
            "the repository is gated and your token has no access; accept its licence at "
            f"{page} with the token's account, and let the token read gated repositories"
        )
    if isinstance(error, DisabledRepoError):
        return f"the Hub has disabled the repository, see {page}"
    if isinstance(error, RepositoryNotFoundError):
        account = "an account that can read it" if get_token() is None else "another account"
        return (
            f"the Hub shows no {repo_type} repository of this name; check the spelling, or if it "
            f"is private, log in with {account} (`hf auth login` or HF_TOKEN)"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"the repository has no revision {revision!r}; see {page}/tree/main for its branches"
    if isinstance(error, LocalEntryNotFoundError):
        return None  # its cause says why the Hub was not reached
    if isinstance(error, EntryNotFoundError):
        return f"the repository holds no such file, see {page}/tree/{revision or 'main'}"
    if isinstance(error, FileMetadataError):
        return not_the_hub()
    if isinstance(error, HfHubHTTPError):
        return _of_status(error)
    return _of_connection(error) or _of_file(error)


def not_the_hub() -> str:
    """Return cause and remedy for responses that do not come from the Hub."""
    return (
        f"{constants.ENDPOINT} answered, but not as the Hub does; a proxy or login page may be in "
        "between, so check HTTPS_PROXY and HF_ENDPOINT, and open the address in a browser"
    )


def _of_status(error: HfHubHTTPError) -> str | None:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if response is None or status is None:
        return None
    answer = f"HTTP {status} from {constants.ENDPOINT}"
    if status == 401:
        return f"the Hub does not accept the token ({answer}); {LOG_IN_AGAIN}"
    if status == 407:
        return f"the proxy asks for a login ({answer}); put user and password into HTTPS_PROXY"
    if status == 429:
        wait = response.headers.get("Retry-After", "")
        after = counted(int(wait), "second") if wait.isdigit() else "a few minutes"
        more = "" if get_token() else f", or {LOG_IN} for a higher limit"
        return f"too many requests ({answer}); run again after {after}{more}"
    if status >= 500:
        return (
            f"the Hub is out of order ({answer}); run again in a few minutes, {STATUS_PAGE} shows "
            "outages"
        )
    if status == 403:
        return (
            f"access is forbidden ({answer}); the token lacks the permission, or a proxy blocks "
            f"the address: {LOG_IN_AGAIN}, or check HTTPS_PROXY"
        )
    return f"the Hub refuses the request ({answer})"


def _of_connection(error: BaseException) -> str | None:
    """Errors of the HTTP client: no connection, or an interrupted one."""
    client = type(error).__module__.partition(".")[0] in HTTP_CLIENTS
    if not client and not isinstance(error, ConnectionError | TimeoutError):
        return None
    kind = type(error).__name__
    detail = next(iter(str(error).splitlines()), "") or kind
    if "Proxy" in kind:
        return f"the proxy cannot be used ({detail}); check HTTPS_PROXY"
    if "Timeout" in kind or "Timeout" in detail:
        return f"{constants.ENDPOINT} does not answer in time ({detail}); {NETWORK}"
    if re.search("RemoteProtocol|ReadError|ChunkedEncoding|IncompleteRead", kind):
        return f"the download broke off ({detail}); run again, it resumes"
    if "CERTIFICATE" in detail.upper() or "SSL" in kind:
        return f"the certificate of {constants.ENDPOINT} is not trusted ({detail}); {NETWORK}"
    return f"cannot connect to {constants.ENDPOINT} ({detail}); {NETWORK}"


def _of_file(error: BaseException) -> str | None:
    """Errors of the cache: truncated download, full disk, missing permission."""
    if not isinstance(error, OSError):
        return None
    cut = re.search(r"should be of size (\d+) but has size (\d+)", str(error))
    if cut:
        return (
            f"the download was cut off at {int(cut[2]):,} of "
            f"{counted(int(cut[1]), 'byte', commas=True)}; run again"
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left for the cache {constants.HF_HUB_CACHE}; make room, or set HF_HOME"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename:
        return f"{error.filename} cannot be written ({error.strerror}); set HF_HOME to another one"
    return None


def _file(error: BaseException) -> str | None:
    """The file that a failed request names."""
    try:
        response = getattr(error, "response", None)
        address = str(getattr(response, "url", "") or getattr(error, "request", None))
    except RuntimeError:  # the client's exception carries no request
        address = ""
    for text in (address, str(error)):
        if found := re.search(r"/resolve/[^/\s]+/([^\s?'\">]+)", text):
            return unquote(found[1]).rstrip(".,;:")
    cut = re.search(r"has size \d+ \((\S+)\)", str(error))
    return cut[1].rpartition("/")[2] if cut else None


def in_cache(path: Path) -> tuple[str, Path] | None:
    """Locate a file in the Hub cache.

    Returns:
        (repository id, blob to delete), or None for a file outside the cache. The cached file is a
        link to the blob; it is fetched again only once the blob is deleted.
    """
    parts = path.absolute().parts
    for folder in reversed(parts[:-2]):
        match = _IN_CACHE.fullmatch(folder)
        if match and "snapshots" in parts:
            return match["repo"].replace("--", "/"), path.resolve()
    return None


def remedy(path: Path) -> str:
    """Return the remedy for a damaged file, as the end of a sentence."""
    cached = in_cache(path)
    if cached is None:
        return "the file is truncated or damaged; copy or download it again"
    repo, blob = cached
    return f"the cached file of {repo} is damaged; delete {blob} and run again to download it"


def local_folder(repo: str, revision: str | None = None) -> Path | None:
    """Return the folder of a local or cached model, or None if there is neither."""
    if Path(repo).expanduser().is_dir():
        return Path(repo).expanduser()
    try:
        config = try_to_load_from_cache(repo, "config.json", revision=revision)
    except ValueError:  # not a valid Hub id
        return None
    return Path(config).parent if isinstance(config, str) else None
