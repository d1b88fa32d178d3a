// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Connections idle and busy, and requests a second, from samples and from events between them.
#include <catch2/catch.hpp>

#include <limits>

#include "core/traffic.h"
#include "test_sink_events.h"

using namespace finrace;
using namespace finrace::test;

namespace {

constexpr std::uint64_t second = 1'000 * ms;

/// To 10.0.0.2:8000.
event about(std::uint8_t kind, std::uint64_t id, std::uint32_t exchange, std::uint64_t at_ns)
{
    event e = in_exchange(kind, at_ns);
    e.connection.id = id;
    e.connection.exchange = exchange;
    return e;
}

const UpstreamKey upstream = UpstreamKey::of(about(EVENT_OPENED, 1, 0, 0));

SampledConnection sampled(std::uint64_t id, std::uint32_t exchange, bool busy = false, std::uint64_t rested_ms = 0)
{
    return {.upstream = upstream, .id = id, .exchange = exchange, .busy = busy, .rested_ms = rested_ms};
}

double rate(const Traffic& traffic)
{
    return traffic.of(upstream).requests_per_second.value();
}

} // namespace

TEST_CASE("connections are idle or busy as the last sample found them")
{
    Traffic traffic(0);
    CHECK(traffic.upstreams().empty());
    CHECK_FALSE(traffic.of(upstream).requests_per_second);
    traffic.take({sampled(1, 1), sampled(2, 1, true), sampled(0, 0, false, 70)}, second, true);
    CHECK(traffic.upstreams() == std::vector<UpstreamKey>{upstream});
    CHECK(traffic.of(upstream).idle == 2);
    CHECK(traffic.of(upstream).busy == 1);
    CHECK(traffic.of(upstream).open.resting == 2);
    CHECK(traffic.of(upstream).open.longest_rest_ms == 70);
    traffic.take({}, 2 * second, true);
    CHECK(traffic.of(upstream).idle == 0);
    CHECK(traffic.of(upstream).open.count == 2); // their ends have not been told of
    traffic.take({}, 3 * second, true);
    CHECK(traffic.upstreams().empty());
}

TEST_CASE("requests a second count each request once")
{
    Traffic traffic(0);
    traffic.take({sampled(1, 10)}, 2 * second, true);
    CHECK(rate(traffic) == Approx(5));

    SECTION("on a connection that stays open")
    {
        traffic.take({sampled(1, 40)}, 4 * second, true);
        CHECK(rate(traffic) == Approx(10));
    }
    SECTION("on one that ends between two samples")
    {
        traffic.follow(about(EVENT_CLOSED, 1, 30, 3 * second));
        traffic.take({}, 4 * second, true);
        CHECK(rate(traffic) == Approx(7.5));
    }
    SECTION("on one whose end was told of while the sample that still has it was taken")
    {
        traffic.follow(about(EVENT_CLOSED, 1, 30, 3 * second));
        traffic.take({sampled(1, 30)}, 4 * second, true);
        CHECK(rate(traffic) == Approx(7.5));
        CHECK(traffic.of(upstream).idle == 0);
        traffic.take({}, 6 * second, true);
        CHECK(rate(traffic) == Approx(5));
    }
    SECTION("on one that lived between two samples")
    {
        traffic.follow(about(EVENT_OPENED, 2, 0, 3 * second));
        traffic.follow(about(EVENT_CLOSED, 2, 10, 3 * second));
        traffic.take({sampled(1, 10)}, 4 * second, true);
        CHECK(rate(traffic) == Approx(5));
    }
    SECTION("and only those of the last ten seconds")
    {
        for (std::uint64_t at = 4; at <= 14; at += 2)
            traffic.take({sampled(1, 10)}, at * second, true);
        CHECK(rate(traffic) == 0);
    }
}

TEST_CASE("requests a second are not told where samples have no accounting")
{
    Traffic traffic(0);
    traffic.follow(about(EVENT_OPENED, 1, 0, second));
    traffic.follow(about(EVENT_CLOSED, 1, 30, 2 * second));
    traffic.take({sampled(0, 0)}, 3 * second, false);
    CHECK(traffic.of(upstream).idle == 1);
    CHECK_FALSE(traffic.of(upstream).requests_per_second);
}

TEST_CASE("what was opened counts as open until its end, or until samples have lost it")
{
    Traffic traffic(0);
    traffic.follow(about(EVENT_OPENED, 1, 0, second));
    traffic.take({sampled(1, 1)}, 4 * second, true);
    CHECK(traffic.of(upstream).open.count == 1);
    CHECK(traffic.of(upstream).open.longest_ns == 3 * second);
    traffic.take({}, 6 * second, true);
    traffic.take({}, 8 * second, true);
    CHECK(traffic.of(upstream).open.count == 0);

    traffic.follow(about(EVENT_OPENED, 2, 0, 9 * second));
    traffic.follow(about(EVENT_CLOSED, 2, 1, 9 * second));
    traffic.take({}, 10 * second, true);
    CHECK(traffic.of(upstream).open.count == 0);
}

TEST_CASE("where nobody samples, ends take no memory without a bound, and that is said")
{
    Traffic traffic(0);
    for (std::uint64_t id = 1; id <= Traffic::most_open + 1; ++id)
        traffic.follow(about(EVENT_CLOSED, id, 1, second));
    traffic.take({sampled(1, 1)}, 2 * second, true);
    CHECK(traffic.of(upstream).open.longest_ns == std::numeric_limits<std::uint64_t>::max());
}

TEST_CASE("what is older than the beginning has been open since then, at least")
{
    Traffic traffic(5 * second);
    traffic.take({sampled(1, 0)}, 9 * second, true);
    CHECK(traffic.of(upstream).open.count == 1);
    CHECK(traffic.of(upstream).open.longest_ns == 4 * second);
}

TEST_CASE("a connection that a sample had before its opening was told of is counted once")
{
    Traffic traffic(0);
    traffic.take({sampled(1, 3)}, 4 * second, true);
    traffic.follow(about(EVENT_OPENED, 1, 0, 3 * second));
    traffic.take({sampled(1, 4)}, 8 * second, true);
    CHECK(rate(traffic) == Approx(0.5));
    CHECK(traffic.of(upstream).open.longest_ns == 5 * second);
}
