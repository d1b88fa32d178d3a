// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Rests before reuse, and what they make of a pool: exposed, safe, or not to be told.
#include <catch2/catch.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "core/exposure.h"
#include "core/software.h"
#include "core/upstream.h"
#include "teach.h"

using namespace finrace;
using finrace::test::teach;

namespace {

constexpr std::uint64_t day_ns = 86'400'000'000'000;

Upstream closing_after(std::uint32_t ms)
{
    Upstream upstream;
    for (int i = 0; i < 5; ++i)
        teach(upstream.idle_timeout, ms);
    upstream.counts.idle_closes_by_peer = 5;
    return upstream;
}

} // namespace

TEST_CASE("rests are counted where they are", "[exposure]")
{
    RestHistogram rests;
    const auto ms = GENERATE(0U, 1U, 7U, 8U, 9U, 100U, 999U, 5000U, 65'000U, 3'000'000'000U);
    rests.add(ms);
    CAPTURE(ms);
    CHECK(rests.count() == 1);
    CHECK(rests.between(0, ms) + rests.between(ms, 4'294'967'295U) == Approx(1).margin(0.02));
    CHECK(rests.between(ms - ms / 8, ms + ms / 7 + 1) > 0.4); // its bucket is at most an eighth wide
    CHECK(rests.between(ms, ms) == 0);
    CHECK(rests.between(0, ms / 2) < 0.001);
}

TEST_CASE("filled buckets hold what was added, in order", "[exposure]")
{
    RestHistogram rests;
    CHECK(rests.filled().empty());
    for (const std::uint32_t ms : {0U, 5000U, 5001U, 4'294'967'295U})
        rests.add(ms);
    const std::vector<RestHistogram::Bucket> filled = rests.filled();
    REQUIRE(filled.size() == 3);
    CHECK(filled[0].from_ms == 0);
    CHECK(filled[0].to_ms == 1);
    CHECK(filled[1].from_ms <= 5000);
    CHECK(filled[1].to_ms > 5001);
    CHECK(filled[1].count == 2);
    CHECK(filled[2].to_ms > 4'294'967'295U);
}

TEST_CASE("of evenly spread rests a range has its share", "[exposure]")
{
    RestHistogram rests;
    for (std::uint32_t ms = 0; ms < 10'000; ++ms)
        rests.add(ms);
    CHECK(rests.between(2500, 5000) == Approx(2500).margin(5));
    CHECK(rests.between(4900, 5000) == Approx(100).margin(5));
    CHECK(rests.between(1, 2) == Approx(1));
    CHECK(rests.between(6000, 5000) == 0);
}

TEST_CASE("races are predicted as often as chance brings them about", "[exposure]")
{
    // Connections rest for as long as chance will have it; who comes within the window is lost.
    const auto timeout_ms = GENERATE(2000U, 5000U, 60'000U);
    const auto rtt_us = GENERATE(1000U, 20'000U);
    const auto mean_ms = GENERATE(1000.0, 5000.0, 30'000.0);
    constexpr int connections = 200'000;
    std::mt19937 random(17); // NOLINT: a fixed seed, so that a failure comes again
    std::exponential_distribution<double> rest(1 / mean_ms);
    Upstream upstream = closing_after(timeout_ms);
    upstream.rtt_us = rtt_us;
    const double window_ms = rtt_us / 1e3 + 1;
    double lost = 0;
    for (int i = 0; i < connections; ++i) {
        const double ms = rest(random);
        if (ms < timeout_ms)
            upstream.rests.add(static_cast<std::uint32_t>(ms));
        lost += ms >= timeout_ms && ms < timeout_ms + window_ms ? 1 : 0;
    }
    upstream.counts.exchanges = 2 * connections;
    const Exposure exposure = exposure_of(upstream, day_ns, {}, {});
    CAPTURE(timeout_ms, rtt_us, mean_ms, lost, exposure.races_a_day, exposure.late_reuses);
    CHECK(exposure.state == PoolState::exposed);
    CHECK(exposure.window_ms == Approx(window_ms));
    CHECK(exposure.share == Approx(exposure.races_a_day / (2.0 * connections)));
    if (lost >= 100) { // else chance has the last word
        CHECK(exposure.races_a_day > lost / 2);
        CHECK(exposure.races_a_day < lost * 2);
    }
}

TEST_CASE("half a day of the same makes twice as many races a day", "[exposure]")
{
    Upstream upstream = closing_after(5000);
    for (std::uint32_t ms = 2500; ms < 5000; ms += 10)
        upstream.rests.add(ms);
    upstream.counts.exchanges = 1000;
    const double once = exposure_of(upstream, day_ns, {}, {}).races_a_day;
    CHECK(once > 0);
    CHECK(exposure_of(upstream, day_ns / 2, {}, {}).races_a_day == Approx(2 * once));
    CHECK(exposure_of(upstream, 0, {}, {}).races_a_day == 0);
    upstream.counts.verdicts[Cause::upstream_reset] = 100;
    CHECK(exposure_of(upstream, day_ns, {}, {}).races_a_day == Approx(once));
    upstream.counts.verdicts[Cause::stale_reuse] = 100; // more than was to be expected
    CHECK(exposure_of(upstream, day_ns, {}, {}).races_a_day == 100);
}

TEST_CASE("this host is first where the upstream's timer is known to be longer, or never was first", "[exposure]")
{
    Upstream upstream;
    upstream.longest_reused_idle_ms = 1000;
    for (int i = 0; i < 4; ++i)
        teach(upstream.own_idle_limit, 3000);
    Ends ends;
    const auto state = [&] { return exposure_of(upstream, day_ns, {}, ends).state; };
    CHECK(state() == PoolState::unknown); // both timers may be as long, by chance
    SECTION("so often")
    {
        teach(upstream.own_idle_limit, 3000);
        CHECK(state() == PoolState::safe);
    }
    SECTION("as it is told")
    {
        ends.upstream.present = {{.ms = 3500, .text = {}, .place = "there"}};
        CHECK(state() == PoolState::safe);
        ends.upstream.present.front().ms = 3499;
        for (int i = 0; i < 10; ++i)
            teach(upstream.own_idle_limit, 3000);
        CHECK(state() != PoolState::safe);
        ends.upstream.present.front().ms = 0; // without end
        CHECK(state() == PoolState::safe);
    }
    SECTION("both close at once: a tie, which is a race")
    {
        upstream.rests.add(1000);
        upstream.counts.idle_closes_by_peer = 1;
        teach(upstream.idle_timeout, 3004);
        const Exposure exposure = exposure_of(upstream, day_ns, {}, ends);
        CHECK(exposure.state == PoolState::exposed);
        REQUIRE(exposure.tied_timeout);
        CHECK(exposure.tied_timeout->ms == 3004);
        CHECK(exposure.tied_timeout->samples == 1);
    }
    SECTION("a close at another moment is no tie")
    {
        upstream.rests.add(1000);
        upstream.counts.idle_closes_by_peer = 1;
        teach(upstream.idle_timeout, 2000);
        CHECK(state() == PoolState::unknown);
    }
}

TEST_CASE("races a day are a range, and none where too few requests tell of them", "[exposure]")
{
    Upstream upstream = closing_after(5000);
    upstream.counts.exchanges = 1000;
    const auto expected = [&] { return exposure_of(upstream, day_ns, {}, {}).expected(); };
    for (int i = 0; i < 4; ++i)
        upstream.rests.add(3000);
    CHECK(!expected());
    upstream.rests.add(3000);
    REQUIRE(expected());
    const double day = exposure_of(upstream, day_ns, {}, {}).races_a_day;
    CHECK(expected()->races_a_day.low == Approx(day * (1 - 2 / std::sqrt(5.0))));
    CHECK(expected()->races_a_day.high == Approx(day * (1 + 2 / std::sqrt(5.0))));
    SECTION("of races that were seen, if they are more")
    {
        upstream.counts.verdicts[Cause::keepalive_race] = 4;
        CHECK(!expected());
        upstream.counts.verdicts[Cause::keepalive_race] = 16;
        CHECK(expected()->races_a_day.low == Approx(8));
        CHECK(expected()->races_a_day.high == Approx(24));
    }
    SECTION("of those near the timer, where these say more")
    {
        for (int i = 0; i < 16; ++i)
            upstream.rests.add(4900);
        CHECK(exposure_of(upstream, day_ns, {}, {}).told_by == Approx(upstream.rests.between(4375, 5000)));
    }
}

TEST_CASE("what a pool is", "[exposure]")
{
    constexpr std::uint64_t ns_per_ms = 1'000'000;
    Upstream upstream;
    OpenConnections open;
    Ends ends;
    const auto state = [&] { return exposure_of(upstream, day_ns, open, ends).state; };
    const auto reuse = [&](std::uint32_t rest_ms) {
        upstream.rests.add(rest_ms);
        upstream.longest_reused_idle_ms = std::max(upstream.longest_reused_idle_ms, rest_ms);
    };
    SECTION("nothing seen")
    {
        CHECK(state() == PoolState::unknown);
    }
    SECTION("the upstream closes first")
    {
        upstream = closing_after(5000);
        CHECK(state() == PoolState::unknown); // of what is never used again
        reuse(100);
        CHECK(state() == PoolState::exposed);
    }
    SECTION("the upstream closes first, yet of many late requests none comes near it: a limit at reuse")
    {
        upstream = closing_after(8000);
        for (int i = 0; i < 19; ++i)
            reuse(5000);
        CHECK(state() == PoolState::exposed);
        reuse(5000);
        CHECK(state() == PoolState::kept_clear);
        reuse(7900);
        CHECK(state() == PoolState::exposed);
    }
    SECTION("the upstream closes, but by no timer that is known yet")
    {
        upstream.counts.idle_closes_by_peer = 2;
        CHECK(state() == PoolState::unknown);
        upstream.counts.complete_closes = upstream.counts.closed = 100;
        CHECK(state() == PoolState::unknown);
    }
    SECTION("this host closes first")
    {
        for (int i = 0; i < 4; ++i)
            teach(upstream.own_idle_limit, 4000);
        CHECK(state() == PoolState::unknown);
        teach(upstream.own_idle_limit, 4000);
        CHECK(state() == PoolState::safe);
        reuse(4000);
        CHECK(state() == PoolState::safe);
        SECTION("but the upstream does as well")
        {
            upstream.counts.idle_closes_by_peer = 1;
            CHECK(state() == PoolState::unknown);
        }
        SECTION("but some connections rest for longer: another pool's")
        {
            reuse(4001);
            CHECK(state() == PoolState::unknown);
        }
        SECTION("but some are kept for longer: by a process that has another limit")
        {
            upstream.longest_kept_ms = 4100; // a timer may be late
            CHECK(state() == PoolState::safe);
            upstream.longest_kept_ms++;
            CHECK(state() == PoolState::unknown);
        }
        SECTION("and has since the upstream's last close")
        {
            upstream.counts.idle_closes_by_peer = 10;
            for (int i = 0; i < 19; ++i)
                upstream.own_closes.close(4000);
            CHECK(state() == PoolState::unknown);
            upstream.own_closes.close(4000);
            CHECK(state() == PoolState::safe);
        }
        SECTION("but one has been open for so long that another may keep it")
        {
            open.longest_ns = 7999 * ns_per_ms;
            CHECK(state() == PoolState::safe);
            open.longest_ns = 8000 * ns_per_ms;
            CHECK(state() == PoolState::unknown);
        }
    }
    SECTION("the upstream closed first, until this host was told to")
    {
        upstream = closing_after(5000);
        for (int i = 0; i < 5; ++i)
            teach(upstream.own_idle_limit, 4000);
        reuse(4900);
        CHECK(state() == PoolState::exposed);
        const auto close = [&](int count) {
            for (int i = 0; i < count; ++i)
                upstream.own_closes.close(4000);
        };
        close(19);
        CHECK(state() == PoolState::exposed);
        close(1);
        CHECK(state() == PoolState::safe);
        CHECK(exposure_of(upstream, day_ns, open, ends).races_a_day == 0);
        SECTION("but some rest for longer than that")
        {
            upstream.own_closes.rest(4101);
            CHECK(state() == PoolState::exposed);
            close(39); // they were told later, or have ended since
            CHECK(state() == PoolState::exposed);
            close(1);
            CHECK(state() == PoolState::safe);
        }
        SECTION("but one has been open for so long that another may keep it")
        {
            open.longest_ns = 8000 * ns_per_ms;
            CHECK(state() == PoolState::exposed);
        }
        SECTION("but both timers are as long")
        {
            upstream.idle_timeout = {};
            for (int i = 0; i < 5; ++i)
                teach(upstream.idle_timeout, 4400);
            CHECK(state() == PoolState::exposed);
        }
    }
    SECTION("one request each")
    {
        upstream.counts.closed = 4;
        CHECK(state() == PoolState::unknown);
        upstream.counts.closed = 5;
        CHECK(state() == PoolState::not_reused);
        SECTION("but one is kept")
        {
            open.longest_ns = 999 * ns_per_ms;
            CHECK(state() == PoolState::not_reused);
            open.longest_ns = 1000 * ns_per_ms;
            CHECK(state() == PoolState::unknown);
            SECTION("unless it is known to carry a request, not to rest")
            {
                open.rests_known = true;
                CHECK(state() == PoolState::not_reused);
                open.resting = 1;
                open.longest_rest_ms = 999;
                CHECK(state() == PoolState::not_reused);
                open.longest_rest_ms = 1000;
                CHECK(state() == PoolState::unknown);
            }
        }
        SECTION("but one was used again")
        {
            reuse(1);
            CHECK(state() == PoolState::unknown);
        }
        SECTION("but this host lets one rest before it closes it")
        {
            upstream.counts.idle_closes_by_local = 1; // at once
            CHECK(state() == PoolState::not_reused);
            upstream.kept_idle = 1;
            CHECK(state() == PoolState::unknown);
        }
    }
}

TEST_CASE("what the ends have been told counts where nothing has shown", "[exposure]")
{
    Upstream upstream;
    OpenConnections open;
    Ends ends;
    const auto exposure = [&] { return exposure_of(upstream, day_ns, open, ends); };
    const auto state = [&] { return exposure().state; };
    const auto tell = [](End& end, std::uint32_t ms) { end.present = {{.ms = ms, .text = {}, .place = "there"}}; };
    const auto reuse = [&](std::uint32_t rest_ms) {
        upstream.rests.add(rest_ms);
        upstream.longest_reused_idle_ms = std::max(upstream.longest_reused_idle_ms, rest_ms);
    };
    SECTION("the proxy is told to keep connections for longer than the upstream")
    {
        tell(ends.upstream, 5000);
        tell(ends.proxy, 60'000);
        CHECK(state() == PoolState::unknown); // of no connection at all
        open.resting = 1;
        CHECK(state() == PoolState::exposed);
        CHECK(exposure().told_timeout_ms == 5000U);
        CHECK(exposure().races_a_day == 0);
        for (int i = 0; i < 10; ++i)
            reuse(4000);
        CHECK(exposure().races_a_day > 0);
        SECTION("or without end")
        {
            tell(ends.proxy, 0);
            CHECK(state() == PoolState::exposed);
        }
        SECTION("by less than what is told is worth")
        {
            tell(ends.proxy, 4501);
            CHECK(state() == PoolState::exposed);
        }
        SECTION("but the upstream's is not in force, perhaps")
        {
            ends.upstream.present.front().pending = true;
            CHECK(state() == PoolState::unknown);
        }
        SECTION("but connections outlived it: it has been told otherwise somewhere else")
        {
            for (int i = 0; i < 4; ++i)
                reuse(20'000);
            upstream.longest_answered_idle_ms = 20'000;
            CHECK(state() == PoolState::exposed); // one or the other may be a WebSocket
            reuse(20'000);
            CHECK(state() == PoolState::unknown);
            upstream.longest_answered_idle_ms = 8500; // as late as a sweep may be
            CHECK(state() == PoolState::exposed);
        }
        SECTION("but what the proxy is told is not known")
        {
            ends.proxy.present.clear();
            CHECK(state() == PoolState::unknown);
        }
    }
    SECTION("of many used again none had rested for half as long")
    {
        tell(ends.upstream, 5000);
        tell(ends.proxy, 60'000);
        for (int i = 0; i < 19; ++i)
            reuse(2400);
        CHECK(state() == PoolState::exposed);
        reuse(2400);
        CHECK(state() == PoolState::kept_clear);
        SECTION("but one rests now")
        {
            open.longest_rest_ms = 2500;
            CHECK(state() == PoolState::exposed);
        }
    }
    SECTION("the proxy is told to close first")
    {
        tell(ends.upstream, 5000);
        tell(ends.proxy, 4500);
        CHECK(state() == PoolState::safe);
        CHECK(exposure().safe_as_told);
        reuse(4600);
        CHECK(state() == PoolState::safe);
        reuse(4601); // it does not what it is told
        CHECK(state() == PoolState::unknown);
    }
    SECTION("an upstream that closed nevertheless")
    {
        tell(ends.upstream, 5000);
        tell(ends.proxy, 4000);
        upstream.counts.idle_closes_by_peer = 1;
        CHECK(state() == PoolState::unknown);
    }
    SECTION("this host let go of all, well before")
    {
        tell(ends.upstream, 65'000);
        upstream.kept_idle = 2;
        upstream.longest_kept_ms = 9000;
        CHECK(state() == PoolState::unknown);
        upstream.kept_idle = 3;
        CHECK(state() == PoolState::safe);
        SECTION("but one rests now")
        {
            open.resting = 1;
            CHECK(state() == PoolState::unknown);
        }
        SECTION("but one for more than half as long")
        {
            upstream.longest_kept_ms = 32'501;
            CHECK(state() == PoolState::unknown);
        }
        SECTION("but one has been open for as long")
        {
            open.longest_ns = 65'000 * 1'000'000ULL;
            CHECK(state() == PoolState::unknown);
        }
    }
    SECTION("a limit that is looked at on use shows by nothing else")
    {
        upstream = closing_after(6000);
        reuse(1000);
        ends.proxy.software = setting_of_proxy("apache2");
        tell(ends.proxy, 0);
        CHECK(state() == PoolState::exposed);
        tell(ends.proxy, 5500);
        CHECK(state() == PoolState::safe);
        tell(ends.proxy, 5501); // no timer is as exact
        CHECK(state() == PoolState::exposed);
        tell(ends.proxy, 5000);
        CHECK(state() == PoolState::safe);
        reuse(5101);
        CHECK(state() == PoolState::exposed);
        SECTION("a limit of another kind would have shown")
        {
            ends.proxy.software = setting_of_proxy("nginx");
            CHECK(state() == PoolState::exposed);
        }
    }
}
