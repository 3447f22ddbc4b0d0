"""Where pathlb's own pool means to differ from httpx (h11), and why. A bug has no place here."""

from __future__ import annotations

REFUSED = "RemoteProtocolError at the head, fresh"
REFUSED_BODY = "RemoteProtocolError in the body, 200 OK [Transfer-Encoding: chunked] b'', fresh"

DIFFERENCES: dict[str, tuple[str, str]] = {}
"""By case of the corpus: what ours comes to (`str` of the observation), and the reason."""


def _differ(reason: str, ours: str, *names: str) -> None:
    DIFFERENCES.update((name, (ours, reason)) for name in names)


# --- refused here

_differ(
    "two lengths, though equal, are a sign of trouble: RFC 9110 8.6 lets a recipient refuse them, h11 drops one",
    REFUSED,
    "length twice, the same",
    "length list, the same",
)
_differ(
    "no body is that long, and beyond 64 bits parsers differ",
    REFUSED,
    "length 2^63",
    "length 2^64 - 1",
    "length 2^64 + 2",
)
_differ(
    "Content-Length beside Transfer-Encoding is how replies are smuggled (RFC 9112 6.3: an error is right)",
    REFUSED,
    "length, then chunked",
    "chunked, then length",
    "length that fits the chunks",
    "HEAD with length and chunked",
)
_differ(
    "llhttp does not see `chunked` before a tab; a body that it would read until the end of the stream is not that",
    REFUSED,
    "chunked with a tab after",
    "chunked with tabs around",
)
_differ(
    "folded lines are obsolete (RFC 9112 5.2), and read by some as one field and by others as two",
    REFUSED,
    "folded",
    "folded with a tab",
    "folded twice",
    "folded empty",
    "folded from an empty value",
    "folded after length",
    "length in the folded line",
    "chunked folded",
)
_differ(
    "a line ends with CRLF; where LF alone counts, a value can hide a field or the end of the head",
    REFUSED,
    "bare LFs",
    "bare LF after the status line",
    "bare LF after a field",
    "bare LF before the body",
    "LFLF in the head",
)
_differ("as above; h11 waits for a CRLF", REFUSED_BODY, "chunked, bare LFs")
_differ("as above; h11 takes LF alone for the empty line", REFUSED_BODY, "chunked, bare LF at the end")
_differ(
    "a field value has no controls (RFC 9110 5.5)",
    REFUSED,
    "value with a control",
    "value with file separator",
    "value with ESC",
    "value with DEL",
    "value ending in a control",
)
_differ(
    "the versions with this syntax are 1.0 and 1.1; h11 takes any two digits",
    REFUSED,
    "HTTP/0.9",
    "HTTP/1.2",
    "HTTP/1.9",
    "HTTP/2.0",
    "HTTP/3.0",
)
_differ(
    "to llhttp nothing follows a reply that does not persist, be it informational; HTTP/1.0 has no 1xx (RFC 9110 15.2)",
    REFUSED,
    "1xx with Connection: close",
    "1xx in 1.0, then 1.1",
)
_differ("Pool.max_head; h11's limit is not for what comes in one read", REFUSED, "head over the limit")
_differ("Pool.max_fields; h11 has no such limit", REFUSED, "3,000 fields")
_differ("Pool.max_fields, which trailers count too", REFUSED_BODY, "chunked, 2,000 trailers")
_differ(
    "nothing but a chunk extension may follow a chunk size, and that is tokens and quoted strings (RFC 9112 7.1.1)",
    REFUSED_BODY,
    "chunked, extension without a name",
    "chunked, bare CR in extension",
    "chunked, NUL in extension",
    "chunked, latin-1 in extension",
    "chunked, space after size",
    "chunked, spaces after size",
    "chunked, tab after size",
)
_differ(
    "llhttp's; RFC 9112 7.1.1 has a recipient take it, from senders that do what they must not",
    REFUSED_BODY,
    "chunked, space after ;",
)
_differ("a trailer must not frame the message (RFC 9110 6.5.1)", REFUSED_BODY, "chunked, trailer Content-Length")
_differ("folded, as above", REFUSED_BODY, "chunked, folded trailer")
_differ("the first byte shows that it is no reply; h11 waits for the line", REFUSED, "RST after garbage")

# --- taken here

_differ(
    "leading zeros do no harm: llhttp limits the number, h11 the digits",
    "200 OK [Transfer-Encoding: chunked] b'ok', reused",
    "chunked, 30 leading zeros",
)
_differ(
    "llhttp skips line ends before a head, which are part of no reply",
    "200 OK [Content-Length: 2] b'ok', reused",
    "CRLF first",
    "CRLFs first",
    "LF first",
    "CR first",
    "CRLF between 1xx and reply",
)

_differ(
    "line ends behind a reply, likewise",
    "200 OK [Content-Length: 2] b'ok', reused",
    "length, CRLF after it",
)
_differ(
    "line ends behind a reply, likewise",
    "200 OK [Transfer-Encoding: chunked] b'ok', reused",
    "chunked, CRLF after it",
)

_differ(
    "llhttp's: protocols that look like HTTP, and are framed like it",
    "200 OK [Content-Length: 2] b'ok', fresh",
    "RTSP/1.0",
    "ICE/1.0",
)

# --- the same reply, said or kept otherwise

_differ(
    "handed on as it came; h11 makes it lower case",
    "200 OK [Transfer-Encoding: CHUNKED] b'ok', reused",
    "chunked in capitals",
)
_differ(
    "handed on as it came; h11 makes it lower case",
    "200 OK [Transfer-Encoding: ChUnKeD] b'ok', reused",
    "chunked in odd case",
)
_differ(
    "an HTTP/1.0 server that says keep-alive means it (RFC 9112 9.3); h11 closes all the same",
    "200 OK [Connection: keep-alive; Content-Length: 2] b'ok', reused",
    "1.0, length, keep-alive",
)
_differ(
    "an HTTP/1.0 server that says keep-alive means it (RFC 9112 9.3); h11 closes all the same",
    "200 OK [Connection: Keep-Alive; Content-Length: 2] b'ok', reused",
    "1.0, length, Keep-Alive in capitals",
)
_differ(
    "it asks for the end of the connection, in the wrong place: nothing is lost by it",
    "200 OK [Transfer-Encoding: chunked] b'ok', fresh",
    "chunked, trailer Connection: close",
)
_differ(
    "it asks for the end of the connection, under the wrong name: nothing is lost by it",
    "200 OK [Proxy-Connection: close; Content-Length: 2] b'ok', fresh",
    "Proxy-Connection: close",
)
