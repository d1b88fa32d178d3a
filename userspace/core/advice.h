// SPDX-License-Identifier: GPL-2.0-only OR MIT
// What to change so that a pool races no more: which setting, at which end, to which value.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/software.h"
#include "core/upstream.h"

namespace finrace {

/// One of the ways to end the races of a pool.
struct Remedy {
    struct Setting {
        std::string_view software;
        std::string text;             ///< as it is to be written
        std::string_view note;        ///< where; may be empty
        std::vector<Present> present; ///< what holds now, where that is known
        std::string_view source;      ///< of the setting's name and its default
    };
    enum class End { proxy, upstream } end;
    std::vector<Setting> settings; ///< one, or the most common ones where the software is not known
    std::string why;               ///< one sentence, without its end
};

/// The ways out, the better one first. `timeout`: when the upstream closes. `own_limit`: when this host was seen to, if
/// it was.
std::vector<Remedy> remedies(const IdleTimeout& timeout, const std::optional<IdleTimeout>& own_limit, const Ends& ends,
                             std::string_view own = "this host");

} // namespace finrace
