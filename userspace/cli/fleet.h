// SPDX-License-Identifier: GPL-2.0-only OR MIT
// finrace diagnose --clickhouse: what all hosts have told, as one report.
#pragma once

#include <chrono>
#include <string>

#include "cli/filter.h"
#include "core/diagnosis.h"
#include "sink/sentences.h"

namespace finrace {

struct FleetReport {
    Diagnosis diagnosis;
    Watched watched;
};

/// Of the records since the beginning of the hour in which `since` ago lies: those that `filter` chooses, by upstream,
/// by process name and by side. Throws UsageError.
FleetReport ask_fleet(const std::string& url, std::chrono::nanoseconds since, const Filter& filter);

} // namespace finrace
