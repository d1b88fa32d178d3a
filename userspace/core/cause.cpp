// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "core/cause.h"

#include <algorithm>
#include <array>
#include <iterator>

namespace finrace {

namespace {

constexpr std::array causes{
    CauseText{
        .cause = Cause::keepalive_race,
        .title = "request and idle close crossed",
        .happened = "The proxy sent a request on a connection that it had kept open, while the upstream was closing "
                    "that connection because it had been idle for too long. The request reached a closed socket.",
        .evidence = "fin_crossed: the upstream's FIN leaves bytes of the request unacknowledged, so its kernel had "
                    "not received them when it closed; no response byte came. Sequence numbers prove it, no knowledge "
                    "of timers is needed. reset_crossed: the same with an RST that carries an ACK. reset_unread: an "
                    "RST with ACK acknowledges the request, but the connection had been idle for as long as this "
                    "upstream lets connections idle: closed with the request unread. reset_closed: a bare RST answers "
                    "the request and no FIN was seen: the socket was gone already. fin_lingering: the FIN "
                    "acknowledges the request, nothing was answered, and it came at the upstream's idle timeout: "
                    "shutdown() first, then read and discard (Apache does).",
        .proxy_says = "nginx: 502, \"upstream prematurely closed connection\" or \"104: Connection reset by peer\". "
                      "HAProxy: 502 SH--, or nothing at all where it closes its client silently. Envoy: 503 UC. "
                      "A retry may hide it from the client; it is logged as an error all the same.",
        .remedy = "Let the proxy close first: its idle limit at least 1 s below the upstream's idle timeout, or the "
                  "upstream's timeout at least 5 s above the proxy's. For example uvicorn --timeout-keep-alive 65, "
                  "gunicorn --keep-alive 65, Node server.keepAliveTimeout = 65000, against nginx's upstream "
                  "keepalive_timeout 60s. HAProxy has no idle limit towards servers: raise the server's.",
    },
    CauseText{
        .cause = Cause::stale_reuse,
        .title = "sent into a connection that the upstream had closed",
        .happened = "The proxy wrote a request into a connection whose FIN this host's kernel had received before. "
                    "Nothing could answer.",
        .evidence =
            "A new request is written in state CLOSE_WAIT. The age of the unread FIN tells the kind: "
            "microseconds mean that the proxy's event loop lost a race by a turn; seconds mean a pool that does "
            "not watch its idle connections. It is the same race as keepalive_race, a moment later. A write of 31 "
            "bytes or less is no request but TLS's farewell; one of up to 62 is possible.",
        .proxy_says = "As for keepalive_race: 502, \"upstream prematurely closed connection\", or a silent retry.",
        .remedy = "Make the proxy's idle limit shorter than the upstream's timeout; where the FIN is old, let the pool "
                  "check connections before it reuses them (Apache httpd: ttl=, ping=; clients: validate before use), "
                  "and look for a proxy process that is short of CPU.",
    },
    CauseText{
        .cause = Cause::upstream_closed,
        .title = "the upstream took the request and closed without an answer",
        .happened = "The upstream's kernel had received all of the request; then the connection was closed in order, "
                    "and not one byte was answered.",
        .evidence = "The FIN acknowledges the whole request, no response byte came, and the close does not fit the "
                    "upstream's idle timeout. Variant on_accept: the upstream closed a connection that was only a "
                    "round trip or two old.",
        .proxy_says = "nginx: 502, \"upstream prematurely closed connection while reading response header\".",
        .remedy = "This is not the keep-alive race. Look at the application: a crash, a worker killed (out of memory, "
                  "gunicorn --timeout) or recycled (max_requests), a handler that closes its own socket.",
    },
    CauseText{
        .cause = Cause::upstream_reset,
        .title = "the upstream aborted the exchange",
        .happened = "An RST ended the connection before any byte of the response.",
        .evidence = "RST, no response byte, and not a race: a first request, or an idle time far from the upstream's "
                    "timeout.",
        .proxy_says = "nginx: 502, \"recv() failed (104: Connection reset by peer)\".",
        .remedy = "This is not the keep-alive race. Look at the application and its limits: a worker killed with the "
                  "request unread, SO_LINGER 0, a full backlog, a load balancer between that refuses.",
    },
    CauseText{
        .cause = Cause::response_cut,
        .title = "an RST stopped the response half way",
        .happened = "The upstream reset the connection after it had begun to answer.",
        .evidence =
            "RST less than 900 ms, and less than half of a learned timeout, after the last response byte; an RST near "
            "the timeout is an idle close and no failure. A response that a FIN cuts short (a killed process that had "
            "read all of the request) looks like a complete one to TCP: it gets no verdict.",
        .proxy_says =
            "nginx: \"readv() failed (104) while reading upstream\"; the client gets a truncated 200, or 502 if "
            "the response's head was not complete.",
        .remedy = "Look at the application: a crash with bytes of the request unread, SO_LINGER 0, a worker's own "
                  "timeout, an inner hop's read timeout.",
    },
    CauseText{
        .cause = Cause::connect_refused,
        .title = "nobody listens",
        .happened = "The upstream's host answered the SYN with an RST.",
        .evidence = "SYN_SENT ended in CLOSE by an RST.",
        .proxy_says = "nginx: 502, \"connect() failed (111: Connection refused)\". HAProxy: 503 SC--.",
        .remedy = "The upstream is down, restarting, or listens on another address or port.",
    },
    CauseText{
        .cause = Cause::connect_timeout,
        .title = "the SYN was never answered",
        .happened = "The SYN and its retransmissions met silence until somebody gave up.",
        .evidence = "SYN_SENT ended in CLOSE after at least one retransmission, and no answer came. Variant gave_up: "
                    "this host's process stopped waiting before the kernel did.",
        .proxy_says = "nginx: 504, \"upstream timed out (110) while connecting to upstream\". HAProxy: 503 sC--.",
        .remedy = "A firewall that drops, a host that is gone, or a listen queue that overflows: look at the route and "
                  "at the upstream's ListenOverflows and ListenDrops.",
    },
};

} // namespace

std::string_view to_string(Cause cause)
{
    switch (cause) {
    case Cause::keepalive_race:
        return "keepalive_race";
    case Cause::stale_reuse:
        return "stale_reuse";
    case Cause::upstream_closed:
        return "upstream_closed";
    case Cause::upstream_reset:
        return "upstream_reset";
    case Cause::response_cut:
        return "response_cut";
    case Cause::connect_refused:
        return "connect_refused";
    case Cause::connect_timeout:
        return "connect_timeout";
    }
    return {};
}

std::string_view to_string(Variant variant)
{
    switch (variant) {
    case Variant::none:
        return {};
    case Variant::fin_crossed:
        return "fin_crossed";
    case Variant::fin_lingering:
        return "fin_lingering";
    case Variant::reset_crossed:
        return "reset_crossed";
    case Variant::reset_unread:
        return "reset_unread";
    case Variant::reset_closed:
        return "reset_closed";
    case Variant::on_accept:
        return "on_accept";
    case Variant::gave_up:
        return "gave_up";
    }
    return {};
}

std::string_view to_string(Certainty certainty)
{
    switch (certainty) {
    case Certainty::proven:
        return "proven";
    case Certainty::likely:
        return "likely";
    case Certainty::possible:
        return "possible";
    }
    return {};
}

std::span<const CauseText> cause_texts()
{
    return causes;
}

const CauseText& text_of(Cause cause)
{
    for (const CauseText& text : causes)
        if (text.cause == cause)
            return text;
    return causes.front();
}

std::optional<Cause> cause_of_variant(std::string_view variant)
{
    constexpr Variant variants[] = {Variant::fin_crossed,  Variant::fin_lingering, Variant::reset_crossed,
                                    Variant::reset_unread, Variant::reset_closed,  Variant::on_accept,
                                    Variant::gave_up};
    if (std::none_of(std::begin(variants), std::end(variants), [&](Variant v) { return to_string(v) == variant; }))
        return std::nullopt;
    for (const CauseText& text : causes)
        if (text.evidence.find(variant) != std::string_view::npos)
            return text.cause;
    return std::nullopt;
}

std::optional<Cause> cause_from_string(std::string_view id)
{
    for (const CauseText& text : causes)
        if (to_string(text.cause) == id)
            return text.cause;
    return std::nullopt;
}

} // namespace finrace
