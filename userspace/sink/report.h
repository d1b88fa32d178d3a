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
    std::string source; ///< "backend trace by fentry", "2 recordings"
    std::uint64_t observed_ns = 0;
    std::uint64_t lost = 0; ///< events, connections, lines: what is missing
    bool tells_outcomes = false;
    std::uint64_t missing_hooks = 0;
    WallClock clock{0};
};

/// Lines for the terminal, each ended.
std::string report_text(const Diagnosis& diagnosis, const Watched& watched, const Paint& paint, std::size_t width);
nlohmann::ordered_json report_json(const Diagnosis& diagnosis, const Watched& watched);

std::string_view to_string(PoolState state);
std::string_view to_string(Diagnosis::State state);

} // namespace finrace
