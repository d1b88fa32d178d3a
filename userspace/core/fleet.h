// SPDX-License-Identifier: GPL-2.0-only OR MIT
// What many hosts have told, as one diagnosis: failures of one cause at one upstream are one finding, whichever proxy
// met them, an upstream's pools on all proxies one pool; and what both ends of a connection tell of is one verdict,
// with the stronger evidence. Pure.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/diagnosis.h"

namespace finrace {

/// What the upstream's own host tells of the same connections' ends: what closed_on_request or server_cut_response
/// says.
struct ServerSays {
    std::string host;
    Cause cause{};
    bool late = false;                                   ///< the request came after the close
    bool proven = false;                                 ///< by that alone: nothing of the request had come before
    bool whole = false;                                  ///< all of the request lay unread
    bool reset = false;                                  ///< the close was an RST
    bool killed = false;                                 ///< by a signal
    auto operator<=>(const ServerSays&) const = default; // NOLINT(modernize-use-nullptr): the 0 is the compiler's own
};

/// Verdicts of one host that are alike.
struct FleetGroup {
    UpstreamKey where;
    bool server_side = false;
    Cause cause{};
    Certainty certainty = Certainty::possible;
    bool incomplete = false;
    bool rested = false; ///< the connection had, before the request: reused, or idle for long
    std::optional<Reason> reason{};
    std::uint16_t status = 0; ///< that clients got; 0 for none, or not known
    std::string host{};
    std::string process{};
    std::optional<ServerSays> server{};
    std::string server_message{}; ///< its own sentence, on the most telling one
    std::uint64_t verdicts = 0;
    std::uint64_t affected = 0;
    std::uint64_t hidden = 0;
    std::uint64_t clients_left = 0;
    std::vector<std::uint64_t> times_ns{}; ///< CLOCK_REALTIME, in order: of the first few
    std::uint64_t last_ns = 0;
    /// Each burst's beginning and end, in order. CLOCK_REALTIME.
    std::vector<std::pair<std::uint64_t, std::uint64_t>> bursts{};
    /// Some of the waits until the requests' ends, where no race decided these, with their times.
    std::vector<std::pair<std::uint32_t, std::uint64_t>> waits_ms{};
    std::uint32_t lowest_wait_ms = 0;
    std::uint32_t highest_wait_ms = 0;
    std::uint64_t instance = 0; ///< the store's number of the most telling one
    std::uint64_t rank = 0;     ///< its: the lower, the more it tells
};

class Fleet {
public:
    void add(FleetGroup group);
    /// One host's pool. `pool.hosts` names that host.
    void add(Pool pool);

    /// The most telling verdict of each finding, by the store's number; their records are to be had with instance().
    [[nodiscard]] std::vector<std::uint64_t> instances() const;
    void instance(std::uint64_t number, Finding::Instance told);
    /// All of it, once the instances are known.
    [[nodiscard]] Diagnosis diagnosis() &&;

private:
    struct Merged {
        Finding finding;
        std::vector<FleetGroup> groups;
    };
    static void merge_bursts(Merged& merged);

    std::map<std::pair<UpstreamKey, Cause>, Merged> findings_;
    std::map<UpstreamKey, std::vector<Pool>> pools_;
    std::map<UpstreamKey, std::uint64_t> more_races_; ///< that the upstream's own host has proven to be some
};

} // namespace finrace
