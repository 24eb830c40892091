from __future__ import annotations

import asyncio
import base64
import hmac
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest
import trustme

from django_async_smtp import errors
from django_async_smtp.envelope import Envelope
from django_async_smtp.errors import SMTPError, Stage
from django_async_smtp.opening import ATTEMPT_DELAY
from django_async_smtp.options import Options
from django_async_smtp.session import QUIT_TIMEOUT, Session

from .conftest import options_for
from .servers import (
    CLOSE,
    DEAF,
    DEFAULT,
    PASSWORD,
    READ,
    RESET,
    SILENCE,
    USERNAME,
    MailServer,
    Script,
    ScriptedServer,
    Step,
    Turns,
    address_without_answer,
    free_port,
    open_sockets,
    wait_until,
)

LOGIN = {"username": USERNAME, "password": PASSWORD}
ALL_METHODS = "AUTH CRAM-MD5 PLAIN LOGIN"
HELLO = Envelope("from@example.com", ("to@example.com",), b"Subject: Hi\r\n\r\nHi\r\n")
NEXT = replace(HELLO, content=b"Subject: Next\r\n\r\nNext\r\n")
LARGE = replace(HELLO, content=(b"x" * 62 + b"\r\n") * (16 * 2**20 // 64))


def base64_of(text: str) -> bytes:
    return base64.b64encode(text.encode())


@asynccontextmanager
async def opened(
    server: ScriptedServer | MailServer, **options: Any
) -> AsyncIterator[Session]:
    session = await Session.open(options_for(server, **options))
    try:
        yield session
    finally:
        await session.quit()


async def open_and_send(options: Options) -> None:
    session = await Session.open(options)
    await session.send(HELLO)


async def eventually(is_true: Callable[[], object]) -> None:
    """Do as ``wait_until``, while the loop goes on."""
    await asyncio.to_thread(wait_until, is_true)


@asynccontextmanager
async def nothing_left_open(server: ScriptedServer) -> AsyncIterator[None]:
    """Check that all connections made within have an end, on both sides."""
    before = open_sockets()
    yield
    await eventually(lambda: server.open_connections == 0)
    await eventually(lambda: open_sockets() <= before)


# Opening.


@pytest.mark.asyncio
async def test_a_session_begins_with_ehlo_in_the_clients_name() -> None:
    with ScriptedServer() as server:
        async with opened(server, local_hostname="mail.client.example") as session:
            assert server.lines == [b"EHLO mail.client.example"]
            assert session.is_clean
            assert session.extensions == {"size", "8bitmime"}
        assert server.lines[1:] == [b"QUIT"]


@pytest.mark.asyncio
async def test_a_greeting_may_have_many_lines() -> None:
    lines = b"220-test ESMTP\r\n220-no UCE\r\n220\r\n"
    pieces = [bytes([byte]) for byte in lines]
    with ScriptedServer(scripts=({"greeting": lines}, {"greeting": pieces})) as server:
        for _ in range(2):
            async with opened(server) as session:
                await session.send(HELLO)
    assert len(server.received) == 2


@pytest.mark.parametrize("code", [500, 502, 504, 550])
@pytest.mark.asyncio
async def test_helo_is_said_where_ehlo_is_refused(code: int) -> None:
    script: Script = {"ehlo": b"%d what?\r\n" % code}
    with ScriptedServer(scripts=(script,)) as server:
        async with opened(server) as session:
            assert session.extensions == set()
            await session.send(HELLO)
    assert server.lines == [
        b"EHLO client.example",
        b"HELO client.example",
        b"MAIL FROM:<from@example.com>",
        b"RCPT TO:<to@example.com>",
        b"DATA",
        b"QUIT",
    ]


@pytest.mark.asyncio
async def test_no_helo_is_said_to_a_server_that_closes() -> None:
    with ScriptedServer(scripts=({"ehlo": b"421 busy\r\n"},)) as server:
        with pytest.raises(errors.HeloClosed):
            await Session.open(options_for(server))
        assert server.lines == [b"EHLO client.example"]


@pytest.mark.asyncio
async def test_the_source_address_is_used() -> None:
    port = free_port()
    with ScriptedServer() as server:
        async with opened(server, source_address=("127.0.0.2", 0)):
            pass
        async with opened(server, source_address=("127.0.0.1", port)):
            pass
    assert server.peers[0][0] == "127.0.0.2"
    assert server.peers[1] == ("127.0.0.1", port)


@pytest.mark.asyncio
async def test_starttls_is_followed_by_another_ehlo(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    with ScriptedServer(tls=server_tls) as server:
        async with opened(server, use_tls=True, ssl_context=client_tls) as session:
            await session.send(HELLO)
            assert "starttls" not in session.extensions
    assert server.lines[:3] == [
        b"EHLO client.example",
        b"STARTTLS",
        b"EHLO client.example",
    ]
    assert server.received[0].tls


@pytest.mark.asyncio
async def test_what_came_before_tls_is_not_believed(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    injected = b"220 go\r\n250-evil\r\n250 SMTPUTF8\r\n"
    with ScriptedServer(scripts=({"starttls": injected},), tls=server_tls) as server:
        async with opened(server, use_tls=True, ssl_context=client_tls) as session:
            assert session.extensions == {"size", "8bitmime"}
            await session.send(HELLO)


@pytest.mark.asyncio
async def test_starttls_that_is_not_offered_is_not_done_without(
    client_tls: ssl.SSLContext,
) -> None:
    with ScriptedServer(extensions=("AUTH PLAIN",)) as server:
        options = options_for(server, use_tls=True, ssl_context=client_tls, **LOGIN)
        with pytest.raises(errors.NotSupported, match="STARTTLS is not offered"):
            await Session.open(options)
        assert not server.commands(b"AUTH")


@pytest.mark.asyncio
async def test_implicit_tls_comes_before_the_greeting(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    with ScriptedServer(tls=server_tls, implicit=True) as server:
        async with opened(server, use_ssl=True, ssl_context=client_tls) as session:
            await session.send(HELLO)
    assert server.received[0].tls
    assert not server.commands(b"STARTTLS")


# Logging in.

PLAIN = b"AUTH PLAIN " + base64_of(f"\0{USERNAME}\0{PASSWORD}")
LOGIN_LINES = [b"AUTH LOGIN " + base64_of(USERNAME), base64_of(PASSWORD)]
DIGEST = hmac.new(PASSWORD.encode(), b"<1234@test>", "md5").hexdigest()
CRAM_LINES = [b"AUTH CRAM-MD5", base64_of(f"{USERNAME} {DIGEST}")]


@pytest.mark.parametrize(
    ("offer", "said"),
    [
        (ALL_METHODS, CRAM_LINES),
        ("AUTH LOGIN PLAIN CRAM-MD5", CRAM_LINES),
        ("AUTH LOGIN PLAIN", [PLAIN]),
        ("AUTH XOAUTH2 PLAIN GSSAPI", [PLAIN]),
        ("auth plain", [PLAIN]),
        ("AUTH LOGIN", LOGIN_LINES),
        ("AUTH=LOGIN", LOGIN_LINES),
    ],
)
@pytest.mark.asyncio
async def test_the_login_takes_the_first_method_that_both_know(
    offer: str, said: list[bytes]
) -> None:
    with ScriptedServer(extensions=(offer,)) as server:
        async with opened(server, **LOGIN) as session:
            await session.send(HELLO)
    assert server.lines[1 : 1 + len(said)] == said
    assert len(server.commands(b"AUTH")) == 1
    assert server.received[0].login


@pytest.mark.asyncio
async def test_a_login_in_other_letters_goes_out_as_utf8() -> None:
    with ScriptedServer(extensions=("AUTH PLAIN",)) as server:
        async with opened(server, username="zoë", password="pässwörd €"):
            pass
    assert server.lines[1] == b"AUTH PLAIN " + base64_of("\0zoë\0pässwörd €")


@pytest.mark.parametrize(
    ("username", "password"), [("", ""), ("alice", ""), ("", "secret")]
)
@pytest.mark.asyncio
async def test_there_is_no_login_without_a_name_and_a_password(
    username: str, password: str
) -> None:
    with ScriptedServer(extensions=(ALL_METHODS,)) as server:
        async with opened(server, username=username, password=password):
            pass
        assert not server.commands(b"AUTH")


@pytest.mark.parametrize("code", [535, 534, 454, 432, 538])
@pytest.mark.asyncio
async def test_one_refusal_ends_the_login(code: int) -> None:
    script: Script = {"auth": b"%d 5.7.8 no\r\n" % code}
    with ScriptedServer(scripts=(script,), extensions=(ALL_METHODS,)) as server:
        with pytest.raises(errors.AuthenticationRefused) as caught:
            await Session.open(options_for(server, **LOGIN))
        assert caught.value.smtp_code == code
        assert caught.value.stage == "auth"
        assert len(server.commands(b"AUTH")) == 1


@pytest.mark.asyncio
async def test_a_wrong_password_is_refused(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    with MailServer(auth=True, tls=server_tls) as server:
        right = options_for(server, use_tls=True, ssl_context=client_tls, **LOGIN)
        with pytest.raises(errors.AuthenticationRefused) as caught:
            await Session.open(replace(right, password="wrong"))
        assert caught.value.smtp_code == 535
        session = await Session.open(right)
        await session.send(HELLO)
        await session.quit()
    assert server.received[0].login


@pytest.mark.parametrize("code", [500, 502, 504])
@pytest.mark.asyncio
async def test_a_method_that_is_unknown_after_all_gives_way_to_the_next(
    code: int,
) -> None:
    unknown = b"%d unknown\r\n" % code
    script: Script = {"auth cram-md5": unknown, "auth plain": unknown}
    with ScriptedServer(scripts=(script,), extensions=(ALL_METHODS,)) as server:
        async with opened(server, **LOGIN):
            assert server.lines[1:] == [b"AUTH CRAM-MD5", PLAIN, *LOGIN_LINES]


@pytest.mark.asyncio
async def test_the_last_method_is_not_unknown_but_refused() -> None:
    with ScriptedServer(
        scripts=({"auth": b"504 unknown\r\n"},), extensions=(ALL_METHODS,)
    ) as server:
        with pytest.raises(errors.AuthenticationRefused) as caught:
            await Session.open(options_for(server, **LOGIN))
        assert caught.value.smtp_code == 504
        assert len(server.commands(b"AUTH")) == 3


@pytest.mark.asyncio
async def test_a_second_login_is_none() -> None:
    with ScriptedServer(
        scripts=({"auth": b"503 already authenticated\r\n"},),
        extensions=(ALL_METHODS,),
    ) as server:
        async with opened(server, **LOGIN) as session:
            await session.send(HELLO)
        assert len(server.commands(b"AUTH")) == 1


@pytest.mark.parametrize(
    ("extension", "words"),
    [
        ("PIPELINING", "a user name is set, but AUTH is not offered without TLS"),
        ("AUTH XOAUTH2 NTLM", "no AUTH method in common: it offers xoauth2 ntlm"),
        ("AUTH", "no AUTH method in common"),
    ],
)
@pytest.mark.asyncio
async def test_a_login_that_is_impossible_says_why(extension: str, words: str) -> None:
    with ScriptedServer(extensions=(extension,)) as server:
        with pytest.raises(errors.NotSupported, match=words) as caught:
            await Session.open(options_for(server, **LOGIN))
        assert caught.value.stage == "auth"
        assert not server.commands(b"AUTH")


@pytest.mark.asyncio
async def test_a_login_that_is_not_offered_after_tls_does_not_blame_it(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    with ScriptedServer(tls=server_tls) as server:
        options = options_for(server, use_tls=True, ssl_context=client_tls, **LOGIN)
        with pytest.raises(errors.NotSupported, match=r"AUTH is not offered\n"):
            await Session.open(options)


@pytest.mark.parametrize("said", [PASSWORD.encode(), PLAIN, base64_of(PASSWORD)])
@pytest.mark.asyncio
async def test_a_refusal_that_quotes_the_password_is_told_without_it(
    said: bytes,
) -> None:
    script: Script = {"auth": b"535 cannot take " + said + b" here\r\n"}
    with ScriptedServer(scripts=(script,), extensions=(ALL_METHODS,)) as server:
        options = options_for(server, **LOGIN)
        with pytest.raises(errors.AuthenticationRefused) as caught:
            await Session.open(options)
    told = repr((caught.value, caught.value.args, vars(caught.value)))
    assert PASSWORD not in told
    assert base64_of(PASSWORD).decode() not in told
    assert PLAIN.split()[-1].decode() not in told


# Hosts with several addresses.


@pytest.fixture
def has_addresses(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Options]:
    """Give the host "many.example" addresses, and return options for it."""

    def make(*addresses: tuple[str, int]) -> Options:
        found = [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", address)
            for address in addresses
        ]
        # No name of every machine has several addresses, and dead ones.
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
        return Options(host="many.example", port=addresses[0][1], timeout=5)

    return make


@pytest.mark.asyncio
async def test_a_name_may_have_an_address_where_nobody_listens() -> None:
    # On most machines localhost is ::1, too.
    with ScriptedServer() as server:
        async with opened(server, host="localhost"):
            assert server.connections == 1


@pytest.mark.asyncio
async def test_the_next_address_is_tried_where_one_refuses(
    has_addresses: Callable[..., Options],
) -> None:
    with ScriptedServer() as server:
        async with nothing_left_open(server):
            here = (server.host, server.port)
            dead = (server.host, free_port())
            start = time.monotonic()
            session = await Session.open(has_addresses(dead, dead, here))
            assert time.monotonic() - start < ATTEMPT_DELAY
            await session.send(HELLO)
            await session.quit()
    assert server.connections == 1


@pytest.mark.asyncio
async def test_the_next_address_is_tried_where_one_does_not_answer(
    has_addresses: Callable[..., Options],
) -> None:
    with ScriptedServer() as server, address_without_answer() as silent:
        async with nothing_left_open(server):
            options = has_addresses(silent, (server.host, server.port))
            session = await Session.open(options)
            await session.send(HELLO)
            await session.quit()
    assert server.connections == 1


@pytest.mark.asyncio
async def test_a_host_that_refuses_at_all_addresses_refuses(
    has_addresses: Callable[..., Options],
) -> None:
    with ScriptedServer() as server:
        async with nothing_left_open(server):
            options = has_addresses(("127.0.0.1", free_port()), ("127.0.0.2", 1))
            with pytest.raises(errors.ConnectionRefused) as caught:
                await Session.open(options)
    assert caught.value.stage == "connect"


@pytest.mark.asyncio
async def test_a_host_that_does_not_answer_is_a_timeout(
    has_addresses: Callable[..., Options],
) -> None:
    with ScriptedServer() as server, address_without_answer() as silent:
        async with nothing_left_open(server):
            options = replace(has_addresses(silent, silent), timeout=0.4)
            with pytest.raises(errors.ConnectTimeout) as caught:
                await Session.open(options)
    assert caught.value.stage == "connect"


# What fails on the way leaves nothing behind.

STAGES: dict[str, tuple[Stage, dict[str, Any]]] = {
    "greeting": ("greeting", {}),
    "ehlo": ("ehlo", {}),
    "starttls": ("tls", {"use_tls": True}),
    "tls": ("tls", {"use_tls": True}),
    "implicit tls": ("tls", {"use_ssl": True}),
    "ehlo after tls": ("ehlo", {"use_tls": True}),
    "auth": ("auth", LOGIN),
    "auth after tls": ("auth", {"use_tls": True, **LOGIN}),
}


@pytest.fixture(params=STAGES)
def at_stage(
    request: pytest.FixtureRequest,
    server_tls: ssl.SSLContext,
    client_tls: ssl.SSLContext,
) -> Callable[[Step], tuple[ScriptedServer, dict[str, Any], Stage]]:
    """Make a server that does something wrong at a stage, and options to get there."""
    name = request.param
    stage, options = STAGES[name]

    def make(step: Step) -> tuple[ScriptedServer, dict[str, Any], Stage]:
        steps = Turns(DEFAULT, step) if name == "ehlo after tls" else step
        script: Script = {
            name.removeprefix("implicit ").removesuffix(" after tls"): steps
        }
        if stage == "ehlo":
            script["helo"] = step
        uses_tls = "use_tls" in options or "use_ssl" in options
        server = ScriptedServer(
            scripts=(script,),
            extensions=(ALL_METHODS,),
            tls=server_tls if uses_tls else None,
            implicit="use_ssl" in options,
        )
        return server, {**options, "ssl_context": client_tls}, stage

    return make


AtStage = Callable[[Step], tuple[ScriptedServer, dict[str, Any], Stage]]


@pytest.mark.parametrize(
    "step", [CLOSE, RESET, b"421 bye\r\n", b"hello?\r\n"], ids=repr
)
@pytest.mark.asyncio
async def test_nothing_stays_open_where_the_server_gives_up(
    at_stage: AtStage, step: Step
) -> None:
    server, options, stage = at_stage(step)
    with server:
        async with nothing_left_open(server):
            with pytest.raises(SMTPError) as caught:
                await Session.open(options_for(server, **options))
    if step is not RESET:  # It may come before the connection is made.
        assert caught.value.stage == stage


@pytest.mark.asyncio
async def test_nothing_stays_open_where_the_server_is_silent(at_stage: AtStage) -> None:
    server, options, stage = at_stage(SILENCE)
    with server:
        async with nothing_left_open(server):
            with pytest.raises(errors.ReplyTimeout) as caught:
                await Session.open(options_for(server, **options, timeout=0.15))
    assert caught.value.stage == stage


@pytest.mark.asyncio
async def test_nothing_stays_open_where_the_task_is_cancelled(
    at_stage: AtStage,
) -> None:
    server, options, _ = at_stage(SILENCE)
    with server:
        async with nothing_left_open(server):
            opening = Session.open(options_for(server, **options))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(opening, 0.15)


@pytest.mark.asyncio
async def test_nothing_stays_open_whenever_the_task_is_cancelled(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    with ScriptedServer(tls=server_tls, extensions=(ALL_METHODS,)) as server:
        options = options_for(server, use_tls=True, ssl_context=client_tls, **LOGIN)

        async def open_for(steps: int) -> tuple[asyncio.Task[Session], int]:
            """Give an opening session some turns of the loop; return how many."""
            opening = asyncio.create_task(Session.open(options))
            for step in range(steps):
                if opening.done():
                    return opening, step
                await asyncio.sleep(0)
            return opening, steps

        async with nothing_left_open(server):
            opening, all_steps = await open_for(1_000_000)
            await opening.result().quit()
            for steps in range(0, all_steps, 1 + all_steps // 40):
                opening, _ = await open_for(steps)
                opening.cancel()
                with suppress(asyncio.CancelledError):
                    # The wait_for() of Python 3.11 can miss that it was cancelled.
                    (await opening).abort()


@pytest.mark.asyncio
async def test_nothing_stays_open_where_the_certificate_is_not_trusted(
    client_tls: ssl.SSLContext,
) -> None:
    stranger = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(stranger)
    with ScriptedServer(tls=stranger) as server:
        async with nothing_left_open(server):
            with pytest.raises(errors.CertificateError):
                await Session.open(
                    options_for(server, use_tls=True, ssl_context=client_tls)
                )


@pytest.mark.parametrize("name", ["zo\xeb.example", "a\r\nb"])
@pytest.mark.asyncio
async def test_nothing_stays_open_where_an_option_is_of_no_use(name: str) -> None:
    with ScriptedServer() as server:
        async with nothing_left_open(server):
            with pytest.raises(ValueError, match=r"ascii|local_hostname"):
                await Session.open(options_for(server, local_hostname=name))
        assert not server.lines


@pytest.mark.parametrize("more", [{}, LOGIN])
@pytest.mark.parametrize("end", [CLOSE, RESET])
@pytest.mark.asyncio
async def test_a_server_that_closes_right_after_ehlo_has_closed(
    end: Step, more: dict[str, str]
) -> None:
    with ScriptedServer(
        scripts=({"ehlo": (DEFAULT, end)},), extensions=(ALL_METHODS,)
    ) as server:
        async with nothing_left_open(server):
            for _ in range(20):
                with pytest.raises(errors.Disconnected):
                    await open_and_send(options_for(server, **more))


# Sending.


@pytest.mark.asyncio
async def test_a_receipt_tells_who_gets_the_message() -> None:
    script: Script = {
        "no@example.com": b"550 5.1.1 unknown\r\n",
        "later@example.com": b"451-4.7.1 not\r\n451 4.7.1 now\r\n",
        "moved@example.com": b"251 will forward\r\n",
        "body": b"250 2.0.0 queued as 4bQx\r\n",
    }
    recipients = tuple(
        f"{name}@example.com" for name in ("a", "no", "moved", "later", "b")
    )
    with ScriptedServer(scripts=(script,)) as server:
        async with opened(server) as session:
            receipt = await session.send(replace(HELLO, recipients=recipients))
            assert session.is_clean
            assert session.sent == 1
    assert receipt.accepted == ("a@example.com", "moved@example.com", "b@example.com")
    assert receipt.refused == {
        "no@example.com": (550, b"5.1.1 unknown"),
        "later@example.com": (451, b"4.7.1 not\n4.7.1 now"),
    }
    assert receipt.reply == (250, b"2.0.0 queued as 4bQx")
    assert server.received[0].sender == "from@example.com"
    assert server.received[0].recipients == list(receipt.accepted)
    assert server.received[0].content == HELLO.content


@pytest.mark.asyncio
async def test_a_session_sends_one_message_after_another() -> None:
    with MailServer() as server:
        async with opened(server) as session:
            for number in range(5):
                content = b"Subject: %d\r\n\r\n.\r\n..\r\n" % number
                await session.send(replace(HELLO, content=content))
                assert server.received[-1].content == content
            assert session.sent == 5
    assert server.connections == 1


@pytest.mark.parametrize(
    ("extensions", "content", "options"),
    [
        ((), b"Hi\r\n", b""),
        (("SIZE",), b"Hi\r\n", b" SIZE=4"),
        (("SIZE 1000", "8BITMIME"), b".Hi\r\n", b" SIZE=5"),
        (("size 1000", "8bitmime"), b"H\xc3\xa9\r\n", b" SIZE=5 BODY=8BITMIME"),
        (("SMTPUTF8",), b"H\xc3\xa9\r\n", b""),
    ],
)
@pytest.mark.asyncio
async def test_mail_says_what_the_server_can_use(
    extensions: tuple[str, ...], content: bytes, options: bytes
) -> None:
    with ScriptedServer(extensions=extensions) as server:
        async with opened(server) as session:
            await session.send(replace(HELLO, content=content))
    assert server.commands(b"MAIL") == [b"MAIL FROM:<from@example.com>" + options]
    assert server.received[0].content == content


@pytest.mark.asyncio
async def test_an_address_in_utf8_needs_a_server_that_takes_it() -> None:
    message = replace(
        HELLO, recipients=("zoë@example.com",), smtputf8_error="Invalid address 'zoë'"
    )
    with ScriptedServer() as server:
        async with opened(server) as session:
            with pytest.raises(ValueError, match="Invalid address 'zoë'"):
                await session.send(message)
            assert not server.commands(b"MAIL")
            await session.send(HELLO)
    with ScriptedServer(extensions=("SMTPUTF8",)) as server:
        async with opened(server) as session:
            await session.send(message)
    assert server.received[0].recipients == ["zoë@example.com"]
    assert server.received[0].options == "SMTPUTF8"


@pytest.mark.parametrize("field", ["sender", "recipient"])
@pytest.mark.asyncio
async def test_an_address_cannot_smuggle_a_command(field: str) -> None:
    address = "a@example.com>\r\nRCPT TO:<b@example.com"
    message = (
        replace(HELLO, sender=address)
        if field == "sender"
        else replace(HELLO, recipients=("to@example.com", address))
    )
    with ScriptedServer() as server:
        async with opened(server) as session:
            with pytest.raises(ValueError, match="control characters"):
                await session.send(message)
    assert not any(b"b@example.com" in line for line in server.lines)
    assert not server.received


TWO = replace(HELLO, recipients=("a@example.com", "b@example.com"))
TWICE = replace(HELLO, recipients=("a@example.com", "a@example.com"))
NO_ONE: Script = {"a@example.com": Turns(b"550 no\r\n"), "b@example.com": b"450 no\r\n"}


@pytest.mark.parametrize(
    ("script", "message", "kind", "stage"),
    [
        ({"mail": Turns(b"550 no\r\n")}, HELLO, errors.SenderRefused, "mail"),
        ({"mail": Turns(b"452 no\r\n")}, TWO, errors.SenderRefused, "mail"),
        ({"rcpt": Turns(b"550 no\r\n")}, HELLO, errors.RecipientsRefused, "rcpt"),
        (NO_ONE, TWO, errors.RecipientsRefused, "rcpt"),
        (
            {"rcpt": Turns(b"550 no\r\n", b"550 no\r\n")},
            TWICE,
            errors.RecipientsRefused,
            "rcpt",
        ),
        ({"data": Turns(b"451 no\r\n")}, HELLO, errors.DataRefused, "data"),
        ({"data": Turns(b"250 ok\r\n")}, HELLO, errors.DataRefused, "data"),
        ({"body": Turns(b"554 no\r\n")}, HELLO, errors.DataRefused, "body"),
        ({"body": Turns(b"452 no\r\n")}, HELLO, errors.DataRefused, "body"),
    ],
    ids=repr,
)
@pytest.mark.asyncio
async def test_a_session_goes_on_after_a_refusal(
    script: Script, message: Envelope, kind: type[SMTPError], stage: Stage
) -> None:
    with ScriptedServer(scripts=(script,)) as server:
        async with opened(server) as session:
            with pytest.raises(kind) as caught:
                await session.send(message)
            assert caught.value.stage == stage
            assert not caught.value.maybe_delivered
            assert server.lines[-1] == b"RSET"
            assert session.is_clean
            receipt = await session.send(NEXT)
    assert receipt.accepted == NEXT.recipients
    assert session.sent == 1
    assert server.connections == 1
    assert server.received[-1].content == NEXT.content
    assert server.received[-1].recipients == ["to@example.com"]


@pytest.mark.asyncio
async def test_recipients_that_are_all_refused_are_told_with_their_replies() -> None:
    with ScriptedServer(scripts=(NO_ONE,)) as server:
        async with opened(server) as session:
            with pytest.raises(errors.RecipientsRefused) as caught:
                await session.send(TWO)
    assert caught.value.recipients == {
        "a@example.com": (550, b"no"),
        "b@example.com": (450, b"no"),
    }
    assert not server.commands(b"DATA")


@pytest.mark.asyncio
async def test_a_server_that_closes_at_a_recipient_gets_no_message() -> None:
    names = ("a", "bye", "c")
    message = replace(HELLO, recipients=tuple(f"{n}@example.com" for n in names))
    script: Script = {"bye@example.com": b"421 too many\r\n"}
    with ScriptedServer(scripts=(script,)) as server:
        session = await Session.open(options_for(server))
        with pytest.raises(errors.RecipientsRefused) as caught:
            await session.send(message)
        assert caught.value.recipients == {"bye@example.com": (421, b"too many")}
        assert not session.is_clean
    assert len(server.commands(b"RCPT")) == 2
    assert not server.commands(b"DATA")


@pytest.mark.asyncio
async def test_a_recipient_named_twice_may_be_accepted_once() -> None:
    script: Script = {"a@example.com": Turns(DEFAULT, b"550 duplicate\r\n")}
    with ScriptedServer(scripts=(script,)) as server:
        async with opened(server) as session:
            receipt = await session.send(TWICE)
    assert receipt.accepted == ("a@example.com",)
    assert server.received[0].recipients == ["a@example.com"]


@pytest.mark.parametrize("step", [b"500 what?\r\n", b"421 bye\r\n", CLOSE, SILENCE])
@pytest.mark.asyncio
async def test_a_session_ends_where_the_server_does_not_reset(step: Step) -> None:
    script: Script = {"mail": b"550 no\r\n", "rset": step}
    with ScriptedServer(scripts=(script,)) as server:
        session = await Session.open(options_for(server, timeout=0.15))
        with pytest.raises(errors.SenderRefused):
            await session.send(HELLO)
        assert not session.is_clean
        await eventually(lambda: server.open_connections == 0)


@pytest.mark.asyncio
async def test_a_session_whose_sender_was_cancelled_at_the_reset_is_closed() -> None:
    script: Script = {"mail": b"550 no\r\n", "rset": SILENCE}
    with ScriptedServer(scripts=(script,)) as server:
        async with nothing_left_open(server):
            session = await Session.open(options_for(server))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(session.send(HELLO), 0.1)
            assert not session.is_clean


SENDING = ("mail", "rcpt", "data", "body")
LONG_LINE = b"250 " + b"x" * 10_000 + b"\r\n"


@pytest.mark.parametrize("stage", SENDING)
@pytest.mark.parametrize(
    "step",
    [CLOSE, RESET, SILENCE, b"hello?\r\n", LONG_LINE, b"421 bye\r\n"],
    ids=lambda step: repr(step[:10] if isinstance(step, bytes) else step),
)
@pytest.mark.asyncio
async def test_a_session_that_went_wrong_is_closed(stage: Stage, step: Step) -> None:
    with ScriptedServer(scripts=({stage: step},)) as server:
        async with nothing_left_open(server):
            session = await Session.open(options_for(server, timeout=0.15))
            with pytest.raises(SMTPError) as caught:
                await session.send(HELLO)
            assert caught.value.stage == stage
            # Only after the whole message, and not where the server said no to it.
            may_have_it = stage == "body" and step != b"421 bye\r\n"
            assert caught.value.maybe_delivered is may_have_it
            assert not session.is_clean
            assert session.sent == 0
            with pytest.raises(errors.Disconnected):
                await session.send(NEXT)
    assert len(server.received) == (stage == "body")


@pytest.mark.parametrize("stage", SENDING)
@pytest.mark.asyncio
async def test_a_session_whose_sender_was_cancelled_is_closed(stage: Stage) -> None:
    # The reply comes, but late: when the next message could take it for its own.
    script: Script = {stage: (READ, b"250 late\r\n")}
    with ScriptedServer(scripts=(script,)) as server:
        async with nothing_left_open(server):
            session = await Session.open(options_for(server))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(session.send(HELLO), 0.1)
            assert not session.is_clean
            with pytest.raises(errors.Disconnected):
                await session.send(NEXT)


@pytest.mark.parametrize("stage", SENDING)
@pytest.mark.asyncio
async def test_a_session_is_unclean_after_a_reply_too_many(stage: Stage) -> None:
    script: Script = {stage: (DEFAULT, b"250 and more\r\n")}
    with ScriptedServer(scripts=(script,)) as server:
        session = await Session.open(options_for(server))
        try:
            await session.send(HELLO)
        except SMTPError as error:
            assert not error.maybe_delivered  # noqa: PT017
        await eventually(lambda: not session.is_clean)
        await session.quit()
        assert not server.commands(b"QUIT")


@pytest.mark.parametrize(
    ("uses_tls", "pause"), [(False, 0.003), (True, 0.008)], ids=["plain", "tls"]
)
@pytest.mark.asyncio
async def test_the_timeout_counts_silence_and_not_the_size_of_a_message(
    uses_tls: bool, pause: float, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    content = (b"x" * 62 + b"\r\n") * (3 * 2**20 // 64)
    timeout = 0.4
    server = ScriptedServer(
        slow_body=pause, extensions=(), tls=server_tls if uses_tls else None
    )
    with server:
        options = options_for(
            server, timeout=timeout, use_tls=uses_tls, ssl_context=client_tls
        )
        session = await Session.open(options)
        start = time.monotonic()
        await session.send(replace(HELLO, content=content))
        assert time.monotonic() - start > 2 * timeout
        await session.quit()
    assert server.received[0].content == content


@pytest.mark.asyncio
async def test_a_server_that_stops_reading_is_a_timeout() -> None:
    script: Script = {"data": (b"354 go\r\n", DEAF)}
    with ScriptedServer(scripts=(script,)) as server:
        session = await Session.open(options_for(server, timeout=0.15))
        with pytest.raises(errors.ReplyTimeout) as caught:
            await session.send(LARGE)
        assert caught.value.stage == "body"
        assert not caught.value.maybe_delivered
        assert not session.is_clean


@pytest.mark.parametrize("then", [CLOSE, SILENCE, DEAF])
@pytest.mark.asyncio
async def test_a_message_that_is_refused_halfway_is_not_delivered(then: Step) -> None:
    script: Script = {"data": (b"354 go\r\n", READ, b"552 too big\r\n", then)}
    with ScriptedServer(scripts=(script,)) as server:
        session = await Session.open(options_for(server))
        with pytest.raises((errors.DataRefused, errors.Disconnected)) as caught:
            await asyncio.wait_for(session.send(LARGE), 5)
        if then is not CLOSE:  # It may have reset the connection before the reply.
            assert isinstance(caught.value, errors.DataRefused)
            assert caught.value.smtp_code == 552
        assert caught.value.stage == "body"
        assert not caught.value.maybe_delivered
        assert not session.is_clean


# Ending.


@pytest.mark.asyncio
async def test_the_servers_end_is_told_once() -> None:
    with ScriptedServer() as server:
        session = await Session.open(options_for(server))
        ends: asyncio.Queue[None] = asyncio.Queue()
        session.on_end = lambda: ends.put_nowait(None)
        server.close_all(b"421 restarting\r\n")
        await asyncio.wait_for(ends.get(), 5)
        assert not session.is_clean
        await session.quit()
        assert ends.empty()


@pytest.mark.parametrize("step", [SILENCE, CLOSE, RESET, b"500 no\r\n", b"hello?\r\n"])
@pytest.mark.asyncio
async def test_quit_never_fails_and_does_not_wait_for_long(step: Step) -> None:
    with ScriptedServer(scripts=({"quit": step},)) as server:
        async with nothing_left_open(server):
            session = await Session.open(options_for(server))
            start = time.monotonic()
            await session.quit()
            assert time.monotonic() - start < QUIT_TIMEOUT + 0.5
            assert not session.is_clean
            await session.quit()
    assert server.commands(b"QUIT") == [b"QUIT"]


@pytest.mark.asyncio
async def test_a_cancelled_quit_closes_all_the_same() -> None:
    with ScriptedServer(scripts=({"quit": SILENCE},)) as server:
        async with nothing_left_open(server):
            session = await Session.open(options_for(server))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(session.quit(), 0.05)
            assert not session.is_clean


@pytest.mark.asyncio
async def test_a_sessions_repr_tells_its_state() -> None:
    with ScriptedServer() as server:
        session = await Session.open(options_for(server, **LOGIN | {"username": ""}))
        name = f"<Session with 127.0.0.1:{server.port}"
        assert repr(session) == f"{name}: ready, 0 sent>"
        await session.quit()
        assert repr(session) == f"{name}: ended, 0 sent>"
