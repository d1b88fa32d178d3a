// SPDX-License-Identifier: GPL-2.0-only OR MIT
// What a while of watching comes to: findings by harm, and each upstream's pool with its exposure. Pure.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "core/docket.h"
#include "core/exposure.h"
#include "core/upstream.h"

namespace finrace {

/// All failures of one cause at one upstream (on the server side: at one listener of this host's).
struct Finding {
    UpstreamKey where;
    bool server_side = false;
    Cause cause{};
    std::uint64_t count = 0;
    std::uint64_t hidden = 0; ///< of these, retried so that the client got another answer
    std::map<Certainty, std::uint64_t> certainties;
    std::map<Reason, std::uint64_t> reasons;        ///< where the upstream's close has one that is known
    std::map<std::uint16_t, std::uint64_t> answers; ///< what clients got instead: statuses
    std::uint64_t clients_left = 0;                 ///< closed on without an answer, or gone before
    std::uint64_t first_ns = 0;
    std::uint64_t last_ns = 0;

    /// The most telling one: the most certain, of these the first.
    struct Instance {
        event e;
        event last;
        Verdict verdict;
        Outcome outcome;
        std::string process;
    } instance;

    [[nodiscard]] std::uint64_t harm() const { return count - hidden; }
};

struct Pool {
    UpstreamKey where;
    bool other = false; ///< all beyond those that are told apart
    Upstream upstream;
    Exposure exposure;
    std::string process; ///< the last one here that used it; empty if not known
};

class Diagnosis {
public:
    enum class State {
        healthy,      ///< pools were seen that can't race, and nothing failed
        exposed,      ///< nothing failed by a race so far, but it will
        findings,     ///< requests died
        inconclusive, ///< not enough was seen, or events were lost
    };

    void add(const Judged& judged, const std::string& process);
    /// Which process here uses an upstream.
    void note_process(const UpstreamKey& key, const std::string& process);
    /// A run of the source ends: what its upstreams came to.
    void add(const Upstreams& upstreams, std::uint64_t observed_ns);

    /// By harm, the worst first.
    [[nodiscard]] std::vector<const Finding*> findings() const;
    /// Those that are exposed first, and the busiest of them.
    [[nodiscard]] std::vector<const Pool*> pools() const;
    [[nodiscard]] std::uint64_t requests() const;
    [[nodiscard]] std::uint64_t unclassified() const;
    /// `lost`: whether anything was not seen that should have been.
    [[nodiscard]] State state(bool lost) const;

private:
    std::map<std::pair<UpstreamKey, Cause>, Finding> findings_;
    std::map<UpstreamKey, Pool> pools_;
    std::map<UpstreamKey, std::string> processes_;
    std::optional<Pool> other_;
};

} // namespace finrace
