// SPDX-License-Identifier: GPL-2.0-only OR MIT
// A diagnosis for people and for programs: what died and of what, the most telling instance, the pools that will race,
// and which setting to change to what.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include <nlohmann/json.hpp>

#include "core/diagnosis.h"
#include "sink/clock.h"
#include "sink/text.h"

namespace finrace {

/// What was looked at, besides what was found.
struct Watched {
    std::string host_name;
    std::string source; ///< for people: "backend trace by fentry"
    std::uint64_t observed_ns = 0;
    std::uint64_t lost = 0;         ///< events, connections, lines of a recording: what is missing, at least
    std::uint64_t adopted_open = 0; ///< connections older than the tracer that have not ended
    bool chosen = false;            ///< some upstreams alone: such connections may lead elsewhere
    bool server_side_only = false;
    bool tells_outcomes = false;
    std::uint64_t missing_hooks = 0;

    /// Whether there is something of which nothing is known.
    [[nodiscard]] bool is_partial() const { return lost > 0 || missing_hooks > 0 || (adopted_open > 0 && !chosen); }
};

/// Lines for the terminal, each ended.
std::string report_text(const Diagnosis& diagnosis, const Watched& watched, const Paint& paint, std::size_t width);
nlohmann::ordered_json report_json(const Diagnosis& diagnosis, const Watched& watched);

std::string_view to_string(PoolState state);
std::string_view to_string(Diagnosis::State state);

} // namespace finrace
