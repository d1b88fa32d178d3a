// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "core/reason.h"

#include <algorithm>
#include <array>

#include "core/flags.h"
#include "core/units.h"
#include "core/upstream.h"

namespace finrace {

namespace {

constexpr std::size_t crowd = 3;
/// Whoever closes so soon behind an answer had done with that connection ("Connection: close", a handler's own close).
constexpr std::uint64_t behind_answer_ms = 10;

/// A limit shows in so many connections, of which hardly one is an exception.
constexpr std::size_t limited_connections = 5;
constexpr std::size_t limited_percent = 80; ///< likewise of closes behind answers

constexpr std::uint64_t lately_ns = 10'000 * ns_per_ms;

constexpr std::array reasons{
    ReasonText{
        .reason = Reason::idle_timer,
        .title = "it had rested for as long as this upstream lets connections idle",
        .evidence = "Its rest fits the idle timeout that the upstream's other closes have taught.",
        .remedy = "Let the proxy close first, or raise the upstream's idle timeout: finrace explain keepalive_race.",
    },
    ReasonText{
        .reason = Reason::restart,
        .title = "the upstream's process ended or was reloaded, or it dropped all that was idle for want of room",
        .evidence =
            "Three or more of its connections closed within 100 ms, however long each had rested. A server that "
            "runs out of workers or connections (Apache httpd, nginx) may drop its idle ones so as well: its "
            "own log tells the two apart.",
        .remedy = "No idle timeout helps against a restart: let the server drain before it ends, so that it announces "
                  "the close (Connection: close) in a last answer; take it out of the proxy's pool before. If it did "
                  "not restart, give it room: finrace explain early_purge.",
    },
    ReasonText{
        .reason = Reason::request_limit,
        .title = "the upstream closes connections after so many requests",
        .evidence = "Four fifths of its newest closes, five at least, came after the same number of requests.",
        .remedy =
            "Let the proxy give connections up sooner (nginx: keepalive_requests in the upstream block, below the "
            "server's limit), raise the server's, or have it announce the last answer (Connection: close).",
    },
    ReasonText{
        .reason = Reason::unannounced,
        .title = "the upstream closes right behind its answers, and does not say so in them",
        .evidence =
            "It closed within 10 ms of its last answer, as did four fifths of its newest closes, three at least "
            "and not at one instant.",
        .remedy = "No idle timeout decides that. Have the server announce the close (Connection: close in the answer), "
                  "or keep the connection open; until then let the proxy use no connection to it twice (nginx: no "
                  "keepalive in the upstream block; HAProxy: option httpclose).",
    },
    ReasonText{
        .reason = Reason::early_purge,
        .title = "the upstream was short of workers or connections, and dropped idle ones",
        .evidence =
            "It closed after less than half its idle timeout, as three others of its connections did in the ten "
            "seconds before.",
        .remedy = "Give the server room: Apache httpd's MaxRequestWorkers, nginx's worker_connections. Both drop idle "
                  "connections when they run short.",
    },
};

std::uint64_t distance(std::uint64_t a, std::uint64_t b)
{
    return a > b ? a - b : b - a;
}

} // namespace

std::string_view to_string(Reason reason)
{
    switch (reason) {
    case Reason::unknown:
        return "unknown";
    case Reason::idle_timer:
        return "idle_timer";
    case Reason::restart:
        return "restart";
    case Reason::request_limit:
        return "request_limit";
    case Reason::unannounced:
        return "unannounced";
    case Reason::early_purge:
        return "early_purge";
    }
    return {};
}

std::span<const ReasonText> reason_texts()
{
    return reasons;
}

const ReasonText* text_of_reason(std::string_view id)
{
    const auto* found = std::find_if(reasons.begin(), reasons.end(),
                                     [id](const ReasonText& one) { return to_string(one.reason) == id; });
    return found != reasons.end() ? found : nullptr;
}

std::uint64_t peer_closed_ns(const event& e)
{
    const connection& c = e.connection;
    const std::uint64_t at_ns = has(e, CONNECTION_PEER_FIN) && c.peer_fin_ns != 0 ? c.peer_fin_ns : c.peer_reset_ns;
    return at_ns != 0 ? at_ns : e.timestamp_ns;
}

CloseHistory::Close CloseHistory::close_of(const event& e)
{
    const connection& c = e.connection;
    Close close{
        .connection_id = c.id, .at_ns = peer_closed_ns(e), .rested_ms = 0, .served = 0, .took_a_request = false};
    // What the FIN left unacknowledged had no answer, whatever came before it.
    const bool unanswered = c.exchange > 0 && (e.response_bytes == 0 || c.fin_unacked > 0 || c.reset_unacked > 0);
    close.took_a_request =
        unanswered && c.fin_unacked == 0 && c.reset_unacked == 0 && !has(e, CONNECTION_SENT_AFTER_FIN);
    if (!has(e, CONNECTION_ADOPTED))
        close.served = c.exchange - (unanswered ? 1 : 0);
    // A request that met the close is no end of the rest.
    if (unanswered && !has(e, CONNECTION_SENT_AFTER_FIN))
        close.rested_ms = c.idle_ms + (close.at_ns > c.request_ns ? (close.at_ns - c.request_ns) / ns_per_ms : 0);
    else
        close.rested_ms = c.fin_idle_ms;
    return close;
}

void CloseHistory::note(const event& e)
{
    const Close close = close_of(e);
    if (std::any_of(closes_.begin(), closes_.end(),
                    [&](const Close& other) { return other.connection_id == close.connection_id; }))
        return;
    if (closes_.size() == capacity)
        closes_.pop_front();
    note_rest(close);
    closes_.push_back(close);
}

void CloseHistory::note_rest(const Close& close)
{
    // Beside what had rested for half as long, or twice, it was closed as its process ended (see reason()).
    const auto is_beside = [](const Close& one, const Close& other) {
        return distance(one.at_ns, other.at_ns) <= one_instant_ns && other.rested_ms > behind_answer_ms &&
               (2 * other.rested_ms < one.rested_ms || 2 * one.rested_ms < other.rested_ms);
    };
    for (Rest& rest : rests_)
        rest.ended_with_others = rest.ended_with_others || is_beside(rest.close, close);
    if (close.took_a_request || close.rested_ms < shortest_idle_timer_ms ||
        std::count_if(rests_.begin(), rests_.end(), [&](const Rest& rest) {
            return distance(rest.close.at_ns, close.at_ns) <= one_instant_ns;
        }) >= most_rests_of_instant)
        return;
    if (rests_.size() == most_rests)
        rests_.pop_front();
    rests_.push_back({.close = close,
                      .ended_with_others = std::any_of(closes_.begin(), closes_.end(),
                                                       [&](const Close& other) { return is_beside(close, other); })});
}

Reason CloseHistory::reason(const event& e, const std::optional<IdleTimeout>& timeout) const
{
    const Close close = close_of(e);
    const std::uint64_t rtt_ms = e.srtt_us / 1000;
    if (timeout && timeout->nearness(close.rested_ms, rtt_ms) != Nearness::far)
        return Reason::idle_timer;

    // A timer that is looked at once in a while (gunicorn's threads) may have closed half as late as all that it
    // taught.
    const auto is_early = [&timeout](const Close& one) { return timeout && 2 * one.rested_ms < timeout->lowest_ms; };
    std::size_t together = 1;
    std::size_t limited = 1;
    std::size_t counted = 1;
    std::size_t early = 0;
    std::uint64_t shortest = close.rested_ms;
    std::uint64_t longest = close.rested_ms;
    for (const Close& other : closes_) {
        if (other.connection_id == close.connection_id)
            continue;
        const bool at_once = distance(other.at_ns, close.at_ns) <= one_instant_ns;
        if (at_once && other.rested_ms > behind_answer_ms) {
            ++together;
            shortest = std::min(shortest, other.rested_ms);
            longest = std::max(longest, other.rested_ms);
        }
        // What ended at one instant, and had served alike, may have begun alike.
        if (other.served != 0 && !at_once) {
            ++counted;
            limited += other.served == close.served ? 1 : 0;
        }
        if (is_early(other) && other.rested_ms > behind_answer_ms && !other.took_a_request &&
            other.at_ns + lately_ns >= close.at_ns)
            ++early;
    }
    // Connections that were opened together reach their timer together as well; and a server that looks for them once a
    // second (gunicorn's threads) closes at one instant what has rested one timer or one and a half.
    const bool by_no_timer = 2 * shortest < longest || (timeout && 2 * longest < timeout->lowest_ms);
    if (close.served > 1 && limited >= limited_connections && limited * 100 >= counted * limited_percent)
        return Reason::request_limit;
    if (together >= crowd && by_no_timer && close.rested_ms > behind_answer_ms)
        return Reason::restart;
    const bool may_be_limited = close.served > 1 && limited == counted;
    if (!may_be_limited && closes_behind_answers(e))
        return Reason::unannounced;
    if (is_early(close) && early >= crowd)
        return Reason::early_purge;
    return Reason::unknown;
}

bool CloseHistory::closes_behind_answers(const event& e) const
{
    const Close close = close_of(e);
    if (close.served == 0 || close.rested_ms > behind_answer_ms)
        return false;
    std::size_t counted = 1;
    std::size_t behind = 1;
    for (const Close& other : closes_) {
        if (other.connection_id == close.connection_id || other.took_a_request || other.served == 0 ||
            distance(other.at_ns, close.at_ns) <= one_instant_ns)
            continue;
        ++counted;
        behind += other.rested_ms <= behind_answer_ms ? 1 : 0;
    }
    return behind >= crowd && behind * 100 >= counted * limited_percent;
}

bool CloseHistory::has_closed_after_such_rest(const event& e) const
{
    const Close close = close_of(e);
    const auto rested_ms = static_cast<std::uint32_t>(std::min<std::uint64_t>(close.rested_ms, UINT32_MAX));
    const IdleTimeout such_a_timer{.ms = rested_ms, .lowest_ms = rested_ms, .highest_ms = rested_ms, .samples = 0};
    return std::any_of(rests_.begin(), rests_.end(), [&](const Rest& rest) {
        return rest.close.connection_id != close.connection_id && !rest.ended_with_others &&
               distance(rest.close.at_ns, close.at_ns) > one_instant_ns &&
               such_a_timer.nearness(rest.close.rested_ms, e.srtt_us / 1000) == Nearness::at;
    });
}

} // namespace finrace
