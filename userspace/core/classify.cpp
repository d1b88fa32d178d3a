// SPDX-License-Identifier: GPL-2.0-only OR MIT
//
// The order of questions: did the connection open at all; did this host close first (then it is no accident of
// the upstream's); had the answer begun; FIN or RST; how much of the request does it acknowledge; and only where
// sequence numbers leave it open, what this upstream's idle timeout is.
#include "core/classify.h"

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <utility>

#include <fmt/format.h>

#include "core/flags.h"
#include "core/units.h"

namespace finrace {

namespace {

/// Slack for schedulers and event loops at both ends, on top of round-trip times.
constexpr std::uint64_t loop_slack_ms = 100;

/// A FIN this soon after the response's last byte was decided on with the response.
constexpr std::uint32_t close_with_response_ms = 100;

/// The least that any path carries whole without a thought of its MTU (RFC 9293 3.7.1).
constexpr std::uint32_t one_segment_bytes = 536;

/// What Ethernet's MTU leaves of a segment.
constexpr std::uint32_t full_segment_bytes = 1460;

/// A request that goes without an acknowledgement for so long is due to have been retransmitted: RFC 6298's initial
/// timeout.
constexpr std::uint32_t silence_ms = 1000;

/// Who waits for an opening for less has not found that nobody answers.
constexpr std::uint64_t shortest_patience_ns = 500 * ns_per_ms;

/// "GET / HTTP/1.1" and two line ends: RFC 9112 3.
constexpr std::uint32_t shortest_http1_request_bytes = 18;

std::uint64_t end_ns(const event& e)
{
    const connection& c = e.connection;
    if (has(c, CONNECTION_LOCAL_FIRST) && c.local_close_ns)
        return c.local_close_ns;
    if (has(c, CONNECTION_PEER_FIN) && c.peer_fin_ns)
        return c.peer_fin_ns;
    if (has(c, CONNECTION_PEER_RESET))
        return c.peer_reset_ns;
    return e.timestamp_ns;
}

/// What icmp_err_convert and icmpv6_err_convert make of ICMP's refusals (Linux 6.12).
bool is_icmp_error(std::uint16_t error)
{
    switch (error) {
    case ENETUNREACH:
    case EHOSTUNREACH:
    case EHOSTDOWN:
    case ENONET:
    case ECONNREFUSED:
    case ENOPROTOOPT:
    case EOPNOTSUPP:
    case EPROTO:
    case EACCES:
        return true;
    default:
        return false;
    }
}

/// For people, who would take "0 ms" for nothing at all.
std::string ms_text(std::uint64_t ns)
{
    const double ms = static_cast<double>(ns) / ns_per_ms;
    return fmt::format("{:.{}f} ms", ms, ms < 0.095 ? 3 : ms < 9.95 ? 1 : 0);
}

/// The facts that the judgements share.
struct Evidence {
    const event& e;
    const connection& c;
    std::optional<IdleTimeout> timeout;
    std::uint32_t longest_answered_ms; ///< this upstream's connections answered after so long a rest
    std::uint64_t rtt_ms;
    std::uint64_t after_ms;     ///< request to end
    const CloseHistory& closes; ///< of this upstream

    Evidence(const event& e_, const Upstream& upstream)
        : e(e_), c(e_.connection), timeout(upstream.idle_timeout.timeout()),
          longest_answered_ms(upstream.longest_answered_idle_ms), rtt_ms(e_.srtt_us / 1000),
          after_ms(close_after_request_ns(e_) / ns_per_ms), closes(upstream.closes)
    {
    }

    /// The upstream was closing while the request was on its way, as far as time can tell.
    [[nodiscard]] bool in_race_window() const { return after_ms <= 2 * rtt_ms + loop_slack_ms; }

    [[nodiscard]] bool speaks(connection_protocol protocol) const
    {
        return (c.flags & CONNECTION_PROTOCOL) >> CONNECTION_PROTOCOL_SHIFT == protocol;
    }

    /// TLS, before a request could be sent.
    [[nodiscard]] bool in_handshake() const { return has(c, CONNECTION_HANDSHAKE); }

    /// Of a close after so long a rest to this upstream's idle timeout.
    [[nodiscard]] Nearness nearness_to_timeout(std::uint64_t rested_ms) const
    {
        return timeout ? timeout->nearness(rested_ms, rtt_ms) : Nearness::far;
    }

    [[nodiscard]] std::uint64_t rested_ms() const { return c.idle_ms + after_ms; }

    /// An idle close is thinkable at all.
    [[nodiscard]] bool rested() const
    {
        return is_reused(c) || c.idle_ms >= shortest_idle_timer_ms || has(c, CONNECTION_ADOPTED);
    }

    [[nodiscard]] bool ends_near_timeout() const { return nearness_to_timeout(rested_ms()) != Nearness::far; }

    /// No idle timer is as short as this rest, for connections have outlived one of twice that: what is looked at once
    /// in a while (gunicorn's threads) closes after one timer or two.
    [[nodiscard]] bool rested_less_than_others() const { return longest_answered_ms > 2 * rested_ms(); }

    /// So few bytes on a used connection may be TLS's farewell, or HTTP/2's (RFC 9113 6.5, 6.7 to 6.9): no request.
    /// HTTP/1 has none; less than a request line may be the end of an earlier request's body.
    [[nodiscard]] bool asks_farewell() const
    {
        const std::uint32_t most = speaks(PROTOCOL_HTTP1)   ? shortest_http1_request_bytes - 1
                                   : speaks(PROTOCOL_HTTP2) ? 2 * FINRACE_TLS_FAREWELL_BYTES
                                                            : FINRACE_TLS_FAREWELL_BYTES;
        return is_reused(c) && e.request_bytes <= most;
    }

    /// HTTP/2 within TLS looks like HTTP/1 there: so few bytes may be frames that ask nothing (PING, WINDOW_UPDATE).
    [[nodiscard]] bool may_ask_nothing() const
    {
        return speaks(PROTOCOL_TLS) && is_reused(c) && e.request_bytes <= 2 * FINRACE_TLS_FAREWELL_BYTES;
    }

    /// The upstream's last words, just before its close, were so few that they may be such a farewell: no answer.
    [[nodiscard]] bool farewell_at_close() const
    {
        return !speaks(PROTOCOL_HTTP1) && asked() && e.response_bytes > 0 &&
               e.response_bytes <= FINRACE_TLS_FAREWELL_BYTES && c.fin_idle_ms < close_with_response_ms;
    }

