// SPDX-License-Identifier: GPL-2.0-only OR MIT
// A diagnosis for people and for programs: what died and of what, the most telling instance, the pools that will race,
// and which setting to change to what.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "core/diagnosis.h"
#include "sink/clock.h"
#include "sink/text.h"

namespace finrace {

/// A capture that was read, and what it does not have.
struct CaptureSeen {
    /// Where it was taken, seen from most of its connections.
    enum class Place { unknown, client, server, both, between, mixed };

    std::string file;
    Place place = Place::unknown;
    bool sure = false;               ///< else likely
    std::string host{};              ///< address of the end that it was taken at; empty if not known
    std::uint64_t at_client = 0;     ///< connections that it was taken at the client's end of
    std::uint64_t at_server = 0;     ///< and at the other end of
    std::uint64_t segments = 0;      ///< of TCP
    std::uint64_t unreadable = 0;    ///< of them, without a header
    std::uint64_t missing = 0;       ///< acknowledged, and not captured
    std::uint64_t one_direction = 0; ///< connections that were captured one way
    std::uint64_t guessed = 0;       ///< connections without a handshake
};

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
    std::vector<CaptureSeen> captures{}; ///< what was read, if that is what was read

    /// Whether there is something of which nothing is known.
    [[nodiscard]] bool is_partial() const { return lost > 0 || missing_hooks > 0 || (adopted_open > 0 && !chosen); }
};

/// Lines for the terminal, each ended.
std::string report_text(const Diagnosis& diagnosis, const Watched& watched, const Paint& paint, std::size_t width);
nlohmann::ordered_json report_json(const Diagnosis& diagnosis, const Watched& watched);

std::string_view to_string(CaptureSeen::Place place);
std::string_view to_string(PoolState state);
std::string_view to_string(Diagnosis::State state);

} // namespace finrace
