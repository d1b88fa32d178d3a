// SPDX-License-Identifier: GPL-2.0-only OR MIT
// The states that connections go through, put together from their events, for the records of whole
// connections. Bounded: beyond the limit the oldest connection's history is forgotten, so that connections
// whose end was lost cannot pile up.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

#include "bpf/event.h"

namespace finrace {

struct StateStep {
    std::uint8_t state;  ///< enum tcp_connection_state
    std::uint64_t at_ns; ///< when the connection entered it; 0 if that is not known
};

class StateHistories {
public:
    explicit StateHistories(std::size_t limit = 1U << 18U) : limit_(limit) {}

    /// Takes in one event; events that change no state are welcome.
    void add(const event& e);
    /// What is known of a connection, which is then forgotten.
    std::vector<StateStep> take(std::uint64_t connection_id);

    [[nodiscard]] std::size_t size() const { return histories_.size(); }

private:
    // The longest way through TCP's states has seven steps; a lost event may add one that has no time.
    static constexpr std::size_t capacity = 10;
    struct History {
        std::array<std::uint64_t, capacity> at_ns{};
        std::array<std::uint8_t, capacity> states{};
        std::uint8_t count = 0;

        void push(std::uint8_t state, std::uint64_t at_ns);
    };

    std::size_t limit_;
    std::map<std::uint64_t, History> histories_; ///< by connection id: ids grow with time, so the first is the oldest
};

} // namespace finrace
