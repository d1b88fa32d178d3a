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
                    "shutdown() first, then read and discard (Apache does). The record's reason says why the upstream "
                    "closed: idle_timer, restart, request_limit, unannounced, early_purge (finrace explain tells of "
                    "each), unknown.",
        .proxy_says = "nginx: 502, \"upstream prematurely closed connection\" or \"104: Connection reset by peer\". "
                      "HAProxy: 502 SH--, or nothing at all where it closes its client silently. Envoy: 503 UC. "
                      "A retry may hide it from the client; it is logged as an error all the same.",
        .remedy =
            "Let the proxy close first: its idle limit at least 1 s below the upstream's idle timeout, or the "
            "upstream's timeout at least 5 s above the proxy's. For example uvicorn --timeout-keep-alive 65, "
            "gunicorn --keep-alive 65, Node server.keepAliveTimeout = 65000, against nginx's upstream "
            "keepalive_timeout 60s. HAProxy has no idle limit towards servers: raise the server's. Where the reason "
            "is another than the upstream's timer, its own remedy holds.",
    },
    CauseText{
        .cause = Cause::stale_response,
        .title = "an answer from before the request was taken for its answer",
        .happened = "The upstream wrote something as it closed an idle connection (a 408, as a rule) while the proxy's "
                    "next request was on its way. The proxy takes those bytes for the answer to a healthy request.",
        .evidence =
            "Response bytes came, but the FIN (or RST with ACK) after them acknowledges none of the request: they "
            "were written before it could have been read (proven for HTTP/1; likely where the protocol is not "
            "known). Or a request is written after the FIN with such bytes still unread (likely; backend trace). "
            "What is as short as TLS's farewell (31 bytes) is none, unless the connection speaks HTTP/1.",
        .proxy_says = "Nothing: it passes a 408 (or 400) on to a client whose request was in order. HAProxy drops what "
                      "comes on an idle connection and fails as for keepalive_race.",
        .remedy = "As for keepalive_race: let the proxy close first. Where the upstream can be told to close idle "
                  "connections without an answer, tell it to.",
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
                  "its server's limit of a request) or recycled after so many, a handler that closes its own socket.",
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
        .cause = Cause::request_rejected,
        .title = "closed while the request was still being sent",
        .happened = "The upstream ended the connection with a part of the request still to come: it did not want the "
                    "rest.",
        .evidence =
            "A FIN or RST that acknowledges a part of a request larger than one flight (14,600 bytes), with no "
            "answer. Variant early_answer: response bytes came first (possible); so few of them before an RST (less "
            "than a segment) count as well where all had been acknowledged. An upstream that dies in the middle "
            "of an upload looks the same.",
        .proxy_says =
            "413, or another answer that came early, if the proxy reads it before its write fails; else nginx: "
            "502, \"writev() failed (32: Broken pipe)\" or \"(104: Connection reset by peer)\".",
        .remedy = "Look at the upstream's limits on a request's body (client_max_body_size, LimitRequestBody, the "
                  "framework's own), and at its log for what it refused or where it crashed.",
    },
    CauseText{
        .cause = Cause::path_dropped,
        .title = "the connection was dropped silently between the two hosts",
        .happened =
            "A request on a connection that had been idle met silence: nothing of it was ever acknowledged, for "
            "all retransmissions. A firewall, NAT or load balancer between had forgotten the connection, or the "
            "upstream's host was gone.",
        .evidence =
            "Nothing of the request is acknowledged a second or more after it was sent, when this host's kernel "
            "gives up, its process closes (gave_up), or a bare RST comes. Variant unanswered_probes: the request "
            "was acknowledged, then this host's kernel gave up on the silence.",
        .proxy_says = "nginx: 504, \"upstream timed out (110: Connection timed out)\", or 502 once an RST came.",
        .remedy = "TCP keep-alive towards the upstream below the idle limit of what lies between (NAT gateways and "
                  "firewalls: 5 to 60 minutes): nginx proxy_socket_keepalive on with tcp_keepalive_time, "
                  "or a shorter idle limit of the pool.",
    },
    CauseText{
        .cause = Cause::accept_stalled,
        .title = "the connection opened, and its first request was never taken",
        .happened =
            "The handshake was answered, but nothing of the first request was ever acknowledged: the upstream's "
            "kernel held the connection outside a full accept queue, and dropped what came on it.",
        .evidence =
            "First exchange, right after the handshake; nothing of the request is acknowledged a second or more "
            "later, for all retransmissions. A path that fails just then, or drops large segments (PMTU), looks "
            "the same: a request of more than one segment is possible only.",
        .proxy_says = "nginx: 504, \"upstream timed out (110) while reading response header\".",
        .remedy =
            "On the upstream's host: ListenOverflows (nstat -az TcpExtListenOverflows), the backlog of its listen() "
            "and net.core.somaxconn, and whether its workers accept at all.",
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
        .evidence = "SYN_SENT ended in CLOSE after at least one retransmission, or after half a second, and no answer "
                    "came. Variant gave_up: this host's process stopped waiting before the kernel did. Backend cgroup "
                    "sees neither ICMP errors nor shutdown(), HAProxy's way to give up: then it is possible.",
        .proxy_says = "nginx: 504, \"upstream timed out (110) while connecting to upstream\". HAProxy: 503 sC--.",
        .remedy = "A listen queue that overflows (a server that does not accept for a while: a blocked event loop, a "
                  "backlog that is too short), a firewall that drops, or a host that is gone. Look at the upstream's "
                  "ListenOverflows and ListenDrops (nstat -az), at its queue while it lasts (ss -ltn: Recv-Q above "
                  "Send-Q), and at the route. Where other servers do the same work, let the proxy try the next one at "
                  "once (HAProxy: option redispatch 1; nginx: several servers in the upstream block).",
    },
    CauseText{
        .cause = Cause::connect_unreachable,
        .title = "the network said no",
        .happened = "A router, a firewall or the upstream's host answered the SYN with an ICMP error.",
        .evidence =
            "SYN_SENT ended in CLOSE without an RST, with the error that the kernel makes of ICMP: no route to "
            "host, network unreachable, or refused by a port that a firewall rejects. With backend cgroup, which "
            "sees no errors: the kernel itself ended SYN_SENT at once (possible).",
        .proxy_says = "nginx: 502, \"connect() failed (113: No route to host)\". HAProxy: 503 SC--.",
        .remedy =
            "The route to the upstream, firewall rules that reject, and whether the upstream's host is up: a gateway "
            "says host unreachable when nobody answers its ARP.",
    },
    CauseText{
        .cause = Cause::handshake_failed,
        .title = "TLS's handshake with the upstream failed",
        .happened =
            "The connection ended before a request could be sent on it: in TLS's handshake, or right after this "
            "host's last part of it.",
        .evidence =
            "The connection began with a TLS handshake record and this host sent no application data. The "
            "upstream's FIN or RST came with the handshake acknowledged, unanswered (proven), or less than 900 ms "
            "after its last bytes (likely: an alert, as a rule). Or this host closed first and answered its client "
            "with an error in the same turn (likely; backend trace): the upstream's certificate, perhaps.",
        .proxy_says = "nginx: 502, \"peer closed connection in SSL handshake\", \"SSL_do_handshake() failed\" or "
                      "\"upstream SSL certificate verify error\".",
        .remedy =
            "Look at both ends' TLS settings: versions and ciphers, the name (SNI) and certificate authority that the "
            "proxy expects, a client certificate that the upstream demands; or a port that speaks no TLS.",
    },
    CauseText{
        .cause = Cause::proxy_timeout,
        .title = "the proxy stopped waiting for the upstream",
        .happened = "The upstream had the request and did not answer for so long that this host's process gave up, and "
                    "answered its client by itself.",
        .evidence = "This host closed first, with the request acknowledged and not one byte of an answer; in the same "
                    "turn its process answered a client that had been waiting since before the request (likely; "
                    "possible where another thread of it did). Backend trace alone sees that.",
        .proxy_says = "nginx: 504, \"upstream timed out (110) while reading response header from upstream\". HAProxy: "
                      "504 sH--. Apache httpd: 502 or 504. Varnish: 503.",
        .remedy = "Look at why the upstream is slow: a handler that blocks its event loop, too few workers, a slow "
                  "database. Raise the proxy's timeout (nginx proxy_read_timeout, HAProxy timeout server) only where "
                  "such answers are meant to take as long.",
        .by_trace_alone = true,
    },
    CauseText{
        .cause = Cause::client_abort,
        .title = "the client left before the answer",
        .happened = "The client closed or reset its connection while its request was with the upstream, so the proxy "
                    "gave the request up.",
        .evidence = "This host closed first, with the request acknowledged and not one byte of an answer; in the same "
                    "turn its process let go of a client whose FIN or RST had come while it waited (likely; possible "
                    "where another thread of it did). A client that half-closes and waits looks the same. Backend "
                    "trace alone sees that.",
        .proxy_says = "nginx: 499. HAProxy: 400 or no status, CH-- or CD--. Envoy: DC.",
        .remedy = "None at the proxy. Where it is frequent, the upstream is slower than the clients' patience: look at "
                  "how long these requests had waited (close.after_request_ms).",
        .by_trace_alone = true,
    },
    CauseText{
        .cause = Cause::upstream_benched,
        .title = "an error without an attempt, after a failure before",
        .happened = "After failures (races, as a rule) the proxy set the upstream aside for some seconds, and answered "
                    "clients with an error of its own. These are secondary: the record's caused_by names the failure "
                    "that they follow from.",
        .evidence = "A process that had lost an exchange answered 502 (likely) or 503 (possible: a limit of its own "
                    "answers the same) to a client that asked after that, and had begun no request to any upstream in "
                    "between. Sixteen a second are told of, with the number of those before. Backend trace alone sees "
                    "that; not in a process that goes on asking other upstreams.",
        .proxy_says =
            "nginx: 502, \"no live upstreams while connecting to upstream\". Apache httpd: 503, \"all workers are "
            "in error state\" (retry=60). HAProxy: 503, <NOSRV>.",
        .remedy = "Mend the failure before. Where one failure may not cost ten seconds: nginx max_fails=0, or a larger "
                  "max_fails with a shorter fail_timeout; Apache httpd retry=0; more than one upstream server.",
        .by_trace_alone = true,
    },
    CauseText{
        .cause = Cause::closed_on_request,
        .title = "a server on this host closed an idle connection as a request came",
        .happened = "This host's server closed a connection that had rested, and a request of its client lay unread in "
                    "it or came right after. It is the keep-alive race as the upstream sees it.",
        .evidence = "The process closed with bytes unread that had come after at least 900 ms of rest (likely; proven "
                    "where the connection is followed), or payload came after close() to a connection whose last word "
                    "was the server's answer (proven). What is as short as TLS's farewell does not count. Backend "
                    "trace alone sees that; where the client is on this host too, it is evidence for its verdict.",
        .proxy_says = "Nothing in the server's own log. The client, or the proxy before this host: see keepalive_race.",
        .remedy = "Raise this server's idle timeout above that of its clients by 5 s, or lower theirs below it by 1 s: "
                  "see keepalive_race. If the process was ending, let it drain its connections first.",
        .by_trace_alone = true,
    },
    CauseText{
        .cause = Cause::server_cut_response,
        .title = "a server on this host reset a connection under its own answer",
        .happened = "This host sent an RST while bytes of its server's answer were not acknowledged. The client's "
                    "kernel may drop what its process has not read.",
        .evidence = "close() with bytes of the request unread, SO_LINGER 0, or payload that came after close(): each "
                    "makes an RST; less than 900 ms before, the server had sent bytes that were still unacknowledged. "
                    "Likely: the client may have had them by then. Backend trace alone sees that.",
        .proxy_says = "The client: a truncated answer, or \"connection reset by peer\" in place of a 413 or 400.",
        .remedy = "Let the server read the rest of the request, or close its sending direction and read on for a while "
                  "(nginx: lingering_close), before it closes. If the process was ending, look for what ended it.",
        .by_trace_alone = true,
    },
    CauseText{
        .cause = Cause::accept_overflow,
        .title = "a listener on this host turned connections away",
        .happened =
            "The queue of connections that no process had accepted yet was full. The kernel dropped SYNs, or the "
            "last ACK of handshakes, and their clients wait and try again. One verdict a second at most for "
            "each listener, with the number that was turned away.",
        .evidence = "A SYN or a handshake's last ACK met a listening socket with more connections to accept than its "
                    "backlog allows (proven; the kernel counts the same as TcpExtListenOverflows). Backend trace alone "
                    "sees that. A client on this host shows connect_timeout or accept_stalled, proven by it.",
        .proxy_says = "Nothing in the server's own log. The proxy before it: see connect_timeout and accept_stalled.",
        .remedy = "Find out why the server doesn't accept: all its workers busy, or its event loop blocked. A longer "
                  "queue (listen()'s backlog and net.core.somaxconn) helps with bursts alone.",
        .by_trace_alone = true,
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
    case Cause::stale_response:
        return "stale_response";
    case Cause::upstream_closed:
        return "upstream_closed";
    case Cause::upstream_reset:
        return "upstream_reset";
    case Cause::response_cut:
        return "response_cut";
    case Cause::request_rejected:
        return "request_rejected";
    case Cause::path_dropped:
        return "path_dropped";
    case Cause::accept_stalled:
        return "accept_stalled";
    case Cause::connect_refused:
        return "connect_refused";
    case Cause::connect_timeout:
        return "connect_timeout";
    case Cause::connect_unreachable:
        return "connect_unreachable";
    case Cause::handshake_failed:
        return "handshake_failed";
    case Cause::proxy_timeout:
        return "proxy_timeout";
    case Cause::client_abort:
        return "client_abort";
    case Cause::upstream_benched:
        return "upstream_benched";
    case Cause::closed_on_request:
        return "closed_on_request";
    case Cause::server_cut_response:
        return "server_cut_response";
    case Cause::accept_overflow:
        return "accept_overflow";
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
    case Variant::early_answer:
        return "early_answer";
    case Variant::unanswered_probes:
        return "unanswered_probes";
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
                                    Variant::gave_up,      Variant::early_answer,  Variant::unanswered_probes};
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
