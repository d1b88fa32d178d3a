// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "sink/clock.h"

#include <chrono>
#include <cstdlib>
#include <ctime>
#include <limits>

#include <fmt/format.h>

namespace finrace {

namespace {

constexpr std::int64_t second_ns = 1'000'000'000;

std::int64_t read_clock(clockid_t id)
{
    timespec now{};
    ::clock_gettime(id, &now);
    return static_cast<std::int64_t>(now.tv_sec) * second_ns + now.tv_nsec;
}

void write_digits(std::string& text, std::size_t at, std::size_t count, std::int64_t value)
{
    for (std::size_t i = at + count; i > at; value /= 10)
        text[--i] = static_cast<char>('0' + value % 10);
}

} // namespace

std::uint64_t WallClock::monotonic_now_ns()
{
    return static_cast<std::uint64_t>(read_clock(CLOCK_MONOTONIC));
}

void WallClock::measure()
{
    // Realtime between two looks at monotonic; of a few tries the one that was interrupted least.
    std::int64_t tightest = std::numeric_limits<std::int64_t>::max();
    for (int attempt = 0; attempt < 3; ++attempt) {
        const std::int64_t before = read_clock(CLOCK_MONOTONIC);
        const std::int64_t realtime = read_clock(CLOCK_REALTIME);
        const std::int64_t after = read_clock(CLOCK_MONOTONIC);
        if (after - before < tightest) {
            tightest = after - before;
            offset_ns_ = realtime - (before + (after - before) / 2);
        }
    }
}

std::string WallClock::rfc3339(std::uint64_t monotonic_ns) const
{
    using namespace std::chrono;
    const sys_time<nanoseconds> time(nanoseconds(static_cast<std::int64_t>(monotonic_ns) + offset_ns_));
    const sys_days day = floor<days>(time);
    const year_month_day date(day);
    const hh_mm_ss<nanoseconds> of_day(time - day);
    // By hand, and without gmtime_r(), which takes the time zone's lock: six of them are in the record of a connection.
    std::string text = "0000-00-00T00:00:00.000000000Z";
    write_digits(text, 0, 4, static_cast<int>(date.year()));
    write_digits(text, 5, 2, static_cast<unsigned>(date.month()));
    write_digits(text, 8, 2, static_cast<unsigned>(date.day()));
    write_digits(text, 11, 2, of_day.hours().count());
    write_digits(text, 14, 2, of_day.minutes().count());
    write_digits(text, 17, 2, of_day.seconds().count());
    write_digits(text, 20, 9, of_day.subseconds().count());
    return text;
}

std::string WallClock::time_of_day(std::uint64_t monotonic_ns) const
{
    const std::int64_t ns = static_cast<std::int64_t>(monotonic_ns) + offset_ns_;
    const std::time_t seconds = ns / second_ns;
    std::tm local{};
    ::localtime_r(&seconds, &local);
    return fmt::format("{:02}:{:02}:{:02}.{:03}", local.tm_hour, local.tm_min, local.tm_sec,
                       ns % second_ns / 1'000'000);
}

std::string WallClock::day_and_time(std::uint64_t monotonic_ns) const
{
    const std::time_t seconds = (static_cast<std::int64_t>(monotonic_ns) + offset_ns_) / second_ns;
    std::tm local{};
    ::localtime_r(&seconds, &local);
    const long minutes = std::abs(local.tm_gmtoff) / 60;
    return fmt::format("{:04}-{:02}-{:02} {} {}{:02}:{:02}", local.tm_year + 1900, local.tm_mon + 1, local.tm_mday,
                       time_of_day(monotonic_ns), local.tm_gmtoff < 0 ? '-' : '+', minutes / 60, minutes % 60);
}

} // namespace finrace
