// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "core/server_end.h"

#include <algorithm>
#include <iterator>
#include <string_view>
#include <utility>

#include <fmt/format.h>

#include "core/flags.h"
#include "core/units.h"

namespace finrace {

namespace {

/// Milliseconds from one time to a later one, 0 if either is not known.
std::uint64_t ms_between(std::uint64_t from_ns, std::uint64_t to_ns)
{
    return from_ns != 0 && to_ns > from_ns ? (to_ns - from_ns) / ns_per_ms : 0;
}

bool waits_for_answer(const event& e)
{
    return e.received_ns > e.sent_ns;
}

/// The socket was reset, so what its process had not read and what its client had not acknowledged is lost.
bool resets(const event& e)
{
    return e.kind == EVENT_CLOSED && has(e, CONNECTION_LOCAL_RESET);
}

Verdict verdict(Cause cause, Certainty certainty, std::string message)
{
    return {.cause = cause, .variant = Variant::none, .certainty = certainty, .message = std::move(message)};
}

/// Payload came after close(): its sender gets an RST.
std::optional<Verdict> judge_late_segment(const event& e)
{
    if (e.segment_bytes <= FINRACE_TLS_FAREWELL_BYTES)
        return std::nullopt;
    const std::uint64_t idle_ms = rest_before_request_ms(e);
    if (e.unacked_bytes > 0) {
        if (e.unacked_bytes <= FINRACE_TLS_FAREWELL_BYTES) // how long it had rested before its farewell is not known
            return std::nullopt;
        // A process that still reads sends no RST; and a client that took nothing for as long had let lie what it lost.
        if (!has(e, CONNECTION_SOCKET_CLOSED) || idle_ms >= shortest_idle_timer_ms)
            return std::nullopt;
        return verdict(Cause::server_cut_response, Certainty::likely,
                       fmt::format("{} bytes came in after this host's server had closed the connection with {} bytes "
                                   "of its own answer unacknowledged: the RST that answers them may cost the client "
                                   "that answer.",
                                   e.segment_bytes, e.unacked_bytes));
    }
    if (e.sent_ns == 0 || idle_ms < shortest_idle_timer_ms)
        return std::nullopt;
    // Whose last word was the server's, that one had been answered: what came then is a new request.
    const bool answered = e.sent_ns >= e.received_ns;
    const bool may_be_farewells = e.segment_bytes <= 2 * FINRACE_TLS_FAREWELL_BYTES; // two alerts, or a GOAWAY and one
    return verdict(
        Cause::closed_on_request,
        may_be_farewells ? Certainty::possible
        : answered       ? Certainty::proven
                         : Certainty::likely,
        fmt::format("{} bytes of a request came in {} ms after this host's server had closed the connection, "
                    "idle for {} ms: they crossed its FIN, or the client had not minded it.",
                    e.segment_bytes, ms_between(e.connection.local_close_ns, e.timestamp_ns), idle_ms));
}

/// close() or shutdown() with bytes of the client's unread.
std::optional<Verdict> judge_unread(const event& e)
{
    if (e.unread_bytes <= FINRACE_TLS_FAREWELL_BYTES || e.unread_bytes > one_flight_bytes || !waits_for_answer(e))
        return std::nullopt;
    const std::uint64_t idle_ms = rest_before_request_ms(e);
    const std::uint64_t lay_ms = ms_between(e.received_ns, e.timestamp_ns);
    if (idle_ms < shortest_idle_timer_ms || lay_ms >= shortest_idle_timer_ms)
        return std::nullopt;
    // Of a connection that is followed it is known what came since its last answer began.
    const bool whole = e.connection.exchange > 0 && e.response_bytes == e.unread_bytes;
    return verdict(Cause::closed_on_request, whole ? Certainty::proven : Certainty::likely,
                   fmt::format("{} closed the connection{} with {} bytes of a request unread, which had come {} ms "
                               "before, after {} ms of rest.",
                               server_process_text(e), exit_text(e), e.unread_bytes, lay_ms, idle_ms));
}

std::optional<Verdict> judge_cut(const event& e)
{
    if (!resets(e) || e.unacked_bytes <= FINRACE_TLS_FAREWELL_BYTES ||
        ms_between(e.sent_ns, e.timestamp_ns) >= shortest_idle_timer_ms)
        return std::nullopt;
    const std::string unread =
        e.unread_bytes > 0 ? fmt::format(": close() with {} bytes unread makes an RST", e.unread_bytes) : "";
    return verdict(Cause::server_cut_response, Certainty::likely,
                   fmt::format("{} reset the connection{} with {} bytes of its own answer unacknowledged{}.",
                               server_process_text(e), exit_text(e), e.unacked_bytes, unread));
}

Verdict judge_overflow(const event& e)
{
    return verdict(
        Cause::accept_overflow, Certainty::proven,
        fmt::format("The listener turned away {} connection attempt{}: {} connections waited already that no "
                    "process had accepted.",
                    e.turned_away, e.turned_away == 1 ? "" : "s", e.accept_queue));
}

} // namespace

std::uint64_t rest_before_request_ms(const event& server_end)
{
    if (server_end.kind == EVENT_SEGMENT_AFTER_CLOSE)
        return ms_between(std::max(server_end.sent_ns, server_end.received_ns), server_end.connection.local_close_ns);
    return ms_between(server_end.sent_ns, server_end.received_ns);
}

std::optional<Exit> exit_of(const event& e)
{
    if (!has(e, CONNECTION_PROCESS_ENDS))
        return std::nullopt;
    if (const unsigned signal = e.exit_code & 0x7fU; signal != 0)
        return Exit{.by_signal = true, .number = signal};
    return Exit{.by_signal = false, .number = e.exit_code >> 8U & 0xffU};
}

std::string server_process_text(const event& server_end)
{
    const connection& c = server_end.connection;
    if (c.pid == 0)
        return "A process";
    const std::string_view name(c.comm, ::strnlen(c.comm, sizeof(c.comm)));
    return fmt::format("{}[{}]", name.empty() ? "?" : name, c.pid);
}

std::string exit_text(const event& server_end)
{
    const std::optional<Exit> exit = exit_of(server_end);
    if (!exit)
        return {};
    return fmt::format(", {} {},", exit->by_signal ? "killed by signal" : "as it exited with status", exit->number);
}

bool is_server_end(const event& e)
{
    // Where the source does not tell what lies unread (backend cgroup), 0 would say that all had been read.
    if (has(e, CONNECTION_CLIENT) || (e.observed & OBSERVED_UNREAD) == 0 || (e.sent_ns == 0 && e.received_ns == 0))
        return false;
    if (e.kind == EVENT_SEGMENT_AFTER_CLOSE)
        return e.segment_bytes > 0;
    if (e.old_state != TCP_STATE_ESTABLISHED || (e.kind != EVENT_LOCAL_FIN && !resets(e)))
        return false;
    return waits_for_answer(e) || e.unread_bytes > 0 || (resets(e) && e.unacked_bytes > 0);
}

std::optional<Verdict> judge_server_end(const event& e)
{
    if (e.kind == EVENT_ACCEPT_OVERFLOW)
        return judge_overflow(e);
    if (e.kind == EVENT_SEGMENT_AFTER_CLOSE)
        return judge_late_segment(e);
    if (auto unread = judge_unread(e))
        return unread;
    return judge_cut(e);
}

std::optional<Cause> cause_of_closed_unread(Cause cause, Certainty certainty, const ClosedUnread& closed)
{
    const bool loss = cause == Cause::upstream_closed || cause == Cause::upstream_reset;
    // A kernel that closes for a killed process resets what lay unread: as much as an idle timer's close, to its
    // client.
    if (cause == Cause::keepalive_race)
        return closed.killed && !closed.late && certainty != Certainty::proven ? Cause::upstream_reset : cause;
    if (!loss || closed.late)
        return std::nullopt;
    return closed.rested && !closed.killed ? Cause::keepalive_race : cause;
}

void corroborate(Verdict& verdict, const event& client_end, const event& server_end,
                 const std::optional<IdleTimeout>& timeout)
{
    const connection& c = client_end.connection;
    const bool race = verdict.cause == Cause::keepalive_race;
    const bool loss = verdict.cause == Cause::upstream_closed || verdict.cause == Cause::upstream_reset;
    if (verdict.incomplete || client_end.request_bytes == 0)
        return;
    if (server_end.kind == EVENT_SEGMENT_AFTER_CLOSE) {
        // Unless some of the request had come before: then its process had begun to read.
        if (race && verdict.certainty != Certainty::proven && !waits_for_answer(server_end)) {
            verdict.certainty = Certainty::proven;
            verdict.message += " The upstream, on this host, had closed before the request came.";
        }
        return;
    }
    const std::uint64_t lay_ms = ms_between(server_end.received_ns, server_end.timestamp_ns);
    if (server_end.unread_bytes >= client_end.request_bytes) {
        const bool rested = is_reused(c) || c.idle_ms >= shortest_idle_timer_ms;
        const std::optional<Exit> exit = exit_of(server_end);
        const auto cause = cause_of_closed_unread(
            verdict.cause, verdict.certainty,
            {.rested = rested && lay_ms < shortest_idle_timer_ms, .killed = exit && exit->by_signal});
        if (!cause)
            return;
        if (race && *cause != verdict.cause) {
            verdict.variant = Variant::none;
            verdict.message = "What looked like an idle close was none.";
        } else if (*cause != verdict.cause) {
            verdict.variant = resets(server_end) ? Variant::reset_unread : Variant::fin_lingering;
        }
        verdict.cause = *cause;
        verdict.certainty = Certainty::proven;
        verdict.message +=
            fmt::format(" On this host, {} closed{} with all {} bytes unread, {} ms after they had come.",
                        server_process_text(server_end), exit_text(server_end), server_end.unread_bytes, lay_ms);
    } else if (verdict.cause == Cause::request_rejected && server_end.unread_bytes > 0) {
        verdict.certainty = Certainty::proven;
        verdict.message += fmt::format(" On this host, {} closed{} with {} bytes of it unread.",
                                       server_process_text(server_end), exit_text(server_end), server_end.unread_bytes);
    } else if (race && !timeout && verdict.certainty == Certainty::possible && server_end.unread_bytes == 0 &&
               waits_for_answer(server_end)) {
        verdict.cause = verdict.variant == Variant::fin_lingering ? Cause::upstream_closed : Cause::upstream_reset;
        verdict.variant = Variant::none;
        verdict.certainty = Certainty::likely; // an event loop may read what it drops
        verdict.message =
            fmt::format("On this host, {} closed{} when it had read the request, {} ms after it had come.",
                        server_process_text(server_end), exit_text(server_end), lay_ms);
    } else if (loss && server_end.unread_bytes == 0 && waits_for_answer(server_end)) {
        verdict.certainty = Certainty::proven;
        verdict.message += fmt::format(" On this host, {} closed{} when it had read the request.",
                                       server_process_text(server_end), exit_text(server_end));
    }
}

void corroborate_with_overflow(Verdict& verdict, const event& overflow)
{
    if (verdict.incomplete || (verdict.cause != Cause::accept_stalled && verdict.cause != Cause::connect_timeout))
        return;
    verdict.certainty = Certainty::proven;
    verdict.message += fmt::format(
        " On this host, the listener's queue was full: {} connections waited to be accepted.", overflow.accept_queue);
}

std::size_t ServerEnds::PairHash::operator()(const Pair& pair) const noexcept
{
    const UpstreamKeyHash hash;
    return hash(pair.client) * 31 + hash(pair.server);
}

ServerEnds::Pair ServerEnds::pair_of(const event& e)
{
    const UpstreamKey local = UpstreamKey::local_of(e);
    const UpstreamKey peer = UpstreamKey::of(e);
    const bool client = has(e, CONNECTION_CLIENT);
    return {.client = client ? local : peer, .server = client ? peer : local};
}

void ServerEnds::drop_oldest()
{
    const auto found = ends_.find(order_.front());
    order_.pop_front();
    if (found == ends_.end())
        return;
    const End end = found->second;
    ends_.erase(found);
    if (!end.met)
        judge_(end.e);
}

void ServerEnds::note(const event& server_end)
{
    const Pair pair = pair_of(server_end);
    if (const auto found = ends_.find(pair); found != ends_.end()) {
        // What the process knew when it closed says more than what came afterwards.
        if (server_end.kind != EVENT_SEGMENT_AFTER_CLOSE || found->second.e.unread_bytes == 0)
            found->second.e = server_end;
        return;
    }
    if (ends_.size() >= capacity)
        drop_oldest();
    ends_.emplace(pair, End{.e = server_end});
    order_.push_back(pair);
}

void ServerEnds::meet(const event& client)
{
    if (ends_.empty())
        return;
    if (const auto found = ends_.find(pair_of(client)); found != ends_.end())
        found->second.met = true;
}

const event* ServerEnds::of(const event& client) const
{
    const auto found = ends_.empty() ? ends_.end() : ends_.find(pair_of(client));
    return found == ends_.end() ? nullptr : &found->second.e;
}

void ServerEnds::judge_overflow_of(Overflow& overflow)
{
    if (overflow.e.turned_away == 0)
        return;
    overflow.judged_ns = overflow.e.timestamp_ns;
    judge_(overflow.e);
    overflow.e.turned_away = 0;
}

void ServerEnds::note_overflow(const event& overflow)
{
    if (overflows_.size() >= capacity) {
        for (auto& [listener, before] : overflows_)
            judge_overflow_of(before);
        overflows_.clear();
    }
    Overflow& listener = overflows_[UpstreamKey::local_of(overflow)];
    const std::uint32_t before = listener.e.turned_away;
    listener.e = overflow;
    listener.e.turned_away += before;
    if (listener.judged_ns == 0 || overflow.timestamp_ns >= listener.judged_ns + horizon_ns)
        judge_overflow_of(listener);

    const Pair pair = pair_of(overflow);
    if (turned_away_.insert_or_assign(pair, overflow).second)
        turned_away_order_.push_back(pair);
    if (turned_away_.size() > capacity) {
        turned_away_.erase(turned_away_order_.front());
        turned_away_order_.pop_front();
    }
}

const event* ServerEnds::overflow_of(const event& client) const
{
    const auto found = turned_away_.empty() ? turned_away_.end() : turned_away_.find(pair_of(client));
    // It may be later: what a process has let go of, its kernel goes on to retransmit.
    if (found == turned_away_.end() || found->second.timestamp_ns + patience_ns < client.timestamp_ns)
        return nullptr;
    return &found->second;
}

void ServerEnds::advance(std::uint64_t now_ns)
{
    for (auto& [listener, overflow] : overflows_)
        if (now_ns >= overflow.judged_ns + horizon_ns)
            judge_overflow_of(overflow);
    while (!order_.empty()) {
        const auto found = ends_.find(order_.front());
        if (found != ends_.end() && now_ns < found->second.e.timestamp_ns + horizon_ns)
            return;
        drop_oldest();
    }
}

void ServerEnds::finish()
{
    for (auto& [listener, overflow] : overflows_)
        judge_overflow_of(overflow);
    while (!order_.empty())
        drop_oldest();
}

} // namespace finrace
