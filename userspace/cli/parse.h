// SPDX-License-Identifier: GPL-2.0-only OR MIT
// What people type, turned into values: durations, sizes, addresses, processes. A refusal names what was typed
// and the accepted forms.
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "core/upstream.h"

namespace finrace {

/// A value or a combination of flags that makes no sense; the program ends with 2.
struct UsageError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

/// "250ms", "10s", "2m", "1.5h"; a unit is required.
std::chrono::nanoseconds parse_duration(std::string_view text);

/// "65536", "64k", "4M", "1G": bytes, in powers of 1024.
std::uint64_t parse_size(std::string_view text);

/// ADDR[/LEN][:PORT]: a host or network, and perhaps one port of it; or :PORT, of any host.
struct AddressPattern {
    static constexpr std::uint8_t any_family = 0;

    std::array<std::uint8_t, 16> address{}; ///< network order, as in struct event
    std::uint8_t family = 4;
    std::uint8_t prefix = 32;
    std::optional<std::uint16_t> port;

    [[nodiscard]] bool matches(const std::uint8_t* other, std::uint8_t other_family, std::uint16_t other_port) const;
};
AddressPattern parse_address_pattern(std::string_view text);

/// What people say of addresses: the first pattern that matches counts.
template <typename Value>
class AddressTable {
public:
    void add(const AddressPattern& pattern, Value value) { entries_.emplace_back(pattern, std::move(value)); }
    /// nullptr if nothing was said of it.
    [[nodiscard]] const Value* of(const UpstreamKey& key) const
    {
        const auto found = std::find_if(entries_.begin(), entries_.end(), [&key](const auto& entry) {
            return entry.first.matches(key.address.data(), key.family, key.port);
        });
        return found != entries_.end() ? &found->second : nullptr;
    }

private:
    std::vector<std::pair<AddressPattern, Value>> entries_;
};

/// A process by its id or by its name as the kernel keeps it (15 bytes at most).
struct ProcessPattern {
    std::optional<std::uint32_t> pid;
    std::string name; ///< with no pid
};
ProcessPattern parse_process_pattern(std::string_view text);

/// One of some words. Throws UsageError.
template <typename Value>
Value choose(const std::vector<std::pair<std::string, Value>>& choices, const std::string& text)
{
    std::vector<std::string> names;
    for (const auto& [name, value] : choices) {
        if (name == text)
            return value;
        names.push_back(name);
    }
    throw UsageError(fmt::format("'{}' is not known; accepted: {}", text, fmt::join(names, ", ")));
}

} // namespace finrace
