"""Downloads of official files: resumed where they broke off, checked by md5, and whole or not there at all."""

import http.client
import os
import ssl
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from . import files

__all__ = ["download", "fetch"]

TIMEOUT = 30.0  # seconds without a byte
RETRIES = 4  # after an attempt that brought nothing new, until one does
BACKOFF = 1.0  # seconds before the first retry; doubled for each further one
PIECE_BYTES = 2**20
TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}  # of HTTP


def download(name: str, size: int | None = None, root: str | os.PathLike | None = None) -> Path:
    """Download the official file of a set of MedMNIST, where it is not there yet.

    Args:
        name: "chestmnist" or another set of MedMNIST. Others are under terms that their source shows first.
        size: side of the images in pixels; the smallest official file of at least that side is taken. Default:
            the card's.
        root: folder to put it in. Default: SBN_TF_DATA, else `data/` of the working directory.

    Returns:
        The file.

    Raises:
        ValueError: another name; or a file, there or downloaded, whose md5 is not the official one.
        ConnectionError: no connection, or one that breaks off again and again. What came is kept as `.part`.
        OSError: the folder cannot be written to, or the disk is full. What came is kept.
    """
    from . import medmnist

    if name not in medmnist.NAMES:
        raise ValueError(
            f"Expected a dataset that can be downloaded, among {', '.join(medmnist.NAMES)}. Received: name={name!r}\n"
            "Get others from their source, which print(datasets.card(name)) names."
        )
    if size is not None and (isinstance(size, bool) or not hasattr(size, "__index__") or size < 1):
        raise ValueError(f"Expected an integer size of 1 to {max(medmnist.SIZES)}. Received: size={size!r}")
    card, _ = medmnist.registered(name)
    file_name, url, md5 = medmnist.official_file(name, card.default_size if size is None else size)
    folders = files.roots(root)
    for path in (folder / place for folder in folders for place in (file_name, Path(name) / file_name)):
        if path.exists():
            _check_md5(path, md5)
            return path
    return fetch(url, folders[0] / file_name, md5, card.source)


def fetch(url: str, path: str | os.PathLike, md5: str, source: str) -> Path:
    """Download `url` to `path`, through `path.part`, which a later call goes on with.

    Args:
        url: of the file.
        path: where it goes; its folder is made. Another process that downloads it is waited for.
        md5: that it must have.
        source: page where people find it; used in messages.

    Returns:
        `path`.

    Raises:
        ValueError, ConnectionError, OSError: see `download`.
    """
    path = Path(path)
    with files.locked(path, _writable(path), f"downloads {path}"):
        if path.exists():  # from another process
            _check_md5(path, md5)
            return path
        part = path.with_name(path.name + ".part")
        _receive_all(url, path, part, source)
        found = files.md5(part)
        if found != md5:
            part.unlink()
            raise ValueError(
                f"Expected md5 {md5} for {url}. Received: {found}; what was downloaded is deleted.\n"
                f"Download it again; if that does not help, compare the official page: {source}."
            )
        os.replace(part, path)
        return path


def _check_md5(path, md5):
    found = files.md5(path)
    if found != md5:
        raise ValueError(
            f"Expected md5 {md5} for {path}. Received: {found}.\n"
            "It is not the official file, or it was cut short: move it away and download again."
        )


def _receive_all(url, path, part, source):
    """Ask for the rest of the file until it is whole; give up where `RETRIES` more attempts bring nothing new."""
    most, failures, reached = _size(part), 0, False
    while True:
        try:
            _receive(url, path, part)
            return
        except urllib.error.HTTPError as error:
            if error.code not in TRY_AGAIN:
                raise ConnectionError(
                    f"Expected {path.name} from {url}. Received: HTTP {error.code} ({error.reason}).\n"
                    f"Get it from {source} and put it there: {path}."
                ) from None
            broken, reached = error, True
        except urllib.error.URLError as error:
            if not reached:
                raise ConnectionError(
                    f"Expected a connection to download {path.name}. Received: {_reason(error)}.\n"
                    f"Without one, get the file from {source} on another machine and put it there: {path}."
                ) from None
            broken = error
        except (_Dropped, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
            broken, reached = error, True
        have = _size(part)
        failures = 0 if have > most else failures + 1
        most = max(most, have)
        if failures > RETRIES:
            raise ConnectionError(
                f"Expected the whole {path.name}. Received: {have:,} bytes, then {failures} times: {_reason(broken)}.\n"
                f"They are kept in {part}: the same call goes on from there."
            ) from broken
        time.sleep(BACKOFF * 2 ** max(failures - 1, 0))


def _reason(error):
    reason = getattr(error, "reason", error)
    return (str(reason) or type(reason).__name__).splitlines()[0]


class _Dropped(Exception):
    """The connection ended before the file did."""


def _receive(url, path, part):
    """One request: from where `part` ends, or from the start where the server sends the whole."""
    start = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not start:
            raise
        if error.headers.get("Content-Range", "").strip() == f"bytes */{start}":
            return  # it was whole already
        part.unlink()
        raise _Dropped(f"the server has no byte {start}; starting anew") from error
    with response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            start = 0  # the server ignores Range
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            part.unlink()
            raise _Dropped("the server sent another range; starting anew")
        length = response.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        with _writable(path):
            files.check_room(path.parent, 0 if total is None else total - _size(part))
        _write(response, path, part, start, total)
    if total is not None and _size(part) < total:
        raise _Dropped(f"the connection ended at {_size(part):,} of {total:,} bytes")


def _write(response, path, part, start, total):
    options = {"desc": f"downloading {path.name}", "unit": "B", "unit_scale": True, "mininterval": 1.0, "leave": False}
    with _writable(path):
        file = open(part, "ab" if start else "wb")  # noqa: SIM115 - closed below
    try:
        with tqdm(initial=start, total=total, **options) as bar:
            while piece := response.read(PIECE_BYTES):
                with _writable(path):
                    file.write(piece)
                bar.update(len(piece))
    finally:  # also what came before a connection broke
        with _writable(path):
            try:
                file.flush()
                os.fsync(file.fileno())
            finally:
                file.close()


def _size(path):
    return path.stat().st_size if path.exists() else 0


def _writable(path):
    kept = "what was downloaded is kept, and the same call goes on from there"
    return files.writable(str(path), path.parent, kept, "SBN_TF_DATA (or root=)")
