"""Downloads of official files: resumed where they broke off, checked, put in place only when whole."""

import http.client
import os
import ssl
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from . import files

TIMEOUT = 30.0  # seconds without a byte
RETRIES = 4  # after an attempt that brought nothing new, until one does
BACKOFF = 1.0  # seconds before the first retry; doubled for each further one
PIECE_BYTES = 2**20
MAX_BYTES = 32 * 2**30  # of a file; the largest official one has 13 GB
SPARE_BYTES = 2**28  # that stay free on the disk, where the server does not say how much it sends
# By md5, of the files that others published with both (Zenodo has md5 alone): bloodmnist, breastmnist, dermamnist.
SHA256 = {
    "7053d0359d879ad8a5505303e11de1dc": "062023e186f537e26b3c21ea3b2614ddfc475e8a14825dfd20663bbb7e37bddc",
    "750601b1f35ba3300ea97c75c52ff8f6": "3a22d2a4625e7dd8903f0f59030e81a3d0c222bece2e5e10927456cb50efdec1",
    "0744692d530f8e62ec473284d019b0c7": "1a309fec2e33bb6aba88e7d078e5ccbb9736c84a0b415ac197eb3c8fa331e050",
}
_TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}  # of HTTP


def fetch(url: str, path: str | os.PathLike, md5: str, source: str) -> Path:
    """Download `url` to `path`, through `path.part`, which a later call continues.

    Args:
        url: of the file.
        path: where it goes; its folder is made. If another process downloads it, this one waits.
        md5: that it must have; and the sha256 where `SHA256` has one for it.
        source: page where people find it; used in messages.

    Returns:
        `path`.

    Raises:
        ValueError: a file, there or downloaded, whose md5 or sha256 is another, or that is too large to be official.
        ConnectionError: no connection, or one that breaks off again and again. What came is kept as `.part`.
        OSError: the folder cannot be written to, or the disk is full. What came is kept.
    """
    path = Path(path)
    with files.locked(path, _writable(path), f"downloads {path}"):
        if path.exists():  # from another process
            check_official(path, md5)
            return path
        part = path.with_name(path.name + ".part")
        advice = f"Download it again; if that does not help, compare the official page: {source}."
        try:
            _receive_all(url, path, part, source)
            _check(part, md5, url, f"; what was downloaded is deleted.\n{advice}")
        except ValueError:
            part.unlink(missing_ok=True)
            raise
        os.replace(part, path)
        return path


def check_official(path: str | os.PathLike, md5: str) -> None:
    """Raises a ValueError unless the file has the official md5, and the sha256 if `SHA256` has it."""
    advice = "It is not the official file, or it was cut short: move it away and get it again."
    _check(path, md5, path, f".\n{advice}")


def _check(path, md5, what, advice):
    files.check_digest(path, "md5", md5, what, advice)
    if md5 in SHA256:
        files.check_digest(path, "sha256", SHA256[md5], what, advice)


def _receive_all(url, path, part, source):
    """Ask for the rest of the file until it is whole; give up after `RETRIES` more attempts that bring nothing new."""
    most, failures, reached = _size(part), 0, False
    while True:
        try:
            _receive(url, path, part)
            return
        except urllib.error.HTTPError as error:
            if error.code not in _TRY_AGAIN:
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
    """One request: from where `part` ends, or from the start if the server sends the whole."""
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
        raise _Dropped(f"the server has no byte {start}; starting again") from error
    with response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            start = 0  # the server ignores Range
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            part.unlink()
            raise _Dropped("the server sent another range; starting again")
        total = None if response.length is None else start + response.length  # None too where it is no number
        _check_size(total or 0, path)
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
                _check_size(file.tell() + len(piece), path)
                with _writable(path):
                    if total is None:
                        files.check_room(path.parent, len(piece) + SPARE_BYTES)
                    file.write(piece)
                bar.update(len(piece))
    finally:  # also what came before a connection broke
        with _writable(path):
            try:
                file.flush()
                os.fsync(file.fileno())
            finally:
                file.close()


def _check_size(num_bytes, path):
    if num_bytes > MAX_BYTES:
        raise ValueError(
            f"Expected at most {MAX_BYTES:,} bytes for {path.name}. Received: {num_bytes:,} or more; what was "
            "downloaded is deleted.\nThe server sends another file: try again later."
        )


def _size(path):
    return path.stat().st_size if path.exists() else 0


def _writable(path):
    kept = "what was downloaded is kept, and the same call continues it"
    return files.writable(str(path), path.parent, kept, "SBN_TF_DATA (or root=)")
