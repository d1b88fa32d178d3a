// SPDX-License-Identifier: GPL-2.0-only OR MIT
// From the kernel's CLOCK_MONOTONIC, which events carry, to RFC 3339 in UTC, which records carry. The offset
// between the two clocks moves (NTP slews one of them, somebody sets it), so it is measured again and again.
#pragma once

#include <cstdint>
#include <string>

namespace finrace {

class WallClock {
public:
    WallClock() { measure(); }
    /// With a known offset, for tests.
    explicit WallClock(std::int64_t realtime_minus_monotonic_ns) : offset_ns_(realtime_minus_monotonic_ns) {}

    void measure();
    [[nodiscard]] std::int64_t offset_ns() const { return offset_ns_; }
    /// "2026-01-31T12:00:00.123456789Z"
    [[nodiscard]] std::string rfc3339(std::uint64_t monotonic_ns) const;
    /// The time of day in the local time zone, for people: "13:00:00.123"
    [[nodiscard]] std::string time_of_day(std::uint64_t monotonic_ns) const;
    /// The same with its day, and what the zone adds to UTC: "2026-01-31 13:00:00.123 +01:00"
    [[nodiscard]] std::string day_and_time(std::uint64_t monotonic_ns) const;

    static std::uint64_t monotonic_now_ns();

private:
    std::int64_t offset_ns_ = 0;
};

} // namespace finrace
