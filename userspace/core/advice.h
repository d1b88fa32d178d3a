// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Which setting of which software decides when an idle connection is closed, and what to set it to. One table, each row
// with its default and where that stands.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/upstream.h"

namespace finrace {

enum class Unit { seconds, milliseconds };

/// One software's setting, at one end of a pool.
struct IdleSetting {
    std::string_view software;
    std::string_view process; ///< its name as the kernel has it (comm), or the beginning of that
    std::string_view setting; ///< with {} for the value; empty if there is none
    std::string_view where;   ///< in which file or block, or what to do where there is no setting
    Unit unit;
    std::uint32_t default_ms; ///< 0: no limit, or none that is known
    std::string_view source;  ///< of the name and the default
};

std::span<const IdleSetting> proxy_settings();
/// Of servers; the first ones are the most common.
std::span<const IdleSetting> server_settings();
/// By the process that owns the connections; nullptr if it is none of those.
const IdleSetting* setting_of_proxy(std::string_view process);

/// The setting with a value, as it is to be written.
std::string written(const IdleSetting& setting, std::uint32_t value_ms);

/// One of the ways to end the races of a pool.
struct Remedy {
    struct Setting {
        std::string_view software;
        std::string text;      ///< as it is to be written
        std::string_view note; ///< where; may be empty
    };
    enum class End { proxy, upstream } end;
    std::vector<Setting> settings; ///< one, or the most common ones where the software is not known
    std::string why;               ///< one sentence, without its end
};

/// The ways out, the better one first. `timeout`: when the upstream closes. `own_limit`: when this host does, if it is
/// known. `process`: who owns the connections here.
std::vector<Remedy> remedies(const IdleTimeout& timeout, const std::optional<IdleTimeout>& own_limit,
                             std::string_view process);

} // namespace finrace
