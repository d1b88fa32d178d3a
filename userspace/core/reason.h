// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Why an upstream closed the connection that a race lost: by its timer, in a restart, for the number of requests, right
// behind an answer, or short of room. Told from its other closes around that moment. Pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>
#include <span>
#include <string_view>

#include "bpf/event.h"

namespace finrace {

struct IdleTimeout;

enum class Reason {
    unknown,
    idle_timer,    ///< it had rested for as long as this upstream lets connections idle
    restart,       ///< many of its connections ended at one instant, however long they had rested; a purge of all
                   ///< that was idle looks the same
    request_limit, ///< its connections end after the same number of requests
    unannounced,   ///< it closes right behind its answers, and does not say so in them
    early_purge,   ///< after less than half its timer, as others lately: short of workers or connections
};

std::string_view to_string(Reason reason);

/// All that is said about a reason.
struct ReasonText {
    Reason reason;
    std::string_view title;    ///< a few words
    std::string_view evidence; ///< what shows it
    std::string_view remedy;
};

/// Of those that are known.
std::span<const ReasonText> reason_texts();
/// Nothing if there is no such reason, or nothing to say of it.
const ReasonText* text_of_reason(std::string_view id);

/// A process that ends closes all its connections within this time.
constexpr std::uint64_t one_instant_ns = 100'000'000;

/// When the peer closed, as far as that is known; else the event's own time. CLOCK_MONOTONIC in nanoseconds.
std::uint64_t peer_closed_ns(const event& e);

/// The newest closes by one upstream, harmless or not.
class CloseHistory {
public:
    /// Keeps a close by the peer: EVENT_PEER_FIN or EVENT_PEER_RESET, the first of the two.
    void note(const event& e);
    /// Why the close that `e` (the verdict's event) tells of happened. `timeout`: as learned, if it is.
    [[nodiscard]] Reason reason(const event& e, const std::optional<IdleTimeout>& timeout) const;
    /// Whether the upstream closes right behind its answers, and the close that `e` tells of came so soon as well.
    [[nodiscard]] bool closes_behind_answers(const event& e) const;
    /// Whether it has closed another connection, of which it had taken no request, after as long a rest, at another
    /// instant, and at that none after half of it, or twice: by a timer that need not be known yet.
    [[nodiscard]] bool has_closed_after_such_rest(const event& e) const;

private:
    static constexpr std::size_t capacity = 64;
    static constexpr std::size_t most_rests = 16;
    static constexpr std::ptrdiff_t most_rests_of_instant = 4;

    struct Close {
        std::uint64_t connection_id;
        std::uint64_t at_ns;
        std::uint64_t rested_ms; ///< since the last answer
        std::uint32_t served;    ///< exchanges before the one that it met; 0 if not known
        bool took_a_request;     ///< and did not answer it: no witness of when the upstream closes by itself
    };
    /// One that tells of a timer, unless its process ended.
    struct Rest {
        Close close;
        bool ended_with_others; ///< that had rested for half as long, or twice
    };
    static Close close_of(const event& e);
    void note_rest(const Close& close);

    std::deque<Close> closes_;
    std::deque<Rest> rests_; ///< for longer than a busy upstream's newest closes reach back
};

} // namespace finrace
