// SPDX-License-Identifier: GPL-2.0-only OR MIT
// What a source tells of itself: what it is, what it can't see, and what it has lost. The same live and in a recording.
#pragma once

#include <cstdint>
#include <iterator>
#include <numeric>
#include <string>
#include <vector>

#include "bpf/event.h"

namespace finrace {

/// One attachment point: whether it holds, and what is missed without it.
struct Hook {
    std::string name; ///< e.g. "fentry/tcp_sendmsg_locked"
    bool attached = false;
    bool required = true;
    std::string purpose; ///< what it shows
    std::string problem; ///< why it is not attached
};

/// What stays the same for as long as a source runs.
struct SourceFacts {
    std::string host_name;
    std::string backend;         ///< "trace" or "cgroup"
    std::string attach;          ///< "fentry", "kprobe"; empty for cgroup
    bool tells_outcomes = false; ///< makes events from EVENT_RELEASED on
    std::vector<Hook> missing;   ///< hooks that are not attached

    /// "trace by fentry", "cgroup".
    [[nodiscard]] std::string backend_text() const { return attach.empty() ? backend : backend + " by " + attach; }
};

/// How much a BPF program has run, as far as the kernel counts it (kernel.bpf_stats_enabled).
struct ProgramRuns {
    std::string name;
    std::uint64_t runs = 0;
    std::uint64_t ns = 0;
};

/// What a source has counted so far.
struct SourceCounts {
    std::uint64_t connections_begun = 0; ///< opened, accepted and adopted; those of LOSS_TABLE_FULL are not followed
    std::uint64_t connections_adopted = 0;
    loss_counters losses{}; ///< summed over CPUs

    /// Events and connections, wherever they were lost.
    [[nodiscard]] std::uint64_t lost() const
    {
        return std::accumulate(std::begin(losses.by_place), std::end(losses.by_place), std::uint64_t{0});
    }
};

} // namespace finrace
