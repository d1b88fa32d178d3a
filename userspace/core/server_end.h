// SPDX-License-Identifier: GPL-2.0-only OR MIT
// The other end: what a server on this host did to a connection that it had accepted. With its client elsewhere that
// is a cause of its own; with its client on this host too, it is evidence for the client's verdict. Pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <list>
#include <optional>
#include <string>
#include <unordered_map>

#include "bpf/event.h"
#include "core/classify.h"
#include "core/upstream.h"

namespace finrace {

/// Whether an event of a connection that this host accepted shows an end that leaves something undone: a request unread
/// or unanswered, its own answer unacknowledged by an RST, or payload that came after the close.
bool is_server_end(const event& e);

/// Judges such an end by itself, or EVENT_ACCEPT_OVERFLOW: closed_on_request, server_cut_response, accept_overflow, or
/// nothing that can be named.
std::optional<Verdict> judge_server_end(const event& e);

/// What the server's end adds to the verdict of its client's: what only its process knows proves, or corrects, what
/// the client's side of the connection leaves open. `timeout`: the upstream's, if it has been learned.
void corroborate(Verdict& verdict, const event& client_end, const event& server_end,
                 const std::optional<IdleTimeout>& timeout);

/// What a server's close with a whole request unread, or before it came, makes of its client's verdict.
struct ClosedUnread {
    bool late = false;   ///< the request came after the close
    bool rested = false; ///< the connection had, before the request
    bool killed = false; ///< the process, by a signal: its kernel closed for it
};
/// The cause that it proves, where the client's side had come to `cause`, so certainly; nothing if it decides nothing.
std::optional<Cause> cause_of_closed_unread(Cause cause, Certainty certainty, const ClosedUnread& closed);

/// How long the connection had rested before the request that met its close, in milliseconds; 0 if not known.
std::uint64_t rest_before_request_ms(const event& server_end);

/// What a full queue of connections to accept, which turned this client away, adds to the client's verdict.
void corroborate_with_overflow(Verdict& verdict, const event& overflow);

/// How the process that closed was ending, as wait(2) tells it (event.exit_code).
struct Exit {
    bool by_signal;
    unsigned number; ///< the signal's, or the exit status
};
std::optional<Exit> exit_of(const event& e); ///< nothing if it was not ending

/// "gunicorn[1234]", "A process" if it is not known; and how it ended: ", killed by signal 9" or empty.
std::string server_process_text(const event& server_end);
std::string exit_text(const event& server_end);

/// The servers' ends of the last second, by their connections' addresses; and whom full listeners have turned away.
class ServerEnds {
public:
    /// So long the client's side may take to show: the path's delay, and the verdict's own wait.
    static constexpr std::uint64_t horizon_ns = 1'000'000'000;
    static constexpr std::size_t capacity = 4096; ///< beyond it the oldest waits no longer

    /// So long a client that was turned away may try again: SYNs come half as often each time (RFC 6298 5.5).
    static constexpr std::uint64_t patience_ns = 120'000'000'000;

    /// `judge`: takes the ends whose clients are not on this host, and once a second what each listener has turned
    /// away.
    explicit ServerEnds(std::function<void(const event&)> judge) : judge_(std::move(judge)) {}

    void note(const event& server_end);
    void note_overflow(const event& overflow);
    /// Any event of a connection that this host opened: if the other end is here, it is no stranger's.
    void meet(const event& client);
    /// The other end of that connection; nullptr if it showed nothing.
    [[nodiscard]] const event* of(const event& client) const;
    /// The last time that its server turned this client away.
    [[nodiscard]] const event* overflow_of(const event& client) const;
    void advance(std::uint64_t now_ns);
    void finish();

private:
    /// A connection's two ends, as its client names them.
    struct Pair {
        UpstreamKey client;
        UpstreamKey server;
        bool operator==(const Pair&) const = default;
    };
    struct PairHash {
        std::size_t operator()(const Pair& pair) const noexcept;
    };
    struct End {
        event e;
        bool met = false;
    };

    static Pair pair_of(const event& e);
    void drop_oldest();

    std::function<void(const event&)> judge_;
    std::list<Pair> order_;
    std::unordered_map<Pair, End, PairHash> ends_;
    struct Overflow {
        event e;                     ///< with what has been turned away since the verdict before
        std::uint64_t judged_ns = 0; ///< 0 for never
    };
    void judge_overflow_of(Overflow& overflow);

    std::unordered_map<UpstreamKey, Overflow, UpstreamKeyHash> overflows_; ///< by listener
    std::list<Pair> turned_away_order_;
    std::unordered_map<Pair, event, PairHash> turned_away_;
};

} // namespace finrace
