"""Files of object stores, read by pyarrow (S3) and fsspec (every other scheme)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from llmtrain.corpus import store_refusals
from llmtrain.corpus.tar_files import TarFileError
from llmtrain.corpus.transport_source import PassingError, missing, refuse_longer, scrubbed, wrong_size
from llmtrain.errors import DataError, Problem
from llmtrain.urls import without_credentials

FILESYSTEM_CHUNK_BYTES = 8 << 20
"""Bytes of one request where the store supports ranges."""
_S3_REFUSES = (
    "ACCESS_DENIED",
    "EXPIRED_TOKEN",
    "INVALID_ACCESS_KEY_ID",
    "INVALID_CLIENT_TOKEN_ID",
    "MISSING_AUTHENTICATION_TOKEN",
    "REQUEST_EXPIRED",
    "SIGNATURE_DOES_NOT_MATCH",
    "UNRECOGNIZED_CLIENT",
)


class StoreFile:
    """A file of a store that fsspec supports; a `Source`."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.version = ""

    def describe(self) -> tuple[int | None, str]:
        try:
            size, version, _ = self._look()
        except Exception as error:
            raise self.failure(error) from error
        return size, version

    def chunks(self, offset: int, size: int | None, at_most: int) -> Iterator[tuple[int, bytes]]:
        position = offset
        try:
            total, version, open_file = self._look()
            changed, self.version = self.version not in ("", version), version
            with open_file() as file:
                if size is not None and total is not None and total != size:
                    raise TarFileError(wrong_size(self._url, total, size))
                end = total if size is None else size
                refuse_longer(self._url, end, at_most)
                if changed and offset:
                    raise PassingError("another state of the file than before", restart=True)
                file.seek(position)
                while end is None or position < end:
                    # Not beyond the end: a store refuses such a range.
                    left = FILESYSTEM_CHUNK_BYTES if end is None else end - position
                    chunk = file.read(min(FILESYSTEM_CHUNK_BYTES, left))
                    if not chunk:
                        break
                    refuse_longer(self._url, position + len(chunk), at_most)
                    yield position, chunk
                    position += len(chunk)
        except (PassingError, DataError):
            raise
        except Exception as error:
            # Each store has its own errors, most of them direct subclasses of Exception.
            raise self.failure(error) from error
        if end is not None and position < end:
            raise PassingError(f"the file ended after {position:,} of {end:,} bytes")

    def _look(self) -> tuple[int | None, str, Callable[[], Any]]:
        """Return the size of the file, its version, and a function that opens it."""
        import fsspec

        store_refusals.be_quiet()
        system, path = fsspec.url_to_fs(self._url)
        # A cached listing would hide that the file has appeared or changed.
        system.invalidate_cache()
        info = system.info(path)
        if info.get("type") == "directory":
            raise IsADirectoryError("a folder")
        return info.get("size"), str(info), lambda: system.open(path, "rb", cache_type="none")

    def open_store(self) -> tuple[Any, str]:
        """Return the file system of fsspec that holds the file, and its path there."""
        import fsspec

        store_refusals.be_quiet()
        system, path = fsspec.url_to_fs(self._url)
        return system, str(path)

    def failure(self, error: Exception) -> Exception:
        """Return the error to raise for one of the store."""
        where, text = without_credentials(self._url), scrubbed(store_refusals.message(error), self._url)
        if store_refusals.lacks_bucket(error):
            return DataError(Problem(where, f"no such bucket ({text})", "", "create it, or check the URL"))
        if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)):
            return TarFileError(missing(self._url, text))
        if store_refusals.is_refusal(error):
            remedy = "give credentials that may read it, as the store's own tools take them"
            return DataError(Problem(where, f"access refused ({text})", "", remedy))
        if isinstance(error, ImportError):
            got = f"a scheme whose package is not installed ({text})"
            return DataError(Problem(where, got, "", "install that package"))
        if isinstance(error, ValueError) and "Protocol not known" in text:
            known = "http, https, s3, gs, az or another scheme of fsspec"
            return DataError(Problem(where, "an unknown scheme", known, "check the URL"))
        return PassingError(f"{type(error).__name__}: {text}")


class S3File(StoreFile):
    """A file in S3 or a compatible store; settings are found where Amazon's own tools look."""

    def __init__(self, url: str, timeout: float) -> None:
        super().__init__(url)
        self._timeout = timeout

    def _look(self) -> tuple[int | None, str, Callable[[], Any]]:
        path = self._url.partition("://")[2]
        if not all(path.partition("/")[::2]):
            raise IsADirectoryError("a bucket")
        file = self._store().open_input_file(path)
        about = file.metadata()
        version = about.get("ETag", b"") or about.get("Last-Modified", b"")
        return file.size(), version.decode(), lambda: file

    def _store(self) -> Any:
        from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        proxy = getproxies().get("http" if (endpoint or "").startswith("http:") else "https")
        if proxy and proxy_bypass(urlsplit(endpoint or "https://amazonaws.com").hostname or ""):
            proxy = None
        return S3FileSystem(
            endpoint_override=endpoint,
            proxy_options=proxy,
            connect_timeout=self._timeout,
            request_timeout=self._timeout,
            # The transport retries, in the same way for every store.
            retry_strategy=AwsStandardS3RetryStrategy(max_attempts=1),
        )

    def open_store(self) -> tuple[Any, str]:
        from fsspec.implementations.arrow import ArrowFSWrapper

        path = self._url.partition("://")[2]
        if not path.partition("/")[0]:
            raise IsADirectoryError("no bucket")
        return ArrowFSWrapper(self._store(), skip_instance_cache=True), path

    def failure(self, error: Exception) -> Exception:
        """Return the error to raise for one of pyarrow: an OSError whose message contains Amazon's error
        code."""
        where, text = without_credentials(self._url), scrubbed(" ".join(str(error).split()), self._url)
        if any(code in text for code in _S3_REFUSES):
            remedy = "give credentials that may read it, as Amazon's own tools take them (AWS_PROFILE, say)"
            return DataError(Problem(where, f"access refused ({text})", "", remedy))
        if "NO_SUCH_BUCKET" in text:
            return DataError(Problem(where, f"no such bucket ({text})", "", "create it, or check the URL"))
        if "HTTP status 301" in text or "HTTP status 400" in text:
            remedy = "check the URL, and give the region of the bucket in AWS_REGION"
            return DataError(Problem(where, text, "", remedy))
        if isinstance(error, ImportError):
            got = f"a pyarrow that was built without S3 ({text})"
            return DataError(Problem(where, got, "", "pip install pyarrow"))
        return super().failure(error)
