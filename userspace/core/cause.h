// SPDX-License-Identifier: GPL-2.0-only OR MIT
// The causes: stable ids, and one table row for each with all that is said about it anywhere.
#pragma once

#include <optional>
#include <span>
#include <string_view>

namespace finrace {

/// Why an exchange failed. The ids in to_string() are part of the record's contract.
enum class Cause {
    keepalive_race,
    stale_response,
    stale_reuse,
    upstream_closed,
    upstream_reset,
    response_cut,
    request_rejected,
    path_dropped,
    accept_stalled,
    connect_refused,
    connect_timeout,
    connect_unreachable,
    handshake_failed,
    proxy_timeout,
    client_abort,
    upstream_benched,
    closed_on_request,
    server_cut_response,
    accept_overflow,
};

/// How a cause came about, where that can be told.
enum class Variant {
    none,
    fin_crossed,       ///< the FIN left bytes of the request unacknowledged
    fin_lingering,     ///< the FIN acknowledged a request that nobody read: shutdown(), then discard
    reset_crossed,     ///< an RST with ACK left all of the request unacknowledged
    reset_unread,      ///< an RST with ACK acknowledged the request: closed with the request unread
    reset_closed,      ///< a bare RST: the upstream's socket was gone when the request arrived
    on_accept,         ///< the upstream closes connections as it accepts them
    gave_up,           ///< this host's process stopped waiting
    early_answer,      ///< the answer came before the request's end
    unanswered_probes, ///< the request was acknowledged; then nothing more, to keep-alive probes neither
};

/// How much the evidence excludes.
enum class Certainty {
    proven,   ///< the evidence excludes any other cause
    likely,   ///< another cause would need a coincidence
    possible, ///< another cause fits nearly as well; what would decide it has not been learned yet
};

std::string_view to_string(Cause cause);
std::string_view to_string(Variant variant); ///< empty for Variant::none
std::string_view to_string(Certainty certainty);

/// All that is said about a cause, for `finrace explain`, the documents and the messages.
struct CauseText {
    Cause cause;
    std::string_view title;      ///< a few words
    std::string_view happened;   ///< what happened, for people
    std::string_view evidence;   ///< what in TCP shows it, and what it excludes
    std::string_view proxy_says; ///< what proxies log and what their clients see
    std::string_view remedy;     ///< what to look at, which setting to change
    bool by_trace_alone = false; ///< backend cgroup never names it
};

std::span<const CauseText> cause_texts();
const CauseText& text_of(Cause cause);
/// The cause that a variant is one of, the first where it is one of several; nothing if there is no such variant.
std::optional<Cause> cause_of_variant(std::string_view variant);
std::optional<Cause> cause_from_string(std::string_view id);

} // namespace finrace
