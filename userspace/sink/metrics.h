// SPDX-License-Identifier: GPL-2.0-only OR MIT
// How a run stands, in the Prometheus text format (version 0.0.4): verdicts, upstreams, losses, outputs, and what it
// costs itself. Bounded, however many upstreams there are: beyond a number of them only verdicts are told, for
// upstream="other".
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/docket.h"
#include "core/exposure.h"
#include "sink/json.h"

namespace finrace {

/// How much a BPF program has run, as far as the kernel counts it (kernel.bpf_stats_enabled).
struct ProgramUse {
    std::string name{};
    std::uint64_t runs = 0;
    std::chrono::nanoseconds time{};
};

/// What the process has used.
struct ProcessUse {
    std::chrono::nanoseconds processor{};
    std::uint64_t resident_bytes = 0;
    double started_s = 0; ///< since the epoch
};

/// How a run stands now.
struct Standing {
    const Health& health;
    const Upstreams& upstreams;
    std::uint64_t now_ns = 0; ///< CLOCK_MONOTONIC
    /// An upstream's connections that are open. Not given: nothing is known of them.
    std::function<OpenConnections(const UpstreamKey&)> open{};
    std::vector<ProgramUse> programs{};
    ProcessUse process{};
};

/// How an upstream is called.
struct UpstreamLabel {
    std::string address; ///< without its port
    std::string name{};  ///< by people; may be empty
};

class Metrics {
public:
    static constexpr std::size_t usual_upstreams = 200;
    /// Different upstreams must have different addresses, or ports.
    using LabelOf = std::function<UpstreamLabel(const UpstreamKey&)>;

    explicit Metrics(LabelOf label_of, std::size_t most_upstreams = usual_upstreams)
        : label_of_(std::move(label_of)), most_upstreams_(most_upstreams)
    {
    }

    /// A verdict, as it is delivered.
    void count(const Judged& judged);

    /// One scrape's text. An upstream of which nothing came for an hour loses its series to a newer one, if there is no
    /// room.
    std::string text(const Standing& standing);

private:
    /// And the side, whether the request was tried again, and what the client got.
    using Labels = std::tuple<Cause, Variant, Certainty, std::string, std::string, std::string>;
    struct Slot {
        std::uint64_t newest_ns = 0;
        std::map<Labels, std::uint64_t> verdicts{};
    };

    /// Its own, or the one that many share.
    Slot& slot_of(const UpstreamKey& key, std::uint64_t now_ns);

    LabelOf label_of_;
    std::size_t most_upstreams_;
    std::map<UpstreamKey, Slot> slots_;
    Slot other_;
};

} // namespace finrace
