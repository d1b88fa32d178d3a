// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Records read back, from where a fleet's are kept: what sink/json.h writes, on one level, where null and what is
// absent are alike. As much of a verdict as a report tells of one.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include <nlohmann/json_fwd.hpp>

#include "bpf/event.h"
#include "core/cause.h"
#include "core/classify.h"
#include "core/exposure.h"
#include "core/outcome.h"
#include "core/reason.h"
#include "core/upstream.h"

namespace finrace {

/// One record on one level. It must outlive this.
class FlatRecord {
public:
    explicit FlatRecord(const nlohmann::json& record) : record_(record) {}

    [[nodiscard]] bool has(const char* name) const;
    [[nodiscard]] std::string text(const char* name) const;     ///< empty if there is none
    [[nodiscard]] std::uint64_t number(const char* name) const; ///< 0 if there is none, or it is below
    [[nodiscard]] double real(const char* name) const;          ///< 0 if there is none
    [[nodiscard]] bool truth(const char* name) const; ///< false if there is none; a number that is not 0 is true

private:
    const nlohmann::json& record_;
};

/// Where two values name an upstream; nothing if that is no address.
std::optional<UpstreamKey> upstream_key(const std::string& address, std::uint64_t port);

/// A verdict's event as far as its record tells: its times are CLOCK_REALTIME, `at_ns` the record's own.
event event_of(const FlatRecord& record, std::uint64_t at_ns);
/// Nothing if it has no cause that is known here.
std::optional<Verdict> verdict_of(const FlatRecord& record);
Outcome outcome_of(const FlatRecord& record);

std::optional<Certainty> certainty_from_string(std::string_view text);
std::optional<Reason> reason_from_string(std::string_view text);
std::optional<PoolState> pool_state_from_string(std::string_view text);

} // namespace finrace
