// SPDX-License-Identifier: GPL-2.0-only OR MIT
// The records as JSON, one pure function for each kind. Nested so that the flattened paths are OpenTelemetry's
// names wherever one exists; what is finrace's own lies under "finrace". docs/record.schema.json is their contract.
// What is not known is absent: never 0, never null.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "bpf/event.h"
#include "core/benched.h"
#include "core/classify.h"
#include "core/outcome.h"
#include "core/upstream.h"
#include "sink/clock.h"
#include "sink/history.h"

namespace finrace {

using Json = nlohmann::ordered_json;

/// The record's version; a field is added within one, never changed.
constexpr int record_schema = 1;

/// What all records of one run share.
struct Origin {
    std::string host_name;
    WallClock clock;
};

/// `process_name`: the owner's name where the event carries none.
Json verdict_record(const Origin& origin, const event& e, const Verdict& verdict, const Upstream& upstream,
                    std::string_view process_name, const Outcome& outcome = {}, const event* server_end = nullptr);

/// A secondary failure (Cause::upstream_benched). `loss`: the failure before, at the answer's time.
Json benched_record(const Origin& origin, const event& loss, const Benched& benched, const Verdict& verdict,
                    std::string_view process_name, const Outcome& outcome);

/// One whole connection, from its last event (EVENT_CLOSED or EVENT_OPEN_FAILED).
Json connection_record(const Origin& origin, const event& e, std::span<const StateStep> states,
                       std::string_view process_name);

/// `key` is nullptr for those that share one entry because there are too many.
Json upstream_record(const Origin& origin, std::uint64_t monotonic_ns, const UpstreamKey* key, const Upstream& upstream,
                     const Exposure& exposure);

struct MissingHook {
    std::string name;
    std::string purpose;
    std::string problem;
};

/// What a run that has confined itself still can do.
struct Confinement {
    bool files = false;                    ///< it sees no file but those in the folders that it needs, and /proc/PID
    bool system_calls = false;             ///< seccomp(2) refuses what it does not need
    std::vector<std::string> capabilities; ///< permitted still: CAP_BPF, ...
};

/// How an output stands.
struct OutputState {
    std::string name{}; ///< as it was asked for
    std::uint64_t written = 0;
    std::uint64_t dropped = 0;
    std::uint64_t bytes_waiting = 0;
    int problem = 0; ///< an errno, while it takes nothing
};

/// All of them together, under no name.
OutputState sum_of(std::span<const OutputState> outputs);

/// What a run can say about itself.
struct Health {
    std::string version;
    std::string backend;
    std::string attach; ///< empty for cgroup
    std::chrono::nanoseconds interval{};
    std::chrono::nanoseconds uptime{};
    bool last = false; ///< the run ends with this record
    std::uint64_t connections_begun = 0;
    std::uint64_t connections_adopted = 0;
    std::uint64_t connections_ended = 0;
    std::uint64_t events = 0;
    std::uint64_t outcome_events = 0; ///< of these, what tells how exchanges went on that had failed
    loss_counters losses{};
    std::vector<OutputState> outputs{};
    /// What no record is lost with: a recording, in lines; the metrics' address, while it can't be had.
    std::vector<OutputState> beside{};
    std::vector<MissingHook> missing_hooks;
    std::size_t upstreams = 0;
    std::map<Cause, std::uint64_t> verdicts;
    std::uint64_t unclassified = 0;
    std::optional<Confinement> confinement; ///< nothing if none was asked for
};
Json health_record(const Origin& origin, std::uint64_t monotonic_ns, const Health& health);

/// {"ms":…,"spread_ms":…,"samples":…}
Json timeout_json(const IdleTimeout& timeout);

/// The same on one level: the names on the way to a value, joined by dots, as OpenTelemetry writes attributes. Lists
/// stay lists.
Json flattened(const Json& record);

/// One line without its newline; bytes that are no UTF-8 become U+FFFD. Control characters are escaped, those too that
/// JSON may have as they are (U+007F to U+009F): a terminal obeys them.
std::string to_line(const Json& record);
/// The same in `line`, whose room is used again.
void write_line(std::string& line, const Json& record);

} // namespace finrace
