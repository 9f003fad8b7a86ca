"""What does an exception of an object-store client mean for the object that was asked for?

The clients of the three clouds raise dozens of classes for the same few facts, and s3fs maps "no such bucket" and "no
such key" to one `FileNotFoundError`. Pure: an exception in, a `Meaning` out. What is not understood is RETRY, never ABSENT.
"""

from collections.abc import Iterator
from enum import StrEnum
from typing import Any


class Meaning(StrEnum):
    """What is known after a failed request."""

    ABSENT = "absent"
    """The object is certainly not there."""

    MAYBE_ABSENT = "maybe-absent"
    """The object or its whole bucket is not there."""

    NO_BUCKET = "no-bucket"
    EXISTS = "exists"
    """A conditional create found the key taken, perhaps by its own lost attempt."""

    PAST_END = "past-end"
    """The range starts at or after the object's end; the object exists."""

    DENIED = "denied"
    """The credentials are missing, wrong or not sufficient."""

    REFUSED = "refused"
    """The request itself is wrong for this store; trying again would not help."""

    RETRY = "retry"
    """Anything else: overload, timeout, lost connection, conflict of two writers."""


_MEANING_OF_CODE = {
    "NoSuchKey": Meaning.ABSENT,
    "BlobNotFound": Meaning.ABSENT,
    "NoSuchBucket": Meaning.NO_BUCKET,
    "ContainerNotFound": Meaning.NO_BUCKET,
    "404": Meaning.MAYBE_ABSENT,
    "PreconditionFailed": Meaning.EXISTS,
    "412": Meaning.EXISTS,
    "BlobAlreadyExists": Meaning.EXISTS,
    "InvalidRange": Meaning.PAST_END,
    "416": Meaning.PAST_END,
    "409": Meaning.RETRY,
    "ConditionalRequestConflict": Meaning.RETRY,
    "OperationAborted": Meaning.RETRY,
    "NoSuchUpload": Meaning.RETRY,
    "RequestTimeout": Meaning.RETRY,
    "SlowDown": Meaning.RETRY,
    "IncompleteBody": Meaning.RETRY,
    "XAmzContentSHA256Mismatch": Meaning.RETRY,
    "BadDigest": Meaning.RETRY,
    "AccessDenied": Meaning.DENIED,
    "AllAccessDisabled": Meaning.DENIED,
    "401": Meaning.DENIED,
    "403": Meaning.DENIED,
    "ExpiredToken": Meaning.DENIED,
    "InvalidAccessKeyId": Meaning.DENIED,
    "InvalidToken": Meaning.DENIED,
    "SignatureDoesNotMatch": Meaning.DENIED,
    "RequestTimeTooSkewed": Meaning.DENIED,
    "NotImplemented": Meaning.REFUSED,
    "501": Meaning.REFUSED,
}
"""Error codes of S3 and Azure, and bare HTTP status codes."""

_DENIED_CLASSES = frozenset(
    {"NoCredentialsError", "PartialCredentialsError", "ClientAuthenticationError", "DefaultCredentialsError"}
)
_REFUSED_CLASSES = frozenset({"ParamValidationError", "ProfileNotFound", "InvalidRegionError"})
_CODE_ATTRIBUTES = {"HttpError": ("code",), "ClientResponseError": ("status",)}
"""Of gcsfs and of aiohttp; Azure's classes are many and share the names used for all others."""

_RETRIED_STATUS = frozenset({408, 409, 425, 429})


def meaning_of(err: BaseException) -> Meaning:
    """Return what `err`, raised by an fsspec client, says.

    >>> meaning_of(FileNotFoundError("bucket/key"))
    <Meaning.MAYBE_ABSENT: 'maybe-absent'>
    """
    if isinstance(err, FileExistsError):
        return Meaning.EXISTS
    for link in _chain(err):
        if type(link).__name__ in _DENIED_CLASSES:
            return Meaning.DENIED
        meaning = _meaning_of_response(link)
        if meaning is not None:
            return meaning
    if isinstance(err, FileNotFoundError):
        return Meaning.MAYBE_ABSENT
    if isinstance(err, PermissionError) or (isinstance(err, OSError) and str(err).startswith("Forbidden: ")):
        return Meaning.DENIED
    if (
        isinstance(err, (TypeError, ValueError, NotImplementedError))
        or type(err).__name__ in _REFUSED_CLASSES
    ):
        return Meaning.REFUSED
    return Meaning.RETRY


def _chain(err: BaseException) -> Iterator[BaseException]:
    """Yield `err` and what it was raised from."""
    seen: set[int] = set()
    link: BaseException | None = err
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ if link.__cause__ is not None else link.__context__


def _meaning_of_response(err: BaseException) -> Meaning | None:
    """Return what the server's answer in `err` says, or None when `err` carries none that is understood."""
    for code in _codes(err):
        if code in _MEANING_OF_CODE:
            return _MEANING_OF_CODE[code]
    for code in _codes(err):
        if code.isdigit() and 400 <= int(code) < 500:
            return Meaning.RETRY if int(code) in _RETRIED_STATUS else Meaning.REFUSED
    return None


def _codes(err: BaseException) -> list[str]:
    """Return the error codes in `err`, most telling first: botocore, Azure, gcsfs and aiohttp each have their own place."""
    codes: list[Any] = []
    response = getattr(err, "response", None)
    if isinstance(response, dict):
        codes.append(response.get("Error", {}).get("Code"))
        codes.append(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
    # Only of classes known to mean a server's answer: aiohttp gives `code` 400 to a body that was cut on the way.
    for name in _CODE_ATTRIBUTES.get(type(err).__name__, ("error_code", "status_code")):
        value = getattr(err, name, None)
        codes.append(getattr(value, "value", value))
    return [str(code) for code in codes if isinstance(code, (str, int))]