    /// All of the request was acknowledged by a close that the upstream's timer explains.
    [[nodiscard]] bool unread_at_timeout(std::uint32_t unacked) const
    {
        return unacked == 0 && in_race_window() && ends_near_timeout();
    }

    /// The first request on a connection that had just been opened.
    [[nodiscard]] bool fresh() const
    {
        const std::uint64_t handshakes = speaks(PROTOCOL_TLS) ? 2 : 1;
        return !is_reused(c) && (end_ns(e) - c.opened_ns) / ns_per_ms <= 2 * rtt_ms * handshakes + loop_slack_ms;
    }

    /// A request is under way. A write of no bytes, or one that failed, asked nothing; nor does a handshake's end, nor
    /// what is known to be too short.
    [[nodiscard]] bool asked() const
    {
        return c.exchange > 0 && (e.request_bytes > 0 || has(c, CONNECTION_ADOPTED_IN_EXCHANGE)) &&
               !(in_handshake() && c.received_before > 0) &&
               !((speaks(PROTOCOL_TLS) || speaks(PROTOCOL_HTTP2)) && asks_farewell());
    }

    [[nodiscard]] bool unanswered() const { return asked() && e.response_bytes == 0; }

    [[nodiscard]] std::string after_text() const { return ms_text(close_after_request_ns(e)); }

    [[nodiscard]] std::string idle_text() const
    {
        if (!is_reused(c))
            return fmt::format("opened {} ms ahead", c.idle_ms);
        return fmt::format("idle for {} ms", c.idle_ms);
    }

