// SPDX-License-Identifier: GPL-2.0-only OR MIT
// What became of an exchange that failed: whether the proxy tried again, and what the client behind it got. Found by
// thread and order: what the thread that lets go of the upstream's socket does just before and next. Pure.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>
#include <unordered_map>

#include "bpf/event.h"
#include "core/cause.h"
#include "core/upstream.h"

namespace finrace {

/// The connection behind the exchange: this host, or rather the same process, accepted it.
struct Client {
    std::array<std::uint8_t, 16> address{}; ///< network order; IPv4 in the first four bytes
    std::uint16_t port = 0;
    std::uint8_t family = 4;
    bool left = false;                         ///< its FIN or RST had come by then
    bool answered = false;                     ///< it got (the beginning of) an answer; else its socket was let go of
    std::uint16_t status = 0;                  ///< of that answer, if it was HTTP/1 in plain text; else 0
    Certainty certainty = Certainty::possible; ///< that it is this exchange's: likely by turn, possible by process
};

/// The client that an EVENT_CLIENT_ANSWERED or EVENT_CLIENT_RELEASED is about.
Client client_of(const event& e, Certainty certainty);

/// The next attempt for the same client.
struct Retry {
    std::uint64_t connection_id;
    UpstreamKey upstream;
    std::uint64_t after_ns; ///< since the failed exchange's socket was let go of
};

struct Outcome {
    std::optional<Client> client;
    std::optional<Retry> retry;
    bool known = false;   ///< whether there was a retry
    bool settled = false; ///< nothing more is to be expected, but from the same turn
    bool named = false;   ///< the failure has had its verdict before
};

/// What a source's events from EVENT_RELEASED on tell; of the last seconds.
class Outcomes {
public:
    /// How long after a loss the source goes on telling.
    static constexpr std::uint64_t horizon_ns = 1'000'000'000;

    /// Keeps an event from EVENT_RELEASED on.
    void note(const event& e);
    /// Of the exchange that `end` is the end of, by what its thread did in the same turn.
    [[nodiscard]] Outcome by_turn(const event& end) const;
    /// Whether that has settled it: the turn is over.
    [[nodiscard]] bool is_settled(const event& end, std::uint64_t now_ns) const;
    /// The same, or by what its process has done since.
    [[nodiscard]] Outcome of(const event& end) const;

private:
    static constexpr std::size_t capacity = 4096;

    struct Loss;
    [[nodiscard]] bool continues(const event& e) const;
    [[nodiscard]] std::optional<Loss> find(const event& end) const;
    [[nodiscard]] std::deque<event>::const_iterator since(std::uint64_t ns) const;
    [[nodiscard]] Outcome by_turn(const Loss& loss) const;
    [[nodiscard]] const event* nearest_client(const Loss& loss, const event& client) const;
    [[nodiscard]] bool has_rival(const Loss& loss, const event& client) const;
    [[nodiscard]] bool repeats(const Loss& loss, const event& tried) const;

    std::deque<event> noted_;                           ///< in the order of their times
    std::unordered_map<std::uint64_t, event> releases_; ///< of these, EVENT_RELEASED by connection
};

} // namespace finrace
