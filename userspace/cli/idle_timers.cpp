// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "cli/idle_timers.h"

#include <chrono>
#include <string_view>

#include <fmt/format.h>

namespace finrace {

void IdleTimers::add(const std::string& text)
{
    constexpr std::chrono::nanoseconds shortest = std::chrono::milliseconds(100);
    constexpr std::chrono::nanoseconds longest = std::chrono::hours(24);

    const std::size_t equals = text.find('=');
    if (equals == std::string::npos)
        throw UsageError(fmt::format("'{}' tells no timer; accepted: {}", text, forms));
    const std::chrono::nanoseconds timer = parse_duration(text.substr(equals + 1));
    if (timer < shortest || timer > longest)
        throw UsageError(fmt::format("'{}' is no idle timer; accepted: {}", text, forms));
    timers_.add(parse_address_pattern(std::string_view(text).substr(0, equals)),
                static_cast<std::uint32_t>(std::chrono::duration_cast<std::chrono::milliseconds>(timer).count()));
}

std::optional<std::uint32_t> IdleTimers::of(const UpstreamKey& key) const
{
    const std::uint32_t* told = timers_.of(key);
    return told != nullptr ? std::optional(*told) : std::nullopt;
}

} // namespace finrace