    [[nodiscard]] std::string timeout_text() const
    {
        return timeout ? fmt::format(" (its idle timeout: {} ms)", timeout->ms) : std::string();
    }
};

Classification verdict(const Evidence& evidence, Cause cause, Variant variant, Certainty certainty, std::string message)
{
    const connection& c = evidence.c;
    // HTTP/2's streams overlap: what is under way may be no request (WINDOW_UPDATE), and what came no answer to it.
    if (evidence.speaks(PROTOCOL_HTTP2) && c.exchange > 0) {
        const bool crossed = variant == Variant::fin_crossed || variant == Variant::reset_crossed;
        certainty = crossed && certainty != Certainty::possible ? Certainty::likely : Certainty::possible;
    }
    if (evidence.may_ask_nothing())
        certainty = Certainty::possible;
    const bool began_before_us =
        has(c, CONNECTION_ADOPTED_IN_EXCHANGE) || (cause == Cause::stale_reuse && c.peer_fin_ns == 0);
    return {
        .ending = Ending::verdict,
        .verdict = Verdict{.cause = cause,
                           .variant = variant,
                           .certainty = certainty,
                           .incomplete = c.lost_events > 0 || began_before_us,
                           .message = std::move(message)},
        .learned_idle_ms = std::nullopt,
    };
}

Classification harmless(Ending ending, std::optional<std::uint32_t> learned = std::nullopt)
{
    return {.ending = ending, .verdict = std::nullopt, .learned_idle_ms = learned};
}

Classification unclassified()
{
    return harmless(Ending::unclassified);
}

Classification judge_open_failed(const Evidence& evidence)
{
    const event& e = evidence.e;
    const connection& c = evidence.c;
    const bool error_seen = (e.observed & OBSERVED_SOCKET_ERROR) != 0;
    // Older than the tracer: when its first SYN was sent is not known.
    const std::string waited =
        c.opened_ns != 0 ? fmt::format(" in {}", ms_text(e.timestamp_ns - c.opened_ns)) : std::string();

    if (has(c, CONNECTION_PEER_RESET))
        return verdict(
            evidence, Cause::connect_refused, Variant::none, Certainty::proven,
            fmt::format("The upstream's host answered the SYN with an RST{}: nobody listens there.", waited));
    if (error_seen && is_icmp_error(e.socket_error))
        return verdict(evidence, Cause::connect_unreachable, Variant::none,
                       e.socket_error == ECONNREFUSED ? Certainty::likely : Certainty::proven, // an RST's error as well
                       fmt::format("An ICMP error answered the SYN{}: {}.", waited,
                                   std::generic_category().message(e.socket_error)));
    // Neither an RST nor close() ended it: an ICMP error did, which comes at once (a router that first asks for the
    // host's address takes longer than the second SYN, which leaves after 1 s: RFC 6298 5.5); or its process, by
    // connect(AF_UNSPEC), or shutdown() as HAProxy has it, which both disconnect: then there is no error yet
    // (tcp_disconnect()).
    const bool not_closed =
        !error_seen && (e.observed & OBSERVED_CLOSE_CALL) != 0 && !has(c, CONNECTION_SOCKET_CLOSED | waiting_resets);
    const bool by_process = (has(c, CONNECTION_SOCKET_CLOSED) || error_seen) && (!error_seen || e.socket_error == 0);
    const bool at_length = c.opened_ns != 0 && e.timestamp_ns - c.opened_ns >= shortest_patience_ns;
    if (e.retransmits == 0 && at_length && (by_process || not_closed))
        return verdict(evidence, Cause::connect_timeout, Variant::gave_up,
                       by_process ? Certainty::likely : Certainty::possible,
                       fmt::format("No answer to the SYN{}, when this host's process gave up{}.", waited,
                                   by_process ? "" : " (or, which looks the same here, an ICMP error came)"));
    if (not_closed && e.retransmits == 0)
        return verdict(evidence, Cause::connect_unreachable, Variant::none, Certainty::possible,
                       fmt::format("This host's kernel gave the SYN up{}, as an ICMP error makes it do.", waited));
    if (e.retransmits == 0)
        return unclassified();
    const std::string tries = fmt::format("its {} retransmission{}", e.retransmits, e.retransmits == 1 ? "" : "s");
    if (error_seen && e.socket_error == ETIMEDOUT)
        return verdict(evidence, Cause::connect_timeout, Variant::none, Certainty::proven,
                       fmt::format("No answer to the SYN and its {} retransmissions{}.", e.retransmits, waited));
    // What the wire shows; an ICMP error in answer would show as well, but for a filter of the capture's.
    if (!error_seen && (e.observed & OBSERVED_WIRE) != 0)
        return verdict(evidence, Cause::connect_timeout, Variant::none, Certainty::likely,
                       fmt::format("No answer to the SYN and {} was captured{}.", tries, waited));
    // The process closed its socket, or disconnected it. Where errors are not seen, ICMP's look like the latter.
    if (by_process)
        return verdict(evidence, Cause::connect_timeout, Variant::gave_up, Certainty::proven,
                       fmt::format("No answer to the SYN and {}{}, when this host's process gave "
                                   "up.",
                                   tries, waited));
    if (not_closed)
        return verdict(evidence, Cause::connect_timeout, Variant::none, Certainty::possible,
                       fmt::format("No answer to the SYN and {}{}: this host's process gave up, "
                                   "its kernel did, or, which looks the same here, an ICMP error came.",
                                   tries, waited));
    return unclassified();
}

/// A FIN or RST that acknowledges a part of the request.
Classification judge_part_taken(const Evidence& evidence, std::uint32_t unacked, const char* segment)
{
    const event& e = evidence.e;
    if (unacked == 0 || unacked >= e.request_bytes || has(evidence.c, CONNECTION_ADOPTED_IN_EXCHANGE))
        return unclassified();
    const bool answered = e.response_bytes > 0;
    // An idle close may have met the request's beginning; and what came may be no answer (HTTP/2's WINDOW_UPDATE).
    const bool may_be_other =
        answered || e.request_bytes <= one_flight_bytes ||
        (evidence.rested() && evidence.in_race_window() && (!evidence.timeout || evidence.ends_near_timeout()));
    return verdict(evidence, Cause::request_rejected, answered ? Variant::early_answer : Variant::none,
                   may_be_other ? Certainty::possible : Certainty::likely,
                   fmt::format("The upstream's {} came {} after the request began and leaves {} of its {} bytes "
                               "unacknowledged{}.",
                               segment, evidence.after_text(), unacked, e.request_bytes,
                               answered ? "; it had answered already" : ""));
}

/// The same with a part of the request still to come: of one that fits one flight, that part was on its way.
Classification judge_rejected(const Evidence& evidence, std::uint32_t unacked, const char* segment)
{
    return evidence.e.request_bytes > one_flight_bytes ? judge_part_taken(evidence, unacked, segment) : unclassified();
}

/// Nothing of the request was acknowledged for so long that it was retransmitted, in vain.
std::optional<Classification> judge_silence(const Evidence& evidence, Variant variant)
{
    const event& e = evidence.e;
    const connection& c = evidence.c;
    // A window of zero, whose probes are no retransmissions, is no silence.
    if (evidence.after_ms < silence_ms || e.retransmits == 0 || evidence.asks_farewell())
        return std::nullopt;
    const bool one_segment = e.request_bytes <= one_segment_bytes;
    const std::string silence = fmt::format(
        "{} after the request nothing of it had been acknowledged, for all retransmissions", evidence.after_text());
    if (c.idle_ms >= shortest_idle_timer_ms)
        return verdict(evidence, Cause::path_dropped, variant, one_segment ? Certainty::likely : Certainty::possible,
                       fmt::format("{}; the connection had been {}: something between had dropped it, or the "
                                   "upstream's host was gone.",
                                   silence, evidence.idle_text()));
    if (is_reused(c))
        return verdict(evidence, Cause::path_dropped, variant, Certainty::possible,
                       silence + ", on a connection in use: the path or the upstream's host had failed, or segments of "
                                 "this size don't pass.");
    return verdict(evidence, Cause::accept_stalled, variant, one_segment ? Certainty::likely : Certainty::possible,
                   silence + "; the handshake had been answered: its accept queue was full, or the path failed just "
                             "then.");
}

/// A FIN or RST that left bytes of the request unacknowledged, with no answer.
Classification judge_crossing(const Evidence& evidence, std::uint32_t unacked, Variant variant)
{
    const event& e = evidence.e;
    // Of a request older than the tracer, a part may have been acknowledged before.
    const bool whole = unacked >= e.request_bytes && !has(evidence.c, CONNECTION_ADOPTED_IN_EXCHANGE);
    const char* segment = variant == Variant::fin_crossed ? "FIN" : "RST";

    if (evidence.fresh())
        return verdict(evidence, variant == Variant::fin_crossed ? Cause::upstream_closed : Cause::upstream_reset,
                       Variant::on_accept, whole ? Certainty::proven : Certainty::likely,
                       fmt::format("The upstream closed the connection as soon as it had accepted it: its {} crossed "
                                   "the first request.",
                                   segment));
    // The upstream had taken a part. Of a request that fits one flight the rest was on its way; of a larger one it was
    // still to come.
    if (!whole && e.request_bytes > one_flight_bytes) {
        if (!evidence.rested() || !evidence.in_race_window() || !evidence.ends_near_timeout())
            return judge_rejected(evidence, unacked, segment);
        return verdict(evidence, Cause::keepalive_race,
                       variant == Variant::fin_crossed ? Variant::fin_lingering : Variant::reset_unread,
                       Certainty::possible,
                       fmt::format("The upstream's {} came {} after the request began, near its idle timeout of {} ms, "
                                   "and leaves {} of {} request bytes: its idle close, or a refusal of the rest.",
                                   segment, evidence.after_text(), evidence.timeout->ms, unacked, e.request_bytes));
    }
    // Long after the request, which had been sent again and again: silence, into which the upstream closed.
    if (whole && !evidence.in_race_window()) {
        if (auto silence = judge_silence(evidence, Variant::none))
            return *std::move(silence);
    }
    if (!whole && !evidence.in_race_window())
        return unclassified();
    // An idle timer that fires between two segments of one flight is a rare thing; an application that ends what it has
    // read the head of is none.
    const bool adopted = has(evidence.c, CONNECTION_ADOPTED_IN_EXCHANGE);
    const bool at_rest = evidence.rested() && (evidence.timeout ? evidence.ends_near_timeout()
                                                                : evidence.c.idle_ms >= shortest_idle_timer_ms);
    if (!whole && !at_rest && !adopted)
        return judge_part_taken(evidence, unacked, segment);
    Classification race =
        verdict(evidence, Cause::keepalive_race, variant,
                whole                         ? Certainty::proven
                : evidence.timeout || adopted ? Certainty::likely
                                              : Certainty::possible,
                fmt::format("The upstream closed this connection, {}{}, while the request was on its way: its {} "
                            "came {} after the request and acknowledges {} of {} request bytes.",
                            evidence.idle_text(), evidence.timeout_text(), segment, evidence.after_text(),
                            e.request_bytes - std::min(unacked, e.request_bytes), e.request_bytes));
    // As good as a harmless close, which a busy proxy's pool seldom lives to see.
    if (race.verdict->certainty == Certainty::proven && is_reused(evidence.c) && evidence.in_race_window() &&
        evidence.rested_ms() >= shortest_idle_timer_ms)
        race.learned_idle_ms = static_cast<std::uint32_t>(std::min<std::uint64_t>(evidence.rested_ms(), UINT32_MAX));
    return race;
}

/// All of the request was acknowledged and nothing answered: a race only where the upstream's timer says so.
/// `race` is what it is called then, `otherwise` what it is called if not.
Classification judge_unanswered(const Evidence& evidence, Variant race, Cause otherwise)
{
    const connection& c = evidence.c;
    const char* segment = race == Variant::fin_lingering ? "FIN" : "RST";
    const bool rested = evidence.rested();

    const auto nearness = rested ? evidence.nearness_to_timeout(evidence.rested_ms()) : Nearness::far;
    // A server that is short of workers may leave a request unread for longer than a race's window, until its timer
    // fires: Apache httpd does.
    const bool late = nearness == Nearness::at && 2 * std::uint64_t{c.idle_ms} >= evidence.timeout->ms;
    const bool thinkable =
        rested && evidence.timeout && evidence.timeout->reaches(evidence.rested_ms(), evidence.rtt_ms);
    if (late || (thinkable && evidence.in_race_window())) {
        const bool at = nearness == Nearness::at && evidence.in_race_window();
        return verdict(
            evidence, Cause::keepalive_race, race, at ? Certainty::likely : Certainty::possible,
            fmt::format("The upstream's {} came {} after the request; the connection had been {}, {} its idle "
                        "timeout of {} ms: its kernel had the request, its application {} never read it.",
                        segment, evidence.after_text(), evidence.idle_text(), at ? "up to" : "near",
                        evidence.timeout->ms, at ? "probably" : "perhaps"));
    }
    if (race == Variant::reset_unread && evidence.closes.closes_behind_answers(evidence.e))
        return verdict(evidence, Cause::keepalive_race, race, Certainty::likely,
                       fmt::format("The upstream's RST came {} after the request, right behind its last answer, as its "
                                   "other closes do: its kernel had the request, its application probably never read "
                                   "it.",
                                   evidence.after_text()));
    if (rested && evidence.in_race_window() && !evidence.timeout && c.idle_ms >= shortest_idle_timer_ms &&
        !evidence.rested_less_than_others())
        return verdict(evidence, Cause::keepalive_race, race, Certainty::possible,
                       fmt::format("The upstream's {} came {} after the request; the connection had been {}: an "
                                   "idle close, if this upstream's idle timeout (not learned yet) is about as long; "
                                   "else its application closed, or died.",
                                   segment, evidence.after_text(), evidence.idle_text()));
    // The same of a timer of which little is known; and, before any is, of a server that is short of workers.
    if (rested && c.idle_ms >= shortest_idle_timer_ms && !evidence.rested_less_than_others() &&
        (evidence.in_race_window() || (!evidence.timeout && c.idle_ms >= evidence.after_ms)) &&
        evidence.closes.has_closed_after_such_rest(evidence.e))
        return verdict(evidence, Cause::keepalive_race, race, Certainty::possible,
                       fmt::format("The upstream's {} came {} after the request; the connection had been {}: in all as "
                                   "long a rest as it has closed another after. Its kernel had the request, its "
                                   "application perhaps never read it.",
                                   segment, evidence.after_text(), evidence.idle_text()));
    // How long it had rested before a request older than the tracer is not known.
    const bool may_be_race = has(c, CONNECTION_ADOPTED_IN_EXCHANGE) && evidence.in_race_window();
    return verdict(
        evidence, otherwise, Variant::none,
        may_be_race ? Certainty::possible
        : rested || evidence.e.request_bytes > one_flight_bytes // which may not have been written whole
            ? Certainty::likely
            : Certainty::proven,
        fmt::format("The upstream's kernel had all that was sent of the request; {} after it the connection was {} "
                    "without one byte of an answer.",
                    evidence.after_text(), otherwise == Cause::upstream_closed ? "closed" : "reset"));
}

/// Response bytes before a close that acknowledges nothing of the request: no answer to it, though the proxy takes them
/// for one. Other protocols than HTTP have words of their own for a close.
Classification judge_stale_response(const Evidence& evidence, const char* segment)
{
    const event& e = evidence.e;
    if (evidence.speaks(PROTOCOL_HTTP2) || has(evidence.c, CONNECTION_ADOPTED_IN_EXCHANGE))
        return unclassified();
    if (evidence.fresh())
        return verdict(evidence, Cause::upstream_closed, Variant::on_accept, Certainty::likely,
                       fmt::format("The upstream closed the connection as soon as it had accepted it: its {} bytes and "
                                   "its {} crossed the first request.",
                                   e.response_bytes, segment));
    return verdict(evidence, Cause::stale_response, Variant::none,
                   evidence.speaks(PROTOCOL_HTTP1) ? Certainty::proven : Certainty::likely,
                   fmt::format("The upstream wrote {} bytes and closed this connection, {}{}, while the request was on "
                               "its way: its {} acknowledges none of the request, so they are no answer to it.",
                               e.response_bytes, evidence.idle_text(), evidence.timeout_text(), segment));
}

/// The upstream ended a connection before a request could be sent: in TLS's handshake, or right after it. A connection
/// that was opened ahead may go later.
Classification judge_handshake(const Evidence& evidence, const char* segment)
{
    const connection& c = evidence.c;
    if (c.received_before > 0 && c.fin_idle_ms >= shortest_idle_timer_ms)
        return harmless(Ending::idle_close_by_peer);
    return verdict(evidence, Cause::handshake_failed, Variant::none,
                   c.received_before == 0 && evidence.e.response_bytes == 0 ? Certainty::proven : Certainty::likely,
                   fmt::format("The upstream's {} ended the connection in TLS's handshake, {} after this host's last "
                               "part of it, {}.",
                               segment, evidence.after_text(),
                               evidence.e.bytes_received > 0
                                   ? fmt::format("{} bytes of its own", evidence.e.bytes_received) + " into it"
                                   : std::string("without a word of its own")));
}

/// A few bytes before a close that acknowledges nothing of the request, or all of it at the upstream's idle timeout:
/// TLS's farewell rather than an answer. `crossed` and `unread` name the race.
std::optional<Classification> judge_farewell(const Evidence& evidence, std::uint32_t unacked, Variant crossed,
                                             Variant unread)
{
    if (!evidence.farewell_at_close())
        return std::nullopt;
    if (unacked >= evidence.e.request_bytes)
        return judge_crossing(evidence, unacked, crossed);
    if (!evidence.unread_at_timeout(unacked))
        return std::nullopt;
    return verdict(evidence, Cause::keepalive_race, unread, Certainty::possible,
                   fmt::format("The upstream closed {} after the request, near its idle timeout of {} ms; the {} bytes "
                               "before that may be TLS's farewell rather than an answer.",
                               evidence.after_text(), evidence.timeout->ms, evidence.e.response_bytes));
}

/// A FIN after response bytes. A sender that died may have left a response half way: TCP does not tell, so what no idle
/// timer would do teaches none.
Classification close_after_response(const connection& c)
{
    if (c.fin_idle_ms < shortest_idle_timer_ms)
        return harmless(Ending::complete_close);
    return harmless(Ending::idle_close_by_peer, c.fin_idle_ms);
}

Classification judge_peer_fin(const Evidence& evidence)
{
    const event& e = evidence.e;
    const connection& c = evidence.c;

    if (has(c, CONNECTION_LOCAL_FIRST))
        return {}; // EVENT_CLOSED tells how that ended
    if (c.exchange == 0 && !has(c, CONNECTION_CARRIED))
        return harmless(Ending::idle_close_by_peer); // never used: a timer for that may be another one
    if (has(c, CONNECTION_EARLIER_UNACKED))
        return unclassified(); // an answer before its request's end (413), or both at once (HTTP/2)
    if (evidence.in_handshake() && c.fin_unacked == 0)
        return judge_handshake(evidence, "FIN");
    if (auto race = judge_farewell(evidence, c.fin_unacked, Variant::fin_crossed, Variant::fin_lingering))
        return *std::move(race);
    if (c.exchange == 0 || e.response_bytes > 0) {
        if (c.fin_unacked > 0)
            return c.fin_unacked < e.request_bytes ? judge_rejected(evidence, c.fin_unacked, "FIN")
                                                   : judge_stale_response(evidence, "FIN");
        return close_after_response(c);
    }
    if (!evidence.asked())
        return harmless(Ending::idle_close_by_peer);
    if (c.fin_unacked > 0)
        return judge_crossing(evidence, c.fin_unacked, Variant::fin_crossed);
    return judge_unanswered(evidence, Variant::fin_lingering, Cause::upstream_closed);
}

Classification judge_peer_reset(const Evidence& evidence)
{
    const event& e = evidence.e;
    const connection& c = evidence.c;

    if (has(c, CONNECTION_PEER_FIN | CONNECTION_LOCAL_FIRST))
        return {}; // the FIN, or EVENT_CLOSED, has decided
    if (c.exchange == 0 && !has(c, CONNECTION_CARRIED))
        return harmless(Ending::idle_close_by_peer);
    if (has(c, CONNECTION_EARLIER_UNACKED))
        return unclassified();
    if (evidence.in_handshake() && has(c, CONNECTION_RESET_HAS_ACK) && c.reset_unacked == 0)
        return judge_handshake(evidence, "RST");
    if (has(c, CONNECTION_RESET_HAS_ACK)) {
        if (auto race = judge_farewell(evidence, c.reset_unacked, Variant::reset_crossed, Variant::reset_unread))
            return *std::move(race);
    }
    if (c.exchange == 0 || e.response_bytes > 0) {
        // The RST's own acknowledgement is newer than the socket's.
        const std::uint32_t unacked = has(c, CONNECTION_RESET_HAS_ACK) ? c.reset_unacked : e.unacked_bytes;
        if (has(c, CONNECTION_RESET_HAS_ACK) && unacked > 0 && unacked >= e.request_bytes)
            return judge_stale_response(evidence, "RST");
        if (unacked > 0)
            return judge_rejected(evidence, unacked, "RST");
        if (evidence.nearness_to_timeout(c.fin_idle_ms) != Nearness::far)
            return harmless(Ending::idle_close_by_peer, c.fin_idle_ms);
        if (c.fin_idle_ms < shortest_idle_timer_ms) {
            // Older than the tracer, or so near to the upstream's timer that a path which stood still may explain it.
            if (c.exchange == 0 || (evidence.timeout && 2 * c.fin_idle_ms >= evidence.timeout->ms))
                return unclassified();
            // Few bytes in answer to a large request, whose rest lies unread as the upstream closes: a 413.
            if (e.request_bytes > one_flight_bytes && e.response_bytes < full_segment_bytes)
                return verdict(evidence, Cause::request_rejected, Variant::early_answer, Certainty::possible,
                               fmt::format("The upstream reset the connection {} ms after {} bytes of an answer to a "
                                           "request of {} bytes: it had not read all of that, or died.",
                                           c.fin_idle_ms, e.response_bytes, e.request_bytes));
            return verdict(evidence, Cause::response_cut, Variant::none, Certainty::likely,
                           fmt::format("The upstream reset the connection {} ms after {} bytes of the response.",
                                       c.fin_idle_ms, e.response_bytes));
        }
        // Also where it fits no timeout: an upstream whose timer was changed is learned anew.
        return harmless(evidence.timeout ? Ending::unclassified : Ending::idle_close_by_peer, c.fin_idle_ms);
    }
    if (!evidence.asked())
        return harmless(Ending::idle_close_by_peer);
    if (has(c, CONNECTION_RESET_FLAGS_UNKNOWN))
        return unclassified();
    if (has(c, CONNECTION_RESET_HAS_ACK)) {
        // A capture does not show that this host's process gave up meanwhile: its FIN waits behind what is silent.
        if ((e.observed & OBSERVED_WIRE) != 0 && e.unacked_bytes >= e.request_bytes) {
            if (auto silence = judge_silence(evidence, Variant::none)) {
                silence->verdict->certainty = Certainty::possible;
                return *std::move(silence);
            }
        }
        if (c.reset_unacked > 0)
            return judge_crossing(evidence, c.reset_unacked, Variant::reset_crossed);
        // What was still to be sent may be what it did not want.
        if (e.request_bytes > one_flight_bytes && (e.observed & OBSERVED_SEND_QUEUE) == 0)
            return unclassified();
        return judge_unanswered(evidence, Variant::reset_unread, Cause::upstream_reset);
    }
    // A bare RST answers a segment that met no socket; but if any of the request was acknowledged, it met one. That has
    // closed since: its own RST, with ACK, comes after a bare one where that segment met it between its steps to CLOSE
    // and to send it (__tcp_close(), 6.18). Sent again and again, it may as well be another host by now.
    if (e.unacked_bytes < e.request_bytes)
        return e.retransmits == 0 ? judge_rejected(evidence, e.unacked_bytes, "RST") : unclassified();
    if (!evidence.in_race_window())
        return judge_silence(evidence, Variant::none).value_or(unclassified());
    if (evidence.fresh())
        return verdict(evidence, Cause::upstream_reset, Variant::none, Certainty::likely,
                       fmt::format("A bare RST answered the first request, {} after it.", evidence.after_text()));
    return verdict(evidence, Cause::keepalive_race, Variant::reset_closed,
                   has(c, CONNECTION_ADOPTED_IN_EXCHANGE) ? Certainty::possible : Certainty::likely,
                   fmt::format("A bare RST answered the request on this connection, {}{}: the upstream's socket was "
                               "gone already, and its close had not been seen here.",
                               evidence.idle_text(), evidence.timeout_text()));
}

Classification judge_sent_after_fin(const Evidence& evidence)
{
    const connection& c = evidence.c;

    if (c.fin_unacked > 0)
        return {}; // more of a request that was under way at the FIN
    const double age_ms = static_cast<double>(c.request_ns - c.peer_fin_ns) / 1e6;
    // A FIN right after a response may have met a request that was answered before its end; this would be its rest.
    // Two alerts (JSSE), or HTTP/2's GOAWAY and one, are as short.
    const bool maybe_farewell =
        !evidence.speaks(PROTOCOL_HTTP1) && evidence.e.request_bytes <= 2 * FINRACE_TLS_FAREWELL_BYTES;
    const bool with_response = is_reused(c) && c.fin_idle_ms < close_with_response_ms;
    if (c.peer_fin_ns != 0 && evidence.fresh())
        return verdict(evidence, Cause::upstream_closed, Variant::on_accept,
                       maybe_farewell ? Certainty::possible : Certainty::proven,
                       "The upstream closed the connection as soon as it had accepted it: its FIN was there before the "
                       "first request.");
    if ((evidence.e.observed & OBSERVED_UNREAD) != 0 && evidence.e.unread_bytes > FINRACE_TLS_FAREWELL_BYTES &&
        !maybe_farewell)
        return verdict(
            evidence, Cause::stale_response, Variant::none, Certainty::likely,
            fmt::format(
                "The request was written {:.{}f} ms after the upstream had closed this connection, {}{}, with {} "
                "bytes of the upstream's unread: they came before the request and are no answer to it.",
                age_ms, age_ms < 9.95 ? 3 : 0, evidence.idle_text(), evidence.timeout_text(), evidence.e.unread_bytes));
    return verdict(
        evidence, Cause::stale_reuse, Variant::none,
        maybe_farewell  ? Certainty::possible
        : with_response ? Certainty::likely
                        : Certainty::proven,
        c.peer_fin_ns == 0
            ? std::string("The request was written into a connection that the upstream had closed before.")
            : fmt::format("The request was written {:.{}f} ms after the upstream had closed this connection, {}{}: its "
                          "FIN had been received.",
                          age_ms, age_ms < 9.95 ? 3 : 0, evidence.idle_text(), evidence.timeout_text()));
}

bool is_harmless(Ending ending)
{
    return ending == Ending::idle_close_by_peer || ending == Ending::idle_close_by_local ||
           ending == Ending::complete_close;
}

/// This host closed first, on silence: what its process did not wait for any longer is no accident of its own. After
/// shutdown() it may wait still; that shows in the end, by an answer, or by what its client was told meanwhile.
std::optional<Classification> judge_local_silence(const Evidence& evidence, bool over)
{
    const event& e = evidence.e;
    if (has(evidence.c, CONNECTION_CLOSED_UNACKED))
        return judge_silence(evidence, Variant::gave_up);
    if (!over || !evidence.unanswered() || has(evidence.c, CONNECTION_ADOPTED_IN_EXCHANGE))
        return std::nullopt;
    const bool never = e.unacked_bytes >= e.request_bytes;
    if (!never && !has(evidence.c, CONNECTION_SHUTDOWN_UNACKED))
        return std::nullopt;
    auto silence = judge_silence(evidence, Variant::gave_up);
    if (silence && !never)
        silence->verdict->certainty = Certainty::possible;
    return silence;
}

/// This host closed first. Why it did not wait for the answer shows in what the client behind the request got.
Classification judge_local_close(const Evidence& evidence, const Outcome& outcome)
{
    const bool unanswered = evidence.unanswered() && !evidence.asks_farewell();
    if (!unanswered && !evidence.in_handshake())
        return harmless(Ending::idle_close_by_local);
    if (outcome.named)
        return {};
    if (!unanswered && (!outcome.client || outcome.client->status < 500 || !outcome.client->answered))
        return harmless(Ending::idle_close_by_local); // a connection that was opened ahead
    if (!outcome.client)
        return unclassified();
    const Client& client = *outcome.client;
    // A proxy that does not watch its clients while it waits ends with an error for one that has left.
    if (client.left && client.status < 500)
        return verdict(evidence, Cause::client_abort, Variant::none, client.certainty,
                       fmt::format("The client left before the upstream had answered, and this host ended the request "
                                   "{} after it was sent.",
                                   evidence.after_text()));
    if (!client.answered)
        return unclassified();
    if (!unanswered)
        return verdict(evidence, Cause::handshake_failed, Variant::none, client.certainty,
                       fmt::format("This host ended TLS's handshake with the upstream, {} after its last part of it, "
                                   "and answered the client itself, with {}.",
                                   evidence.after_text(), client.status));
    // A 200 may be another attempt's, or come out of a cache.
    const bool error = client.status == 0 || client.status >= 500;
    if (auto silence = judge_local_silence(evidence, error))
        return *std::move(silence);
    if (!error && evidence.after_ms * ns_per_ms < shortest_patience_ns) // so soon it has not waited: another's answer
        return unclassified();
    return verdict(evidence, Cause::proxy_timeout, Variant::none, error ? client.certainty : Certainty::possible,
                   fmt::format("This host stopped waiting for the upstream {} after the request and answered the "
                               "client itself{}.",
                               evidence.after_text(),
                               client.status != 0 ? fmt::format(", with {}", client.status) : std::string()));
}

/// This host's kernel gave up on an unanswered request.
Classification judge_given_up(const Evidence& evidence)
{
    const event& e = evidence.e;
    if (evidence.asks_farewell())
        return harmless(Ending::idle_close_by_local);
    if (has(evidence.c, CONNECTION_ADOPTED_IN_EXCHANGE))
        return unclassified();
    if (e.unacked_bytes >= e.request_bytes)
        return judge_silence(evidence, Variant::none).value_or(unclassified());
    if (e.unacked_bytes > 0)
        return unclassified();
    return verdict(
        evidence, Cause::path_dropped, Variant::unanswered_probes,
        (e.observed & OBSERVED_SOCKET_ERROR) != 0 ? Certainty::likely : Certainty::possible,
        fmt::format("The upstream had acknowledged the request; {} after it this host's kernel gave up on its "
                    "silence: the path, or the upstream's host, was gone.",
                    evidence.after_text()));
}

/// This host closed on what it took for an answer (a 408, TLS's farewell) before it had the FIN behind that. A close
/// that acknowledges none of the request was decided on before it came, whoever was first here.
std::optional<Classification> judge_answer_before_request(const Evidence& evidence)
{
    const event& e = evidence.e;
    const connection& c = evidence.c;
    const bool by_fin = has(c, CONNECTION_PEER_FIN);
    if (!by_fin && !(has(c, CONNECTION_PEER_RESET) && has(c, CONNECTION_RESET_HAS_ACK)))
        return std::nullopt;
    const std::uint32_t unacked = by_fin ? c.fin_unacked : c.reset_unacked;
    if (e.response_bytes == 0 || e.request_bytes == 0 || unacked < e.request_bytes || evidence.asks_farewell() ||
        has(c, CONNECTION_EARLIER_UNACKED | CONNECTION_ADOPTED_IN_EXCHANGE))
        return std::nullopt;
    if (!evidence.speaks(PROTOCOL_HTTP1) && e.response_bytes <= FINRACE_TLS_FAREWELL_BYTES)
        return judge_crossing(evidence, unacked, by_fin ? Variant::fin_crossed : Variant::reset_crossed);
    return judge_stale_response(evidence, by_fin ? "FIN" : "RST");
}

/// The last event: counts what was harmless, and decides what lost events would have decided.
Classification judge_closed(const Evidence& evidence, const Outcome& outcome)
{
    const event& e = evidence.e;
    const connection& c = evidence.c;
    const bool unanswered = evidence.unanswered();
    const auto lost = [&c](event_kind kind) { return (c.lost_kinds & 1U << kind) != 0; };

    if (unanswered && kernel_gave_up(e))
        return judge_given_up(evidence);
    if (has(c, CONNECTION_LOCAL_FIRST)) {
        if (auto crossed = judge_answer_before_request(evidence))
            return *std::move(crossed);
        const bool told = has(c, CONNECTION_CLOSED_UNACKED) && has(c, CONNECTION_LOCAL_FIN) && !lost(EVENT_LOCAL_FIN);
        if (auto silence = judge_local_silence(evidence, true); silence && !outcome.named)
            return told ? Classification{} : *std::move(silence);
        return judge_local_close(evidence, outcome);
    }
    if (has(c, CONNECTION_SENT_AFTER_FIN)) {
        if (c.fin_unacked > 0) // as judge_peer_fin() has it; the exchange has moved on since
            return lost(EVENT_PEER_FIN) ? unclassified() : Classification{};
        if (evidence.speaks(PROTOCOL_HTTP1) || e.request_bytes > FINRACE_TLS_FAREWELL_BYTES) // else no request at all
            return lost(EVENT_SENT_AFTER_FIN) ? judge_sent_after_fin(evidence) : Classification{};
        Classification at_fin = close_after_response(c);
        if (!lost(EVENT_PEER_FIN))
            at_fin.learned_idle_ms.reset();
        return at_fin;
    }
    if (has(c, CONNECTION_PEER_FIN)) {
        if (c.peer_fin_ns == 0) // before the tracer, or missed: what it met is not known
            return has(c, CONNECTION_ADOPTED) ? Classification{}
                   : unanswered               ? unclassified()
                                              : harmless(Ending::idle_close_by_peer);
        Classification at_fin = judge_peer_fin(evidence);
        if (!lost(EVENT_PEER_FIN)) {
            if (!is_harmless(at_fin.ending))
                return {};
            at_fin.learned_idle_ms.reset();
        }
        return at_fin;
    }
    if (has(c, CONNECTION_PEER_RESET))
        return lost(EVENT_PEER_RESET) ? judge_peer_reset(evidence) : Classification{};
    return unanswered ? unclassified() : harmless(Ending::idle_close_by_local);
}

} // namespace

bool is_reused(const connection& c)
{
    return c.exchange > 1 || has(c, CONNECTION_CARRIED);
}

bool is_race(Cause cause)
{
    return std::find(race_causes.begin(), race_causes.end(), cause) != race_causes.end();
}

bool is_by_upstream(Cause cause)
{
    return std::find(upstream_ends.begin(), upstream_ends.end(), cause) != upstream_ends.end();
}

std::uint64_t races_of(const UpstreamCounts& counts)
{
    std::uint64_t races = 0;
    for (const auto& [cause, count] : counts.verdicts)
        races += is_race(cause) ? count : 0;
    return races;
}

bool kernel_gave_up(const event& e)
{
    // Unanswered probes end in an RST of the kernel's own (tcp_keepalive_timer()).
    constexpr std::uint32_t closed =
        CONNECTION_PEER_FIN | CONNECTION_PEER_RESET | CONNECTION_LOCAL_FIN | CONNECTION_SOCKET_CLOSED | waiting_resets;
    if (e.kind != EVENT_CLOSED || has(e.connection, closed))
        return false;
    if ((e.observed & OBSERVED_SOCKET_ERROR) != 0)
        return e.socket_error == ETIMEDOUT || is_icmp_error(e.socket_error);
    if ((e.observed & OBSERVED_WIRE) != 0) // whose RST this host's was is the source's to tell
        return !has(e.connection, CONNECTION_LOCAL_RESET);
    return (e.observed & OBSERVED_CLOSE_CALL) != 0;
}

std::uint64_t close_after_request_ns(const event& e)
{
    const connection& c = e.connection;
    const std::uint64_t end = end_ns(e);
    return c.exchange > 0 && end > c.request_ns ? end - c.request_ns : 0;
}

bool depends_on_outcome(const event& e)
{
    static const Upstream any;
    const Evidence evidence(e, any);
    return (e.kind == EVENT_LOCAL_FIN || e.kind == EVENT_CLOSED) && has(e.connection, CONNECTION_CLIENT) &&
           has(e.connection, CONNECTION_LOCAL_FIRST) &&
           (evidence.in_handshake() || (evidence.unanswered() && !evidence.asks_farewell()));
}

Classification classify(const event& e, const Upstream& upstream, const Outcome& outcome)
{
    if (!has(e.connection, CONNECTION_CLIENT))
        return {};
    const Evidence evidence(e, upstream);
    switch (e.kind) {
    case EVENT_OPEN_FAILED:
        return judge_open_failed(evidence);
    case EVENT_PEER_FIN: {
        Classification result = judge_peer_fin(evidence);
        if (is_harmless(result.ending))
            result.ending = Ending::none; // so far: a request may yet be sent into it. EVENT_CLOSED counts it
        return result;
    }
    case EVENT_PEER_RESET:
        return judge_peer_reset(evidence);
    case EVENT_LOCAL_FIN: {
        if (!has(e.connection, CONNECTION_LOCAL_FIRST))
            return {};
        if (auto silence = judge_local_silence(evidence, false))
            return *std::move(silence);
        Classification result = judge_local_close(evidence, outcome);
        if (!result.verdict)
            result.ending = Ending::none; // EVENT_CLOSED counts it
        return result;
    }
    case EVENT_SENT_AFTER_FIN:
        return judge_sent_after_fin(evidence);
    case EVENT_CLOSED:
        return judge_closed(evidence, outcome);
    default:
        return {};
    }
}

namespace {

/// A pool that closes sooner keeps nothing.
constexpr std::uint32_t shortest_own_limit_ms = 100;

/// Whether the last that this host sent was TLS's farewell, or HTTP/2's: it looks like a request without an answer.
bool ends_with_farewell(const event& e)
{
    const auto protocol = (e.connection.flags & CONNECTION_PROTOCOL) >> CONNECTION_PROTOCOL_SHIFT;
    return protocol != PROTOCOL_HTTP1 && is_reused(e.connection) && e.response_bytes == 0 &&
           e.request_bytes <= FINRACE_TLS_FAREWELL_BYTES;
}

/// How long a connection had rested before its last request, if that was answered, in milliseconds. Before its first
/// one it may have rested by another timer; and what met its end had no answer, whatever came before it.
std::uint32_t answered_idle_ms(const event& e)
{
    const connection& c = e.connection;
    return c.exchange > 1 && e.response_bytes > 0 && c.fin_unacked == 0 && c.reset_unacked == 0 ? c.idle_ms : 0;
}

/// How long a connection had rested when this host closed it, in milliseconds; 0 if that is not known.
std::uint32_t rest_at_local_close_ms(const event& e)
{
    const connection& c = e.connection;
    if (ends_with_farewell(e))
        return c.idle_ms;
    const std::uint64_t last_ns = std::max({c.last_byte_ns, e.sent_ns, e.received_ns});
    return c.local_close_ns > last_ns && last_ns != 0
               ? static_cast<std::uint32_t>((c.local_close_ns - last_ns) / ns_per_ms)
               : 0;
}

/// How long it had rested, and was open yet: before its last request, which was answered, or as this host closed it.
/// One that was never used, or for one answer alone (perhaps a stream of events), may have rested by another timer.
std::uint32_t outlived_ms(const event& e, Ending ending)
{
    const std::uint32_t used_ms = answered_idle_ms(e);
    const bool closed_first = ending == Ending::idle_close_by_local && !has(e, CONNECTION_LOCAL_RESET) &&
                              is_reused(e.connection) && e.response_bytes > 0;
    return closed_first ? std::max(used_ms, rest_at_local_close_ms(e)) : used_ms;
}

} // namespace

Classification account(const event& e, Upstreams& upstreams, const Outcome& outcome)
{
    const connection& c = e.connection;
    if (!has(c, CONNECTION_CLIENT))
        return {};
    Upstream& upstream = upstreams.at(UpstreamKey::of(e), e.timestamp_ns);
    Classification result = classify(e, upstream, outcome);
    UpstreamCounts& counts = upstream.counts;

    switch (e.kind) {
    case EVENT_OPENED:
        ++counts.opened;
        break;
    case EVENT_OPEN_FAILED:
        ++counts.open_failed;
        break;
    case EVENT_PEER_FIN:
    case EVENT_PEER_RESET:
        if (!has(c, CONNECTION_LOCAL_FIRST) && !upstreams.is_other(upstream))
            upstream.closes.note(e);
        break;
    case EVENT_CLOSED:
        ++counts.closed;
        counts.exchanges += c.exchange;
        if (e.srtt_us != 0)
            upstream.rtt_us = e.srtt_us;
        if (c.comm[0] != '\0' && (is_reused(c) || upstream.rests.count() == 0))
            std::copy(std::begin(c.comm), std::end(c.comm), upstream.owner.begin());
        if (is_reused(c) && !upstreams.is_other(upstream)) {
            upstream.longest_reused_idle_ms = std::max(upstream.longest_reused_idle_ms, c.longest_idle_ms);
            upstream.own_closes.rest(c.longest_idle_ms);
            upstream.longest_answered_idle_ms = std::max(upstream.longest_answered_idle_ms, answered_idle_ms(e));
            // A farewell is no request; what else there was is not known if its rest was the longest.
            if (!ends_with_farewell(e) || (c.exchange > 2 && c.longest_idle_ms > c.idle_ms))
                upstream.rests.add(c.longest_idle_ms);
        }
        if (!upstreams.is_other(upstream))
            upstream.idle_timeout.outlived(outlived_ms(e, result.ending), e.srtt_us / 1000, e.timestamp_ns);
        break;
    default:
        break;
    }
    switch (result.ending) {
    case Ending::none:
        break;
    case Ending::verdict:
        ++counts.verdicts[result.verdict->cause];
        if (is_race(result.verdict->cause))
            upstream.own_closes = {};
        break;
    case Ending::idle_close_by_peer:
        ++counts.idle_closes_by_peer;
        upstream.own_closes = {};
        break;
    case Ending::idle_close_by_local:
        ++counts.idle_closes_by_local;
        // A reset answers what came unread, the upstream's own farewell (close_notify) above all: it closed first.
        if (const auto rest_ms = rest_at_local_close_ms(e); has(c, CONNECTION_LOCAL_RESET)) {
            upstream.own_closes = {};
            ++upstream.kept_idle;
            upstream.longest_kept_ms = std::max(upstream.longest_kept_ms, rest_ms);
        } else if (rest_ms >= shortest_own_limit_ms) {
            ++upstream.kept_idle;
            upstream.longest_kept_ms = std::max(upstream.longest_kept_ms, rest_ms);
            upstream.own_closes.close(rest_ms);
            if (!upstreams.is_other(upstream))
                upstream.own_idle_limit.learn(rest_ms, c.local_close_ns);
        }
        break;
    case Ending::complete_close:
        ++counts.complete_closes;
        break;
    case Ending::unclassified:
        ++counts.unclassified;
        break;
    }
    if (result.learned_idle_ms && !upstreams.is_other(upstream))
        upstream.idle_timeout.learn(*result.learned_idle_ms, peer_closed_ns(e));
    return result;
}

} // namespace finrace
