// SPDX-License-Identifier: GPL-2.0-only OR MIT
// What people know of their upstreams' idle timers: it holds from the first connection on, until the upstream's own
// idle closes teach better.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "cli/parse.h"
#include "core/upstream.h"

namespace finrace {

class IdleTimers {
public:
    /// What add() takes, in words.
    static constexpr const char* forms = "ADDR[/LEN][:PORT]=DURATION, :PORT=DURATION (10.0.0.5:8000=5s), 100ms to 1d";

    /// Throws UsageError.
    void add(const std::string& text);
    /// In ms, by the first pattern that matches.
    [[nodiscard]] std::optional<std::uint32_t> of(const UpstreamKey& key) const;

private:
    AddressTable<std::uint32_t> timers_;
};

} // namespace finrace
