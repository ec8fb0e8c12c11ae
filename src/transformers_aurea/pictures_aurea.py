# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Pictures as they are encoded, from a file, a URL, bytes or base64 text, become PIL images.

A URL may come from a stranger: it is fetched over http(s) alone, up to `MAX_DOWNLOAD_BYTES` in `DOWNLOAD_SECONDS` in
all, and from public addresses unless the environment variable `AUREA_PRIVATE_URLS` is 1. How many pixels a picture may
have is Pillow's setting, `PIL.Image.MAX_IMAGE_PIXELS`.
"""

import base64
import io
import ipaddress
import os
import socket
import ssl
import struct
import time
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from http.client import HTTPS_PORT, HTTPConnection, HTTPException
from threading import Timer
from typing import get_args
from urllib.parse import urlsplit

import PIL.Image
import PIL.ImageOps


DOWNLOAD_SECONDS = 60
MAX_DOWNLOAD_BYTES = 2**28

EncodedPicture = str | os.PathLike | bytes | bytearray | memoryview | io.IOBase | Mapping
ENCODED = get_args(EncodedPicture)
# What Pillow's decoders run into in broken files: what `PIL.Image.open` itself expects of them, which `load` and
# `exif_transpose` may meet later on, and what 36,000 mutated files in all 26 formats that Pillow writes led to.
PICTURE_ERRORS = (
    *(SyntaxError, LookupError, TypeError, struct.error, EOFError),
    *(OSError, ValueError, RuntimeError, AttributeError, PIL.Image.DecompressionBombError),
    HTTPException,  # of a URL
)


def read_picture(source: EncodedPicture) -> PIL.Image.Image:
    """A picture decoded and turned as its EXIF orientation says.

    Args:
        source: a path, an http(s) URL, a base64 string, bytes, a binary file (read from its start), or a dictionary of
            `bytes` and, where these are `None`, `path`.

    Raises:
        ValueError: `source` is none of these, or what it names is no picture, is truncated, or has more pixels than
            Pillow allows.
    """
    try:
        with PIL.Image.open(_open_source(source)) as image:
            image.load()
            return PIL.ImageOps.exif_transpose(image)
    except PICTURE_ERRORS as error:
        is_too_large = isinstance(error, PIL.Image.DecompressionBombError)
        remedy = " Raise `PIL.Image.MAX_IMAGE_PIXELS` for pictures that you trust." if is_too_large else ""
        raise ValueError(f"The picture {shorten(source)} cannot be read: {error}{remedy}") from error


def _open_source(source: EncodedPicture) -> str | io.BytesIO:
    """A path that exists, or the bytes of a picture."""
    if isinstance(source, Mapping):
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
        if source is None:
            raise ValueError("it has neither `bytes` nor a `path`")
    if isinstance(source, io.IOBase):
        if source.seekable():
            source.seek(0)
        source = source.read()
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(source)
    source = os.fspath(source)
    if source.startswith(("http://", "https://")):
        return io.BytesIO(_download(source))
    return source if os.path.isfile(source) else io.BytesIO(_decode_base64(source))


def _decode_base64(text: str) -> bytes:
    try:
        data = base64.b64decode("".join((text.partition("base64,")[2] or text).split()), validate=True)
        PIL.Image.open(io.BytesIO(data)).close()
    except (ValueError, PIL.UnidentifiedImageError) as error:
        raise ValueError(
            "it is neither an existing file, nor a URL that starts with http:// or https://, nor a picture in base64"
        ) from error
    return data


def _download(url: str) -> bytes:
    """What lies at a URL. With a proxy for it in the environment, the proxy has the say which addresses are served."""
    parts = urlsplit(url)
    is_proxied = parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(parts.hostname or "")
    public = _PublicAddresses()
    request = urllib.request.Request(url, headers={"User-Agent": "transformers-aurea"})
    data, deadline = bytearray(), time.monotonic() + DOWNLOAD_SECONDS
    watch = Timer(DOWNLOAD_SECONDS, _hang_up, [public.connections])  # on who sends a byte now and then
    watch.start()
    try:
        opener = urllib.request.build_opener(_SameScheme, *(() if is_proxied else (public,)))
        with opener.open(request, timeout=DOWNLOAD_SECONDS) as response:
            while chunk := response.read1(2**20):
                data += chunk
                if len(data) > MAX_DOWNLOAD_BYTES:
                    raise ValueError(f"it has more than the {MAX_DOWNLOAD_BYTES} bytes that are downloaded at most")
                if time.monotonic() > deadline:
                    break
    except (OSError, HTTPException) as error:
        if time.monotonic() < deadline:
            raise
        raise ValueError(f"it did not come in {DOWNLOAD_SECONDS} seconds") from error
    finally:
        watch.cancel()
    if time.monotonic() > deadline:
        raise ValueError(f"it did not come in {DOWNLOAD_SECONDS} seconds")
    return bytes(data)


def _hang_up(connections: list[socket.socket]):
    for connection in connections:
        with suppress(OSError):  # it may be over
            connection.shutdown(socket.SHUT_RDWR)


class _SameScheme(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but not away from https."""

    def redirect_request(self, request, fp, code, message, headers, url):
        if (scheme := urlsplit(url).scheme) not in (request.type, "https"):
            raise ValueError(f"it redirects from {request.type} to {scheme}: {shorten(url)}")
        return super().redirect_request(request, fp, code, message, headers, url)


def _connect(host: str, port: int, timeout: float) -> socket.socket:
    """A connection to a host's address that was looked at, so that no second answer of the name service comes between.

    Raises:
        ValueError: an address is not a public one, and those are not allowed.
    """
    error = None
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        number = ipaddress.ip_address(address[0].partition("%")[0])
        if os.environ.get("AUREA_PRIVATE_URLS") != "1" and (not number.is_global or number.is_multicast):
            raise ValueError(
                f"{host} is at {number}, which is no public address: set AUREA_PRIVATE_URLS=1 in the environment to "
                "have pictures from your own network fetched"
            )
        connection = socket.socket(family, kind, protocol)
        connection.settimeout(timeout)
        try:
            connection.connect(address)
        except OSError as failure:
            connection.close()
            error = failure
        else:
            return connection
    raise error


class _PublicConnection(HTTPConnection):
    def __init__(self, *args, connections: list[socket.socket], **kwargs):
        super().__init__(*args, **kwargs)
        self.connections = connections

    def connect(self):
        self.sock = _connect(self.host, self.port, self.timeout)
        self.connections.append(self.sock)


class _PublicSecureConnection(_PublicConnection):
    default_port = HTTPS_PORT

    def connect(self):
        super().connect()
        self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)
        self.connections.append(self.sock)


class _PublicAddresses(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Connects as `_connect` does, and keeps the connections."""

    def __init__(self):
        super().__init__()
        self.connections = []

    def http_open(self, request):
        return self.do_open(_PublicConnection, request, connections=self.connections)

    def https_open(self, request):
        return self.do_open(_PublicSecureConnection, request, connections=self.connections)


def shorten(value) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}…"


__all__ = ["ENCODED", "PICTURE_ERRORS", "EncodedPicture", "read_picture", "shorten"]
